"""Why does Madam lag where it does? One factor at a time."""

import dataclasses
from functools import partial

import optax
import pandas as pd

import madax
from benchmarks.lib import candidates
from benchmarks.lib.analysis import at_best, change, medians, number
from benchmarks.lib.contender import Contender, points
from benchmarks.lib.formats import FORMATS, MOMENTS_8, SYMLOG_8, has_axes
from benchmarks.lib.optimizers import (
    madam_8,
    madam_floor,
    muon_madam_8,
    muon_madam_floor,
)
from benchmarks.lib.profiles import LONG, Flags
from benchmarks.lib.style import Report, markdown
from benchmarks.lib.sweep import Sweep, run_all

BASE = "madam, floor=1"
# Where Madam without a first moment is behind, and the rates to try there.
RATES = {
    "diffusion": (0.01, 0.03, 0.1),
    "gru": (0.01, 0.03, 0.1),
    "autoencoder": (0.01, 0.03, 0.1),
    LONG: (0.01, 0.03),  # Longer runs want smaller ones.
}
# What is worth its time in a longer run.
FEW = (
    BASE,
    "warm-up of a tenth",
    "b1=0.9",
    "b1=0.9, warm-up",
    "b2=0.99",
    "p_scale=10",
    "weight_decay=0.1",
    "direction of Muon",
    "direction of Muon, warm-up",
    "direction of Muon, b1=0.9 for the rest",
    "8 bits, v too",
    "8 bits, v too, direction of Muon",
    "8 bits, v too, direction of Muon, linear_range=0.15",
    "direction of Muon, p_scale=10",
    "8 bits, v too, direction of Muon, p_scale=10",
    "Adam",
    "Adam in 3 bytes",
    "Adam in 3 bytes, p_scale=10",
    "Adam in 3 bytes, p_scale=10, error feedback",
)


_codes = partial(Contender, format=SYMLOG_8)


def _adam(rate: optax.Schedule, b1: float = 0.9) -> optax.GradientTransformation:
    """At a tenth of the rates of Madam."""
    return optax.adam(lambda count: 0.1 * rate(count), b1=b1)


def _adam_in_3_bytes(
    rate: optax.Schedule, *, error_feedback: bool = False
) -> optax.GradientTransformation:
    return madax.with_quantized_params(
        _adam(rate),
        moment_format=MOMENTS_8,
        error_feedback=error_feedback,
        moment_where=has_axes,
    )


def _bounded(rate: optax.Schedule) -> optax.GradientTransformation:
    """Directions of a leaf are of a root mean square of 1 at most, as in Adafactor."""
    direction = optax.chain(
        madax.scale_by_second_moment(), optax.clip_by_block_rms(1.0)
    )
    return candidates.floored_steps(direction, rate)


