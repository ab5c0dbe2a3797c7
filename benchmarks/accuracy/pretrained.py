"""Weights from elsewhere: what codes, and a bound, do to outliers and heavy tails."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import madax
from benchmarks.lib import records
from benchmarks.lib.steps import apply
from benchmarks.lib.style import Report, markdown
from benchmarks.lib.train import Budget, data_order
from benchmarks.workloads import Workload
from benchmarks.workloads.digits import digits

SEEDS = 3
SHAPE = (768, 768)
# A rate at which Adam leaves outliers of ten times the root mean square behind.
BEFORE, ADAM_RATE = Budget(steps=1000, seeds=SEEDS), 0.01
AFTER, MADAM_RATE = Budget(steps=200, seeds=SEEDS), 0.003
FORMATS: dict[str, madax.formats.Format] = {
    "log 8": madax.LogFormat(8),
    "symlog 8": madax.SymlogFormat(8),
    "uniform 8": madax.UniformFormat(8),
    "log 16": madax.LogFormat(16),
    "symlog 16": madax.SymlogFormat(16),
    "uniform 16": madax.UniformFormat(16),
}
SCALES: dict[str, dict[str, Any]] = {
    "3 rms, the paper": {"p_scale": 3.0},
    "largest weight, the default": {},
    "largest weight of a channel": {"channel_axis": -1},
}
DRAWS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.standard_normal(SHAPE),
    "uniform": lambda rng: rng.uniform(-1, 1, SHAPE),
    "Student-t(3)": lambda rng: rng.standard_t(3, SHAPE),
}


def pretrained(out: Path = Path("benchmarks/results/pretrained")) -> None:
    """Quantise weights of heavy tails, and a network that Adam has trained.

    The relative error of codes of every format, by the scale they are given; and the
    accuracy on digits before, after, and after a short fine-tuning with Madam on the
    codes. Takes two minutes.

    Args:
        out: Folder for pretrained.md and pretrained.jsonl.
    """
    raw = records.file(out, "pretrained", fresh=True)
    for run in (*drawn_runs(), *network_runs(digits())):
        records.append(raw, run)
    print(pretrained_report(out))
    print(f"\nRecords: {raw}")


def drawn_runs() -> Iterator[records.Record]:
    """Yields the relative errors of codes of random weights."""
    for name, draw in DRAWS.items():
        draws = [draw(np.random.default_rng(seed)) for seed in range(SEEDS)]
        weights = jnp.asarray(draws, jnp.float32)
        for how, codes in coded(weights):
            for seed in range(SEEDS):
                yield {
                    "weights": name,
                    **how,
                    "seed": seed,
                    **tails(weights, codes, seed),
                }


def network_runs(workload: Workload) -> Iterator[records.Record]:
    """Yields errors and scores of a network, trained by Adam, then quantised.

    Args:
      workload: what to train.
    """
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    start = jax.vmap(workload.init)(keys)
    weights = train(workload, optax.adam(ADAM_RATE), start, BEFORE)
    before = scores(workload, weights)
    tx = madax.madam(optax.cosine_decay_schedule(MADAM_RATE, AFTER.steps))
    for how, codes in coded(weights):
        after = scores(workload, codes)
        tuned = scores(workload, train(workload, tx, codes, AFTER))
        for seed in range(SEEDS):
            yield {
                "weights": "trained by Adam",
                **how,
                "seed": seed,
                **tails(weights, codes, seed),
                "before": before[seed],
                "after": after[seed],
                "tuned": tuned[seed],
            }


def coded(weights: optax.Params) -> Iterator[tuple[dict[str, str], optax.Params]]:
    """Yields weights in every format, with every kind of scale, and how.

    Args:
      weights: with a leading axis of seeds; so have the codes.
    """
    for name, fmt in FORMATS.items():
        for scale, options in SCALES.items():
            quantize = partial(madax.quantize_params, format=fmt, **options)
            how = {"format": name, "grid": repr(fmt), "scale": scale}
            yield how, jax.vmap(quantize)(weights)


def train(
    workload: Workload,
    tx: optax.GradientTransformation,
    params: optax.Params,
    budget: Budget,
) -> optax.Params:
    """Returns the parameters, codes or not, after training, all seeds at once.

    Args:
      workload: what to train.
      tx: optimizer.
      params: where to start, with a leading axis of seeds.
      budget: how long.
    """
    orders = [data_order(seed, len(workload), budget)[0] for seed in range(SEEDS)]

    def step(carry, indices):
        params, state = carry
        batch = workload.batch(workload.train, indices, jax.random.key(0))
        grads = jax.grad(workload.loss)(madax.dequantize_params(params), batch)
        return apply(tx, params, state, grads), None

    def run(params, order):
        return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]

    return jax.jit(jax.vmap(run))(params, np.stack(orders))


def scores(workload: Workload, params: optax.Params) -> list[dict[str, float]]:
    """Returns the accuracy and the loss on held-out data, a seed each."""

    @jax.jit
    @jax.vmap
    def score(weights):
        loss = workload.loss(weights, workload.test)
        return {**workload.metric(weights, workload.test), "loss": loss}

    found = score(madax.dequantize_params(params))
    return [{k: float(x[seed]) for k, x in found.items()} for seed in range(SEEDS)]


def tails(weights: optax.Params, codes: optax.Params, seed: int) -> dict[str, float]:
    """Returns how far weights are from their codes, and how heavy their tails are.

    Args:
      weights: as floats, with a leading axis of seeds.
      codes: the same as codes, some of them.
      seed: which.
    """
    pairs = [
        (np.float64(w[seed]), np.float64(q[seed]))
        for w, q in zip(
            jax.tree.leaves(weights),
            jax.tree.leaves(madax.dequantize_params(codes)),
            strict=True,
        )
        if w.ndim > 2
    ]
    error = sum(np.sum((w - q) ** 2) for w, q in pairs)
    return {
        "relative_error": float(np.sqrt(error / sum(np.sum(w**2) for w, _ in pairs))),
        "largest_over_rms": max(
            float(np.max(np.abs(w)) / np.sqrt(np.mean(w**2))) for w, _ in pairs
        ),
    }


def pretrained_table(runs: pd.DataFrame) -> str:
    """Returns errors and scores in Markdown, medians over seeds.

    Args:
      runs: records, as read.
    """
    rows = []
    for (name, scale), cells in runs.groupby(["format", "scale"], sort=False):
        row = {"format": name, "scale": scale}
        for weights, cell in cells.groupby("weights", sort=False):
            row[f"{weights}: error %"] = f"{100 * cell['relative_error'].median():.2g}"
        network = cells[cells["after"].notna()]
        for when in ("before", "after", "tuned"):
            scores = pd.DataFrame(network[when].tolist()).median()
            row[when] = f"{100 * scores['accuracy']:.1f}, {scores['loss']:.3f}"
        rows.append(row)
    return markdown(rows)


pretrained_report = Report("pretrained", pretrained_table)
