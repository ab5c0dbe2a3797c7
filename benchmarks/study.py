"""Which Madam? Compositions of it, each at one setting on all workloads."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro

import madax
from benchmarks import records
from benchmarks.analysis import REGRET, best_errors, medians, ratios, regrets
from benchmarks.analysis import workloads as of_workloads
from benchmarks.optimizers import FORMATS, Optimizer, Point, stored
from benchmarks.profiles import Options
from benchmarks.style import markdown
from benchmarks.sweep import Sweep, run_all

# The paper's, and what else there is to set; a b1 of 0 is no first moment.
BASE: Point = {
    "schedule": "cosine",
    "rate": 0.01,
    "b1": 0.0,
    "floor": 0.0,
    "p_scale": 3.0,
}
SETTING = list(BASE)
FLOAT, BOUND, CODES = "study, float32", "study, share of bound", "study, symlog 16"


class BoundState(NamedTuple):
    """State of ``madam_at_bound``: the descent bound, 0 before the first step."""

    bound: jax.Array
    inner: Any


def madam_at_bound(
    rate: optax.Schedule, **options: Any
) -> optax.GradientTransformation:
    """Madam, its rate a share of the descent bound at the first gradients."""

    def madam(bound: jax.typing.ArrayLike) -> optax.GradientTransformation:
        return madax.madam(lambda count: bound * rate(count), **options)

    def init(params: optax.Params) -> BoundState:
        return BoundState(jnp.zeros(()), madam(0.0).init(params))

    def update(updates, state, params=None):
        matrices = [
            [x for x in jax.tree.leaves(tree) if x.ndim > 1]
            for tree in (params, updates)
        ]
        first = madax.diagnostics.descent_bound(*matrices)
        bound = jnp.where(state.bound > 0, state.bound, first)
        updates, inner = madam(bound).update(updates, state.inner, params)
        return updates, BoundState(bound, inner)

    return optax.GradientTransformation(init, update)


STUDY = {
    FLOAT: Optimizer(madax.madam, 0.01),
    BOUND: Optimizer(madam_at_bound, 0.1),
    CODES: stored("madam", FORMATS["symlog 16"]),
}


def study(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Compare compositions of Madam, each at one setting on every workload.

    Floors of 0, 0.3 and 1, with and without a first moment, at rates of 0.01 to 0.3;
    other bounds on weights, and a constant rate; a rate that is a share of the descent
    bound at init; and the smooth floor of 16-bit symlog codes.
    """
    run_all(options.raw, options, options.tasks(), sweeps(options))
    study_report(options.folder)


def sweeps(options: Options) -> list[Sweep]:
    """Returns the compositions of Madam."""
    few = options.profile == "smoke"

    def points(rates: tuple[float, ...], **others: Any) -> list[Point]:
        """Returns all combinations, with and without a first moment."""
        axes = {"rate": rates[:1] if few else rates, "b1": (0.0, 0.9)} | others
        return [
            {**BASE, **dict(zip(axes, values, strict=True))}
            for values in product(*axes.values())
        ]

    ends = (0.0, 1.0)
    floats = [
        *points((0.01, 0.03, 0.1, 0.3), floor=(0.0, 0.3, 1.0)),
        *points((0.01, 0.03, 0.1), floor=ends, p_scale=(1.0, 10.0)),
        *points((0.01, 0.03), floor=ends, schedule=("constant",)),
    ]
    return [
        Sweep(FLOAT, STUDY[FLOAT], floats),
        Sweep(BOUND, STUDY[BOUND], points((0.1, 0.3, 1.0), floor=ends)),
        # Codes have the floor in the format, and the bound in the scale.
        Sweep(CODES, STUDY[CODES], points((0.01, 0.03, 0.1, 0.3))),
    ]


def study_report(folder: Path) -> None:
    """Writes study.md from the records alone."""
    runs = of_workloads(records.read(folder / "runs.jsonl"))
    mine = runs[runs["optimizer"].isin(STUDY)]
    if mine.empty:
        return
    cells = medians(mine, ["optimizer", *SETTING])
    cells = cells.assign(ratio=ratios(cells, best_errors(runs)))
    text = study_table(cells)
    (folder / "study.md").write_text(text, encoding="utf-8")
    print(text)


def study_table(cells: pd.DataFrame) -> str:
    """Returns regrets of the compositions of Madam, in Markdown.

    Args:
      cells: medians of the study, with ``ratio``.
    """
    rows = [
        {
            "weights": row["optimizer"].removeprefix("study, "),
            **{name: _text(row[name]) for name in SETTING},
            "mean regret": f"{100 * row['mean']:.0f} %",
            "median": f"{100 * row['median']:.0f} %",
            "worst": f"{100 * row['worst']:.0f} %",
            "on": row["where"],
        }
        for row in regrets(cells, ["optimizer", *SETTING]).to_dict("records")
    ]
    return (
        f"{REGRET}\n\n{markdown(rows)}\n\nWhat one change does to the error of float32 "
        "weights, all else the same: the geometric mean over workloads and the other "
        f"settings.\n\n{markdown(effects(cells[cells['optimizer'] == FLOAT]))}\n"
    )


def effects(cells: pd.DataFrame) -> list[dict[str, str]]:
    """Compares each value of each setting with the paper's, in pairs.

    Args:
      cells: of one optimizer, with ``ratio``.
    """
    rows = []
    for name, usual in BASE.items():
        others = ["workload", *(other for other in SETTING if other != name)]
        base = cells[cells[name] == usual]
        for value, group in cells[cells[name] != usual].groupby(name):
            pairs = group.merge(base, on=others, suffixes=("", " before"))
            change = np.exp(np.log(pairs["ratio"] / pairs["ratio before"]).mean()) - 1
            rows.append(
                {
                    "change": f"{name} {_text(usual)} to {_text(value)}",
                    "error": f"{100 * change:+.0f} %",
                    "pairs": f"{len(pairs)}",
                }
            )
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"
