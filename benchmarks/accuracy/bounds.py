"""What the bound on weights does: on all leaves, on matrices alone, on none."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
import tyro

import madax
from benchmarks.accuracy.state import EIGHT, quantize
from benchmarks.lib.analysis import change, medians, number, spread
from benchmarks.lib.optimizers import Optimizer, cosine
from benchmarks.lib.profiles import TASKS, Options
from benchmarks.lib.style import markdown, report
from benchmarks.lib.sweep import Sweep, run_all

RATES = (0.01, 0.03)


class Row(NamedTuple):
    """What is bounded.

    Attributes:
      make: schedule to the transformation.
      against: the row it is compared with; None for the first of its kind.
      codes: whether matrices are stored in 8 bits.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    against: str | None = None
    codes: bool = False

    @property
    def optimizer(self) -> Optimizer:
        """The row as the training loop takes it."""
        if not self.codes:
            return Optimizer(self.make, RATES[-1])
        return Optimizer(self.make, RATES[-1], quantize)


def _vectors_bounded(rate: optax.Schedule) -> optax.GradientTransformation:
    """Vectors at three times their first root mean square, too, as in madax 0.2."""

    def labels(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)

    floored = partial(madax.muon_madam, rate, floor=1.0)
    both: dict[Any, Any] = {"matrix": floored(), "vector": floored(p_scale=3.0)}
    return optax.partition(both, labels)


ROWS = {
    "all bounded": Row(_vectors_bounded),
    "matrices bounded": Row(
        lambda rate: madax.muon_madam(rate, floor=1.0), "all bounded"
    ),
    "none bounded": Row(
        lambda rate: madax.muon_madam(rate, floor=1.0, p_scale=float("inf")),
        "all bounded",
    ),
    "8 bits, all bounded": Row(
        lambda rate: madax.muon_madam(rate, p_scale=3.0, moment_format=EIGHT),
        codes=True,
    ),
    "8 bits, matrices bounded": Row(
        lambda rate: madax.muon_madam(rate, moment_format=EIGHT),
        "8 bits, all bounded",
        codes=True,
    ),
}


def bounds(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Compare bounds on all weights, on matrices alone, and on none.

    `muon_madam` in floats and on codes of 8 bits, whose range is their bound, at two
    rates on every workload, with the same seeds.
    """
    sweeps = [Sweep(name, row.optimizer, cosine(RATES)) for name, row in ROWS.items()]
    tasks = options.tasks(list(TASKS[options.profile]))
    run_all(options.folder / "bounds.jsonl", options, tasks, sweeps)
    bounds_report(options.folder)


def bounds_report(folder: Path) -> None:
    """Writes bounds.md from the records alone."""
    print(report(folder, "bounds", bounds_table))


def bounds_table(runs: pd.DataFrame) -> str:
    """Returns median errors of each row, and what lifting a bound does, in Markdown.

    Args:
      runs: records, as read.
    """
    cells = medians(runs, ["optimizer", "rate"])
    found = {
        (cell["workload"], cell["rate"], cell["optimizer"]): cell
        for _, cell in cells.iterrows()
    }
    lines = []
    for workload, rate in dict.fromkeys(key[:2] for key in found):
        line = {"workload": workload, "rate": number(rate)}
        for name, row in ROWS.items():
            cell = found.get((workload, rate, name))
            base = found.get((workload, rate, row.against))
            if cell is None:
                continue
            finite = base is not None and np.isfinite(cell["median"])
            line[name] = change(cell, base) if finite else spread(cell)
        lines.append(line)
    return markdown(lines)