FACTORS = {
    BASE: Contender(madam_floor),
    "no floor: the paper's rule": Contender(madax.madam),
    "floor=0.3": Contender(partial(madam_floor, floor=0.3)),
    "floor=3": Contender(partial(madam_floor, floor=3.0)),
    "additive steps: Adam with b1=0": Contender(partial(_adam, b1=0.0)),
    "warm-up of a tenth": Contender(madam_floor, schedules=("warm-up",)),
    "constant rate": Contender(madam_floor, schedules=("constant",)),
    "b1=0.9": Contender(partial(madam_floor, b1=0.9)),
    "b1=0.9, warm-up": Contender(partial(madam_floor, b1=0.9), schedules=("warm-up",)),
    "b1=b2=0.95": Contender(partial(madam_floor, b1=0.95, b2=0.95)),
    "b2=0.99": Contender(partial(madam_floor, b2=0.99)),
    "b2=0.95": Contender(partial(madam_floor, b2=0.95)),
    "g_bound=3": Contender(partial(madam_floor, g_bound=3.0)),
    "g_bound=1": Contender(partial(madam_floor, g_bound=1.0)),
    "directions of rms 1 at most": Contender(_bounded),
    "p_scale=1": Contender(partial(madam_floor, p_scale=1.0)),
    "p_scale=10": Contender(partial(madam_floor, p_scale=10.0)),
    "weight_decay=0.1": Contender(partial(madam_floor, weight_decay=0.1)),
    "a trained scale for each matrix": Contender(
        lambda rate: candidates.trained_scales(madam_floor(rate), rate)
    ),
    "a trained scale for each column": Contender(
        lambda rate: candidates.trained_scales(madam_floor(rate), rate, columns=True)
    ),
    "matrices keep their norm": Contender(
        lambda rate: candidates.kept_norms(madam_floor(rate))
    ),
    "an additive step before the multiplicative one": Contender(
        candidates.additive_then_multiplicative
    ),
    **{
        f"gradients at weights with {noise:.0%} of noise": Contender(
            lambda rate, noise=noise: candidates.with_noise(madam_floor(rate), noise),
            evaluated=candidates.without_noise,
        )
        for noise in (0.01, 0.1)
    },
    "direction of Muon": Contender(muon_madam_floor),
    "direction of Muon, b1=0.9 for the rest": Contender(candidates.muon_and_momentum),
    "direction of Muon, warm-up": Contender(muon_madam_floor, schedules=("warm-up",)),
    "symlog codes, 16 bits": Contender(madax.madam, format=FORMATS["symlog 16"]),
    "8 bits": _codes(madax.madam),
    "8 bits, nearest": _codes(partial(madax.madam, rounding="nearest")),
    "8 bits, nearest at the end": _codes(
        partial(candidates.nearest_at_the_end, madax.madam)
    ),
    "8 bits, a scale for each column": _codes(madax.madam, channel_axis=-1),
    "8 bits, v too": _codes(madam_8),
    "8 bits, v too, direction of Muon": _codes(muon_madam_8),
    "8 bits, v too, direction of Muon, linear_range=0.15": Contender(
        muon_madam_8, format=FORMATS["finer symlog 8"]
    ),
    "direction of Muon, p_scale=10": Contender(partial(muon_madam_floor, p_scale=10.0)),
    "8 bits, v too, direction of Muon, p_scale=10": _codes(muon_madam_8, p_scale=10.0),
    "Adam": Contender(_adam),
    "Adam in 3 bytes": _codes(_adam_in_3_bytes),
    "Adam in 3 bytes, p_scale=10": _codes(_adam_in_3_bytes, p_scale=10.0),
    "Adam in 3 bytes, p_scale=10, error feedback": _codes(
        partial(_adam_in_3_bytes, error_feedback=True), p_scale=10.0
    ),
}


def why(options: Flags) -> None:
    """Change one thing at a time in Madam, where it lags.

    On denoising diffusion, a recurrent network, an autoencoder and, some of it, on a
    longer language model: floor, moments, bounds, decay, warm-up, direction, rounding
    and scales, at two or three rates.
    """
    raw = options.folder / "why.jsonl"
    for name in options.workloads or RATES:
        tasks = dataclasses.replace(options, workloads=(name,)).tasks()
        run_all(raw, options, tasks, sweeps(name))
    print(why_report(options.folder))


def sweeps(workload: str) -> list[Sweep]:
    """Returns what to run on a workload."""
    rates = RATES.get(workload, RATES["gru"])
    return [
        Sweep(name, factor, points(rates, factor.schedules))
        for name, factor in FACTORS.items()
        if workload != LONG or name in FEW
    ]


def why_table(runs: pd.DataFrame) -> str:
    """Returns what each factor does to the error at its best rate, in Markdown.

    Args:
      runs: records, as read.
    """
    cells = medians(runs, ["optimizer", "rate"])
    best = at_best(cells).set_index(["optimizer", "workload"])
    rows = []
    for name in FACTORS:
        row = {"what is changed": name}
        for workload in runs["workload"].unique():
            if (name, workload) not in best.index:
                continue
            cell = best.loc[(name, workload)]
            text = change(cell, best.loc[(BASE, workload)], digits=0)
            row[workload] = f"{text} at {number(cell['rate'])}"
        rows.append(row)
    return markdown(rows)


why_report = Report("why", why_table)
