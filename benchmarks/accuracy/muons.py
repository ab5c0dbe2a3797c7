"""Why does Muon on codes win on some tasks, and ``muon_madam`` on others?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import madax
from benchmarks.accuracy.muons_report import (
    AS_IT_IS,
    FACTOR_SEEDS,
    SEEDS,
    muons_report,
)
from benchmarks.accuracy.scale_contenders import (
    MAIN,
    MUON,
    MUON_MADAM,
    MUON_MADAM_8,
    ON_CODES,
    TWIN,
    TWO_BYTES,
    Row,
    next_rate,
    times,
)
from benchmarks.lib import records
from benchmarks.lib.candidates import floored_steps
from benchmarks.lib.contender import Contender, Point
from benchmarks.lib.formats import MOMENTS_8, SYMLOG_8
from benchmarks.lib.optimizers import muon
from benchmarks.lib.profiles import Flags, Task
from benchmarks.lib.steps import Tree
from benchmarks.lib.sweep import Sweep, run_missing, settings
from benchmarks.workloads import Workload

SIX = ("diffusion", "words", "vae", "pinn", "gru", "llama")
RATIOS = (0.3, 3.0)  # Of the rate of other leaves to that of matrices, after 1.
MOST = 9  # Rates to try, while the best is at their end.
Make = Callable[[optax.Schedule], optax.GradientTransformation]


def _row(name: str, rates: tuple[float, ...], **fixed: float | None) -> Row:
    row = MAIN[name]
    return replace(row, make=partial(row.make, **fixed), rates=rates)


_LADDER = (0.005, 0.01, 0.02, 0.04, 0.08)
_MADAMS = (0.0075, 0.015, 0.03, 0.06, 0.12)
_PLAIN = {"beta": 0.95, "weight_decay": 0.0}
ROWS = {
    MUON: _row(MUON, _LADDER, **_PLAIN),
    ON_CODES: _row(ON_CODES, _LADDER, **_PLAIN),
    MUON_MADAM: _row(MUON_MADAM, _MADAMS),
    MUON_MADAM_8: _row(MUON_MADAM_8, _MADAMS),
    TWIN: _row(TWIN, _LADDER, weight_decay=0.0),
    TWO_BYTES: _row(TWO_BYTES, _LADDER, weight_decay=0.0),
}


# --- one factor at a time -------------------------------------------------------------


def labels(params: Tree) -> Tree:
    """Returns "matrix" for the leaves to which ``muon_madam`` gives Muon's direction.

    Args:
      params: tree of floats or codes.
    """
    found = madax.diagnostics.matrices(params).values()
    treedef = jax.tree.structure(
        params, is_leaf=lambda x: isinstance(x, madax.QuantizedArray)
    )
    return treedef.unflatten(["matrix" if axes else "rest" for axes in found])


def mixed(
    rate: optax.Schedule, *, other: float, matrix: Make, rest: Make
) -> optax.GradientTransformation:
    """One optimizer for matrices, another for the rest at a rate in that ratio."""
    rest_rate = times(other, rate)
    return optax.partition({"matrix": matrix(rate), "rest": rest(rest_rate)}, labels)


def _orthogonal() -> optax.GradientTransformation:
    return madax.transforms.scale_by_orthogonal_momentum()


def _muons() -> optax.GradientTransformation:
    """The direction whose root mean square is 1 only if the gradient has full rank."""
    return optax.chain(muon(1.0, consistent_rms=1.0), optax.scale(-1.0))


def _steps(
    direction: Callable[[], optax.GradientTransformation] = _orthogonal,
    **options: float,
) -> Make:
    """The steps of ``muon_madam`` for matrices, in a direction."""

    def make(rate: optax.Schedule) -> optax.GradientTransformation:
        bounded = optax.chain(direction(), optax.clip(10.0))
        return floored_steps(bounded, rate, **options)

    return make


def _same_rms(rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon, whose steps have one root mean square whatever the gradient's rank."""
    return optax.chain(
        _orthogonal(), optax.scale(0.2), optax.scale_by_learning_rate(rate)
    )


_adam = partial(optax.adam, b2=0.99)
_madam = partial(madax.madam, b2=0.99, floor=1.0)


def _of(matrix: Make, rest: Make = _madam) -> Contender:
    return Contender(partial(mixed, matrix=matrix, rest=rest))


def _bounded_muon(rate: optax.Schedule, **options: Any) -> optax.GradientTransformation:
    return optax.chain(ROWS[MUON].make(rate, **options), madax.clip_log_weights())


def _muon_matrices(rate: optax.Schedule) -> optax.GradientTransformation:
    return muon(rate, consistent_rms=0.2)


def _muon_and_madam(
    rate: optax.Schedule, **options: Any
) -> optax.GradientTransformation:
    tx = mixed(rate, matrix=_muon_matrices, rest=_madam, **options)
    return madax.with_quantized_params(tx, moment_format=MOMENTS_8)


def _last_axes(_: str, x: jax.Array) -> madax.transforms.MatrixDimensionNumbers:
    return madax.transforms.MatrixDimensionNumbers(x.ndim - 2, x.ndim - 1)


