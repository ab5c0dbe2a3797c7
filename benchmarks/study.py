"""Which Madam? Compositions of it, each at one setting on all workloads."""

from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro

import madax
from benchmarks import records
from benchmarks.analysis import (
    REGRET,
    best_errors,
    markdown,
    medians,
    ratios,
    regrets,
)
from benchmarks.analysis import workloads as of_workloads
from benchmarks.optimizers import FORMATS, Optimizer, Point, stored
from benchmarks.profiles import Options
from benchmarks.sweep import Sweep, run_all

# b1 = 0 is the paper's, without first moment.
SETTING = ["rate", "b1", "floor", "p_scale"]
STUDY = {
    "madam study": Optimizer(madax.madam, 0.01),
    "native symlog 16 study": stored("madam", FORMATS["symlog 16"]),
}


def study(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Compare compositions of Madam, each at one setting on every workload.

    Floors of 0, 0.3 and 1, with and without a first moment, bounds of 1, 3 and 10,
    at rates of 0.01, 0.02 and 0.03; and the smooth floor of 16-bit symlog codes.
    """
    run_all(options, options.tasks(), sweeps(options))
    study_report(options.folder)


def sweeps(options: Options) -> list[Sweep]:
    """Returns the compositions of Madam."""
    rates = (0.01,) if options.profile == "smoke" else (0.01, 0.02, 0.03)

    def points(floors, p_scales) -> list[Point]:
        return [
            dict(zip(SETTING, values, strict=True)) | {"schedule": "cosine"}
            for values in product(rates, (0.0, 0.9), floors, p_scales)
        ]

    floats, native = STUDY
    return [
        Sweep(floats, STUDY[floats], points((0.0, 0.3, 1.0), (1.0, 3.0, 10.0))),
        # Codes have the floor in the format, and the bound in the scale.
        Sweep(native, STUDY[native], points((0.0,), (3.0,))),
    ]


def study_report(folder: Path) -> None:
    """Writes study.md from the records alone."""
    runs = of_workloads(records.read(folder / "runs.jsonl"))
    if not runs["optimizer"].isin(STUDY).any():
        return
    text = study_table(runs[runs["optimizer"].isin(STUDY)], best_errors(runs))
    (folder / "study.md").write_text(text, encoding="utf-8")
    print(text)


def study_table(runs: pd.DataFrame, best: pd.Series) -> str:
    """Returns regrets of the compositions of Madam, in Markdown.

    Args:
      runs: records of the study.
      best: least error on each workload.
    """
    cells = medians(runs, ["optimizer", *SETTING])
    cells = cells.assign(ratio=ratios(cells, best))
    rows = [
        {
            "weights": "float32" if row["optimizer"] == "madam study" else "symlog 16",
            **{name: f"{row[name]:g}" for name in SETTING},
            "mean regret": f"{100 * row['mean']:.0f} %",
            "worst": f"{100 * row['worst']:.0f} %",
            "on": row["where"],
        }
        for row in regrets(cells, ["optimizer", *SETTING]).to_dict("records")
    ]
    effects = [
        {
            "setting": name,
            "value": f"{value:g}",
            "mean regret": f"{100 * (np.exp(np.log(group['ratio']).mean()) - 1):.0f} %",
        }
        for name in SETTING
        for value, group in cells[cells["optimizer"] == "madam study"].groupby(name)
    ]
    return (
        f"{REGRET}\n\n{markdown(rows)}\n\nThe mean regret of all float32 rows with one "
        f"value of a setting:\n\n{markdown(effects)}\n"
    )
