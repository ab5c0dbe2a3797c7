"""The fraction of an intended change that weights make: bfloat16, codes, float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import madax
from benchmarks.lib import records
from benchmarks.lib.formats import LOG_8, LOG_16
from benchmarks.lib.steps import apply
from benchmarks.lib.style import Report

Rounding = Literal["nearest", "stochastic"]
STEPS = 10
RATES = np.logspace(-4, -1, 13)
STORAGES: dict[str, tuple[Callable[[jax.Array], Any], Rounding]] = {
    # name: (how weights are stored, how their steps are rounded)
    "bfloat16, nearest": (lambda w: w.astype(jnp.bfloat16), "nearest"),
    "bfloat16, stochastic": (lambda w: w.astype(jnp.bfloat16), "stochastic"),
    "int8 codes, stochastic": (lambda w: madax.quantize_params(w, LOG_8), "stochastic"),
    "int16 codes, stochastic": (
        lambda w: madax.quantize_params(w, LOG_16),
        "stochastic",
    ),
    "float32": (lambda w: w, "nearest"),
}
STYLES: tuple[dict[str, Any], ...] = (
    {"c": "#0072b2", "ls": "--", "marker": "s"},
    {"c": "#0072b2", "ls": "-", "marker": "^"},
    {"c": "#d55e00", "ls": "-", "marker": "o"},
    {"c": "#e69f00", "ls": "-.", "marker": "v"},
    {"c": "black", "ls": ":", "marker": ""},
)


def stall(out: Path = Path("benchmarks/results/stall")) -> None:
    """Show where bfloat16 weights stall, and what does not; takes seconds.

    Madam takes ten steps down a constant gradient, from the same weights stored in
    five ways, at rates from 1e-4 to 0.1: each weight should shrink by ten times the
    rate, in nats.

    Args:
        out: Folder for stall.png and stall.jsonl.
    """
    raw = records.file(out, "stall", fresh=True)
    key_size, key_sign = jax.random.split(jax.random.key(0))
    size = jnp.exp(jax.random.uniform(key_size, (256, 256), minval=-0.7, maxval=0.7))
    weights = size * jax.random.rademacher(key_sign, size.shape, jnp.float32)
    for name, (store, rounding) in STORAGES.items():
        for rate in RATES.tolist():
            share = moved(store(weights), rate, rounding) / (STEPS * rate)
            record = {"storage": name, "rate": rate, "steps": STEPS, "share": share}
            records.append(raw, record)
    stall_report(out)
    runs = records.read(raw)
    table = runs.pivot(index="rate", columns="storage", values="share")
    print(table[list(STORAGES)].to_markdown(floatfmt=(".1e", *[".3f"] * len(STORAGES))))
    print(f"\nFigure:  {out / 'stall.png'}\nRecords: {raw}")


def moved(
    params: jax.Array | madax.QuantizedArray, rate: float, rounding: Rounding
) -> float:
    """Returns the mean of how far the weights shrank, in nats.

    Args:
      params: weights, an array or a ``madax.QuantizedArray``.
      rate: learning rate.
      rounding: of the steps, "stochastic" or "nearest".
    """
    tx = madax.madam(rate, rounding=rounding)

    @jax.jit
    def step(params, state):
        grads = jnp.sign(madax.dequantize_params(params, jnp.float32))
        return apply(tx, params, state, grads)

    start, state = params, tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    before, after = (madax.dequantize_params(p, jnp.float32) for p in (start, params))
    return float(-jnp.mean(jnp.log(after / before)))


def stall_figure(runs: pd.DataFrame) -> Figure:
    """Draws the share of the movement that took place.

    Args:
      runs: records, as read.
    """
    fig = Figure(figsize=(5, 3.6), layout="constrained")
    axes = fig.subplots()
    for (name, line), style in zip(
        runs.groupby("storage", sort=False), STYLES, strict=True
    ):
        axes.plot(line["rate"], line["share"], label=name, markersize=5, **style)
    axes.set(
        xscale="log",
        xlabel="learning rate, nats per step",
        ylabel="movement / what it should be",
        title="Ten steps of Madam down a constant gradient",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


stall_report = Report("stall", figure=stall_figure)