def _adam_on_codes(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.with_quantized_params(_adam(rate), moment_format=MOMENTS_8)


_native = partial(madax.muon_madam, matrices=_last_axes, moment_format=MOMENTS_8)


# What is changed, by row.
FACTORS: Mapping[str, Mapping[str, Contender]] = {
    MUON: {
        AS_IT_IS: ROWS[MUON],
        "bound as muon_madam's": Contender(_bounded_muon),
        "Madam for the rest": _of(_muon_matrices),
        "rms of 1": _of(_same_rms, _adam),
    },
    ON_CODES: {
        AS_IT_IS: ROWS[ON_CODES],
        "bound of 10": replace(ROWS[ON_CODES], p_scale=10.0),
        "Madam for the rest": Contender(_muon_and_madam, format=SYMLOG_8),
    },
    MUON_MADAM: {
        AS_IT_IS: ROWS[MUON_MADAM],
        "Adam for the rest": _of(_steps(), _adam),
        "steps add": _of(_steps(floor=100)),
        "steps add, no bound, Adam for the rest": _of(
            _steps(floor=100, p_scale=np.inf), _adam
        ),
        "steps add, Adam for the rest": _of(_steps(floor=100), _adam),
        "rms as Muon's": _of(_steps(_muons)),
        "no bound": _row(MUON_MADAM, _MADAMS, p_scale=np.inf),
        "decay 0.1": _row(MUON_MADAM, _MADAMS, weight_decay=0.1),
    },
    MUON_MADAM_8: {
        AS_IT_IS: ROWS[MUON_MADAM_8],
        "Adam for the rest": replace(_of(_native, _adam_on_codes), format=SYMLOG_8),
        "bound of 10": replace(ROWS[MUON_MADAM_8], p_scale=10.0),
    },
    TWO_BYTES: {
        AS_IT_IS: ROWS[TWO_BYTES],
        "no first moment but of matrices": _row(
            TWO_BYTES, _LADDER, weight_decay=0.0, other_b1=None
        ),
    },
}
# The row whose optimizer it has for all leaves but matrices.
OTHER_REST = {
    MUON_MADAM: MUON,
    MUON: MUON_MADAM,
    MUON_MADAM_8: ON_CODES,
    ON_CODES: MUON_MADAM_8,
}


# --- runs -----------------------------------------------------------------------------


def muons(options: Flags, *, factors: tuple[str, ...] = SIX) -> None:
    """Compare Muon and ``muon_madam``, in float32 and in two bytes, on six tasks.

    Each has the same trials from seed 0: five rates, and more while the best is at an
    end; then the best and those beside it, with other rates for other leaves. The
    best of all is judged from nine other seeds. Then one thing is changed at a time,
    at the best rate, half and twice. What the records have is not run again.

    Args:
        options: of all benchmarks; the default of workloads is the six tasks.
        factors: Workloads on which one thing is changed at a time.
    """
    raw = options.folder / "muons.jsonl"
    names = options.workloads or (SIX[:1] if options.profile == "smoke" else SIX)
    tasks = replace(options, workloads=names).tasks()
    benches = [Bench(raw, task, task.make(options.data)) for task in tasks]
    for bench in benches:
        for name, row in ROWS.items():
            bench.run(name, row, [bench.tuned(name, row)], SEEDS)
    for base, changes in FACTORS.items():
        for change, contender in changes.items():
            for name, bench in zip(names, benches, strict=True):
                if name in factors:
                    points = bench.beside(base, change)
                    bench.run(f"{base}: {change}", contender, points, FACTOR_SEEDS)
    print(muons_report(options.folder))


@dataclass(frozen=True)
class Bench:
    """A task, and the records of its runs."""

    raw: Path
    task: Task
    workload: Workload

    def run(
        self,
        name: str,
        contender: Contender,
        points: list[Point],
        seeds: tuple[int, ...],
    ) -> list[float]:
        """Runs what is missing; returns the mean errors of the points."""
        fixed = settings(self.task, self.workload)
        sweep = Sweep(name, contender, points)
        at_once, budget = self.task.at_once, self.task.budget
        run_missing(
            self.raw, fixed, self.workload, sweep, budget, at_once=at_once, seeds=seeds
        )
        own = {"workload": self.workload.name, "optimizer": name, **fixed}
        found = records.find(self.raw, own)
        return [
            _mean([x for x in found if records.has(x, point) and x["seed"] in seeds])
            for point in points
        ]

    def tuned(self, name: str, row: Row) -> Point:
        """Returns the best of the trials of a row; runs those that are missing."""
        rates = list(row.rates)
        while True:
            errors = self.run(name, row, [_point(rate) for rate in rates], (0,))
            losses = dict(zip(rates, errors, strict=True))
            best = min(losses, key=lambda rate: losses[rate])
            if min(rates) < best < max(rates) or len(rates) == MOST:
                break
            rates.append(next_rate(losses))
        rates = sorted(rates)
        at = rates.index(best)
        near = rates[max(at - 1, 0) : at + 2]
        points = [_point(rate, ratio) for rate in near for ratio in RATIOS]
        errors = [losses[best], *self.run(name, row, points, (0,))]
        return [_point(best), *points][int(np.argmin(errors))]

    def beside(self, base: str, change: str) -> list[Point]:
        """Returns a row's best rate, and half and twice; the rest keeps its rate."""
        best = self.tuned(base, ROWS[base])
        rest = best["rate"] * best["other"]
        if "for the rest" in change:
            other = self.tuned(OTHER_REST[base], ROWS[OTHER_REST[base]])
            rest = other["rate"] * other["other"]
        rates = [float(f"{best['rate'] * x:.3g}") for x in (0.5, 1, 2)]
        return [_point(rate, float(f"{rest / rate:.3g}")) for rate in rates]


def _point(rate: float, other: float = 1.0) -> Point:
    return {"rate": rate, "other": other, "schedule": "cosine"}


def _mean(runs: list[records.Record]) -> float:
    """Returns the mean error, infinite if one diverged."""
    errors = [run["error"] for run in runs]
    return float("inf") if None in errors else float(np.mean(errors))
