"""The demo: Madam beside Adam and SGD, in a minute or two on a laptop."""

import dataclasses
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import records
from benchmarks.lib.contender import points
from benchmarks.lib.cost import cost
from benchmarks.lib.optimizers import DEMO
from benchmarks.lib.style import STYLES, WIDTH, Report, legend, markdown
from benchmarks.lib.train import Budget, train
from benchmarks.workloads.digits import digits

MULTIPLIERS = (0.1, 1.0, 10.0)
SMOKE = Budget(steps=80, evaluations=4, seeds=3)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def demo(out: Path = Path("benchmarks/results/demo"), *, smoke: bool = False) -> None:
    """Compare the optimizers on small images of digits, on a CPU in a minute or two.

    Every optimizer runs at its default learning rate, and at a tenth and ten times of
    it, with the same seeds. Prints a table; writes a figure and the records of all
    runs, and replace the records of the last demo.

    Args:
        out: Folder for demo.png and demo.jsonl.
        smoke: Take seconds: too few steps to judge by, enough to see that it works.
    """
    budget = SMOKE if smoke else Budget()
    raw = records.file(out, "demo", fresh=True)

    workload = digits()
    for name, contender in DEMO.items():
        measured = cost(workload, contender)
        rates = [contender.rate * multiplier for multiplier in MULTIPLIERS]
        for run in train(workload, contender, points(rates), budget, label=name):
            settings = dataclasses.asdict(budget) | {"schedule": "cosine to zero"}
            fixed = {"workload": workload.name, "optimizer": name, "settings": settings}
            place = {"multiplier": MULTIPLIERS[rates.index(run["rate"])]}
            records.append(raw, fixed | place | run | measured)

    print(f"\n{demo_report(out)}\n")
    print(f"Test accuracy, the median of {budget.seeds} seeds.")
    print(f"Figure:  {out / 'demo.png'}\nRecords: {raw}")


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarises the seeds of each optimizer and rate; diverged runs count as run.

    Args:
      runs: records, as read.

    Returns:
      One row for each ``optimizer`` and ``multiplier`` of its default rate.
    """
    return runs.groupby(["optimizer", "multiplier"], sort=False, as_index=False).agg(
        rate=("rate", "first"),
        median=("accuracy", "median"),
        min=("accuracy", "min"),
        max=("accuracy", "max"),
        diverged=("diverged", "sum"),
        seeds=("seed", "count"),
        step_us=("step_us", "first"),
        bytes_per_weight=("bytes_per_weight", "first"),
    )


def demo_table(runs: pd.DataFrame) -> str:
    """Returns the comparison in Markdown, accuracies in percent."""
    rows = []
    for name, cells in summary(runs).groupby("optimizer", sort=False):
        at = {cell["multiplier"]: cell for cell in cells.to_dict("records")}
        low, high = 100 * at[1]["min"], 100 * at[1]["max"]
        rows.append(
            {
                "optimizer": name,
                "rate": f"{at[1]['rate']:g}",
                "accuracy %": _accuracy(at[1]),
                "min to max": f"{low:.1f} to {high:.1f}",
                "at rate / 10": _accuracy(at[0.1]),
                "at rate * 10": _accuracy(at[10]),
                "µs / step": f"{at[1]['step_us']:.0f}",
                "bytes / weight": f"{at[1]['bytes_per_weight']:.2f}",
            }
        )
    return markdown(rows, numbers=True)


def demo_figure(runs: pd.DataFrame) -> Figure:
    """Draws accuracy over steps, and over learning rates."""
    fig = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    over_steps, over_rates = fig.subplots(1, 2)
    cells = summary(runs)
    names = cells["optimizer"].unique()
    for i, (name, style) in enumerate(zip(names, cycle(STYLES))):
        _draw_curves(over_steps, runs[runs["optimizer"] == name], style)
        # The points stand side by side, since many medians are the same.
        dodge = 1.08 ** (i - (len(names) - 1) / 2)
        _draw_rates(over_rates, cells[cells["optimizer"] == name], dodge, style)
    over_steps.set(title="At the default learning rate", xlabel="step")
    over_rates.set(
        title="Sensitivity to the learning rate",
        xlabel="learning rate / default",
        xscale="log",
        xticks=cells["multiplier"].unique(),
    )
    over_rates.xaxis.set_major_formatter("{x:g}")
    over_rates.minorticks_off()
    for axes in (over_steps, over_rates):
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
    legend(fig)
    return fig


def _accuracy(cell: dict) -> str:
    bad, seeds = cell["diverged"], cell["seeds"]
    mark = f" ({bad} of {seeds} diverged)" if bad else ""
    return f"{100 * cell['median']:.1f}{mark}"


def _draw_curves(axes: Axes, runs: pd.DataFrame, style: dict) -> None:
    """Draws the median over seeds, in a band from the least to the greatest."""
    curves = runs.loc[runs["multiplier"] == 1, "curve"]
    steps = curves.iloc[0]["step"]
    accuracy = 100 * np.array([curve["accuracy"] for curve in curves], float)
    axes.plot(steps, np.median(accuracy, 0), markevery=4, markersize=5, **style)
    axes.fill_between(
        steps, accuracy.min(0), accuracy.max(0), color=style["color"], alpha=0.15, lw=0
    )


def _draw_rates(axes: Axes, cells: pd.DataFrame, dodge: float, style: dict) -> None:
    """Draws the median over seeds, with bars from the least to the greatest."""
    cells = cells.sort_values("multiplier")
    low, mid, high = (100 * cells[name].to_numpy() for name in ("min", "median", "max"))
    x, spread = dodge * cells["multiplier"].to_numpy(), (mid - low, high - mid)
    name = cells["optimizer"].iloc[0]
    axes.errorbar(x, mid, spread, capsize=3, markersize=5, label=name, **style)
    bad = (cells["diverged"] > 0).to_numpy()
    if bad.any():
        axes.plot(
            x[bad], mid[bad], "kx", markersize=11, label="some or all seeds diverged"
        )


demo_report = Report("demo", demo_table, demo_figure)
