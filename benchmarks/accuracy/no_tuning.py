"""The cost of not tuning: every optimizer at one setting on all workloads."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib.analysis import (
    CAP,
    REGRET,
    best_errors,
    medians,
    number,
    ratios,
    regrets,
)
from benchmarks.lib.analysis import workloads as of_workloads
from benchmarks.lib.contender import points
from benchmarks.lib.optimizers import UNTUNED
from benchmarks.lib.profiles import Flags, Options
from benchmarks.lib.style import STYLES, WIDTH, Report, legend, markdown
from benchmarks.lib.sweep import Sweep, run_all

DRAWN = (
    "sgd momentum",
    "adam",
    "madam",
    "madam floor b1",
    "cocob",
    "muon",
    "prodigy",
    "schedule-free adamw",
)


def no_tuning(options: Flags) -> None:
    """Run every optimizer at its one default setting on every workload.

    Learning-rate-free optimizers run on the schedules that their authors use, all
    others with a cosine to zero. How much larger an error is than the least one in
    the records, whatever the optimizer and the rate, is the regret: so run
    lr-sensitivity before, with the same profile and folder.
    """
    run_all(options.raw, options, options.tasks(), sweeps(options))
    print(no_tuning_report(options.folder))


def sweeps(options: Options) -> list[Sweep]:
    """Returns what to run on every workload."""
    return [
        Sweep(name, row, points(row.rates, row.schedules))
        for name, row in UNTUNED.items()
        if options.profile != "smoke" or name in DRAWN
    ]


def default_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns medians over seeds for every optimizer at its default rate.

    Args:
      runs: records, as read.

    Returns:
      As ``medians``, with ``ratio`` to the least error in all records.
    """
    runs = of_workloads(runs)
    rates = {name: row.rate for name, row in UNTUNED.items()}
    default = runs[runs["rate"] == runs["optimizer"].map(rates)]
    cells = medians(default, ["optimizer", "schedule"])
    return cells.assign(ratio=ratios(cells, best_errors(runs)))


def no_tuning_table(cells: pd.DataFrame) -> str:
    """Returns regrets of optimizers at their defaults, and their errors, in Markdown.

    Args:
      cells: medians at the default rates, with ``ratio``.
    """
    rows = []
    found = regrets(cells, ["optimizer", "schedule"]).sort_values("median")
    for row in found.to_dict("records"):
        here = cells[
            (cells["optimizer"] == row["optimizer"])
            & (cells["schedule"] == row["schedule"])
        ].set_index("workload")
        rows.append(
            {
                "optimizer": row["optimizer"],
                "schedule": row["schedule"],
                "rate": f"{UNTUNED[row['optimizer']].rate:g}",
                "median regret": f"{100 * row['median']:.0f} %",
                "mean": f"{100 * row['mean']:.0f} %",
                "worst": f"{100 * row['worst']:.0f} %",
                "on": row["where"],
                **here["median"].map(number).to_dict(),
                "diverged": f"{here['diverged'].sum()} of {here['seeds'].sum()}",
            }
        )
    table = pd.DataFrame(rows).fillna("")
    return f"{REGRET} To the right, the median errors.\n\n{markdown(table)}\n"


def no_tuning_figure(cells: pd.DataFrame) -> Figure:
    """Draws the share of workloads against how far from the best.

    Args:
      cells: medians at the default rates, with ``ratio``.
    """
    fig = Figure(figsize=(WIDTH, 5), layout="constrained")
    axes = fig.subplots()
    for name, style in zip(DRAWN, cycle(STYLES)):
        lines = cells[
            (cells["optimizer"] == name)
            & (cells["schedule"] == UNTUNED[name].schedules[0])
        ]
        if lines.empty:
            continue
        # What counts as the cap is never reached.
        ratio = np.sort(lines.loc[lines["ratio"] < CAP, "ratio"])
        share = np.arange(len(ratio) + 1) / len(lines)
        axes.step(
            [1, *ratio, CAP],
            [*share, share[-1]],
            where="post",
            label=name,
            markersize=5,
            markevery=slice(1, -1),
            **style,
        )
    axes.set(
        xscale="log",
        xlim=(1, CAP),
        xlabel="error / least error of any optimizer at any rate",
        ylabel="share of workloads",
        title="At one setting, without tuning",
    )
    axes.set_xticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    legend(fig, columns=4)
    return fig


no_tuning_report = Report(
    "no-tuning", no_tuning_table, no_tuning_figure, source="runs", cells=default_cells
)
