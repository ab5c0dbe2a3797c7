"""The effect of the bound on weights: on all leaves, on matrices alone, on none."""

from collections.abc import Hashable
from functools import partial

import jax
import numpy as np
import optax
import pandas as pd

from benchmarks.lib.analysis import change, medians, number, spread
from benchmarks.lib.contender import Contender, points
from benchmarks.lib.formats import SYMLOG_8
from benchmarks.lib.optimizers import muon_madam_8, muon_madam_floor
from benchmarks.lib.profiles import Flags
from benchmarks.lib.style import Report, markdown
from benchmarks.lib.sweep import Sweep, run_all

RATES = (0.01, 0.03)


def _vectors_bounded(rate: optax.Schedule) -> optax.GradientTransformation:
    """Vectors at three times their first root mean square, too, as in madax 0.2."""

    def labels(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)

    bounded = muon_madam_floor(rate, p_scale=3.0)
    both: dict[Hashable, optax.GradientTransformation] = {
        "matrix": muon_madam_floor(rate),
        "vector": bounded,
    }
    return optax.partition(both, labels)


CONTENDERS = {
    "all bounded": Contender(_vectors_bounded),
    "matrices bounded": Contender(muon_madam_floor, against="all bounded"),
    "none bounded": Contender(
        partial(muon_madam_floor, p_scale=float("inf")), against="all bounded"
    ),
    "8 bits, all bounded": Contender(
        partial(muon_madam_8, p_scale=3.0), format=SYMLOG_8
    ),
    "8 bits, matrices bounded": Contender(
        muon_madam_8, format=SYMLOG_8, against="8 bits, all bounded"
    ),
}


def bounds(options: Flags) -> None:
    """Compare bounds on all weights, on matrices alone, and on none.

    `muon_madam` in floats and on codes of 8 bits, whose range is their bound, at two
    rates on every workload, with the same seeds.
    """
    sweeps = [Sweep(name, row, points(RATES)) for name, row in CONTENDERS.items()]
    tasks = options.tasks(every=True)
    run_all(options.folder / "bounds.jsonl", options, tasks, sweeps)
    print(bounds_report(options.folder))


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
        for name, row in CONTENDERS.items():
            cell = found.get((workload, rate, name))
            base = found.get((workload, rate, row.against))
            if cell is None:
                continue
            finite = base is not None and np.isfinite(cell["median"])
            line[name] = change(cell, base) if finite else spread(cell)
        lines.append(line)
    return markdown(lines)


bounds_report = Report("bounds", bounds_table)
