"""Why does Madam lag where it does? One factor at a time."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import optax
import pandas as pd
import tyro

import madax
from benchmarks.accuracy.state import EIGHT, not_a_number
from benchmarks.lib import candidates
from benchmarks.lib.analysis import at_best, change, medians, number
from benchmarks.lib.optimizers import FORMATS, Optimizer, Schedule, as_trained
from benchmarks.lib.profiles import LONG, Options
from benchmarks.lib.style import markdown, report
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


class Factor(NamedTuple):
    """One thing that is not as in the base.

    Attributes:
      make: schedule to the transformation.
      schedule: of the rate.
      format: of codes; None for float32.
      channels: whether each column has a scale of its own.
      p_scale: the bound on codes, as of ``madax.quantize_params``.
      evaluated: parameters and optimizer state to the parameters to be scored.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    schedule: Schedule = "cosine"
    format: str | None = None
    channels: bool = False
    p_scale: float | None = None
    evaluated: Callable[[optax.Params, Any], optax.Params] = as_trained

    def quantize(self, params: optax.Params) -> optax.Params:
        """Makes codes of matrices, if it is a factor of codes."""
        if self.format is None:
            return params
        axis = -1 if self.channels else None
        return madax.quantize_params(
            params, FORMATS[self.format], p_scale=self.p_scale, channel_axis=axis
        )


floored = partial(partial, madax.madam, floor=1.0)
BASE_TX = floored()


def _adam(rate: optax.Schedule, b1: float = 0.9) -> optax.GradientTransformation:
    """At a tenth of the rates of Madam."""
    return optax.adam(lambda count: 0.1 * rate(count), b1=b1)


def _adam_in_3_bytes(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.with_quantized_params(
        _adam(rate), moment_format=EIGHT, moment_where=not_a_number
    )


def _adam_with_feedback(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.with_quantized_params(
        _adam(rate),
        moment_format=EIGHT,
        error_feedback=True,
        moment_where=not_a_number,
    )


def _bounded(rate: optax.Schedule) -> optax.GradientTransformation:
    """Directions of a leaf are of a root mean square of 1 at most, as in Adafactor."""
    direction = optax.chain(
        madax.scale_by_second_moment(), optax.clip_by_block_rms(1.0)
    )
    return candidates.floored_steps(direction, rate)


FACTORS = {
    BASE: Factor(BASE_TX),
    "no floor: the paper's rule": Factor(madax.madam),
    "floor=0.3": Factor(floored(floor=0.3)),
    "floor=3": Factor(floored(floor=3.0)),
    "additive steps: Adam with b1=0": Factor(partial(_adam, b1=0.0)),
    "warm-up of a tenth": Factor(floored(), "warm-up"),
    "constant rate": Factor(floored(), "constant"),
    "b1=0.9": Factor(floored(b1=0.9)),
    "b1=0.9, warm-up": Factor(floored(b1=0.9), "warm-up"),
    "b1=b2=0.95": Factor(floored(b1=0.95, b2=0.95)),
    "b2=0.99": Factor(floored(b2=0.99)),
    "b2=0.95": Factor(floored(b2=0.95)),
    "g_bound=3": Factor(floored(g_bound=3.0)),
    "g_bound=1": Factor(floored(g_bound=1.0)),
    "directions of rms 1 at most": Factor(_bounded),
    "p_scale=1": Factor(floored(p_scale=1.0)),
    "p_scale=10": Factor(floored(p_scale=10.0)),
    "weight_decay=0.1": Factor(floored(weight_decay=0.1)),
    "a trained scale for each matrix": Factor(
        lambda rate: candidates.trained_scales(BASE_TX(rate), rate)
    ),
    "a trained scale for each column": Factor(
        lambda rate: candidates.trained_scales(BASE_TX(rate), rate, columns=True)
    ),
    "matrices keep their norm": Factor(
        lambda rate: candidates.kept_norms(BASE_TX(rate))
    ),
    "an additive step before the multiplicative one": Factor(
        candidates.additive_then_multiplicative
    ),
    **{
        f"gradients at weights with {noise:.0%} of noise": Factor(
            lambda rate, noise=noise: candidates.with_noise(BASE_TX(rate), noise),
            evaluated=candidates.without_noise,
        )
        for noise in (0.01, 0.1)
    },
    "direction of Muon": Factor(partial(madax.muon_madam, floor=1.0)),
    "direction of Muon, b1=0.9 for the rest": Factor(candidates.muon_and_momentum),
    "direction of Muon, warm-up": Factor(
        partial(madax.muon_madam, floor=1.0), "warm-up"
    ),
    "symlog codes, 16 bits": Factor(madax.madam, format="symlog 16"),
    "8 bits": Factor(madax.madam, format="symlog 8"),
    "8 bits, nearest": Factor(
        partial(madax.madam, rounding="nearest"), format="symlog 8"
    ),
    "8 bits, nearest at the end": Factor(
        partial(candidates.nearest_at_the_end, madax.madam), format="symlog 8"
    ),
    "8 bits, a scale for each column": Factor(
        madax.madam, format="symlog 8", channels=True
    ),
    "8 bits, v too": Factor(
        partial(madax.madam, moment_format=EIGHT), format="symlog 8"
    ),
    "8 bits, v too, direction of Muon": Factor(
        partial(madax.muon_madam, moment_format=EIGHT), format="symlog 8"
    ),
    "8 bits, v too, direction of Muon, linear_range=0.15": Factor(
        partial(madax.muon_madam, moment_format=EIGHT), format="finer symlog 8"
    ),
    "direction of Muon, p_scale=10": Factor(
        partial(madax.muon_madam, floor=1.0, p_scale=10.0)
    ),
    "8 bits, v too, direction of Muon, p_scale=10": Factor(
        partial(madax.muon_madam, moment_format=EIGHT), format="symlog 8", p_scale=10.0
    ),
    "Adam": Factor(_adam),
    "Adam in 3 bytes": Factor(_adam_in_3_bytes, format="symlog 8"),
    "Adam in 3 bytes, p_scale=10": Factor(
        _adam_in_3_bytes, format="symlog 8", p_scale=10.0
    ),
    "Adam in 3 bytes, p_scale=10, error feedback": Factor(
        _adam_with_feedback, format="symlog 8", p_scale=10.0
    ),
}


def why(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Change one thing at a time in Madam, where it lags.

    On denoising diffusion, a recurrent network, an autoencoder and, some of it, on a
    longer language model: floor, moments, bounds, decay, warm-up, direction, rounding
    and scales, at two or three rates.
    """
    raw = options.folder / "why.jsonl"
    for name in options.workloads or RATES:
        tasks = dataclasses.replace(options, workloads=(name,)).tasks()
        run_all(raw, options, tasks, sweeps(name))
    why_report(options.folder)


def sweeps(workload: str) -> list[Sweep]:
    """Returns what to run on a workload."""
    rates = RATES.get(workload, RATES["gru"])
    return [
        Sweep(
            name,
            Optimizer(factor.make, rates[1], factor.quantize, factor.evaluated),
            [{"rate": rate, "schedule": factor.schedule} for rate in rates],
        )
        for name, factor in FACTORS.items()
        if workload != LONG or name in FEW
    ]


def why_report(folder: Path) -> None:
    """Writes why.md from the records alone."""
    print(report(folder, "why", why_table))


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
