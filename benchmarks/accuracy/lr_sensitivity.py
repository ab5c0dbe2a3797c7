"""Error against the learning rate: the Madam paper's Figure 1, on more workloads."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.analysis import edges_text, medians, ratios, regrets, spread
from benchmarks.lib.analysis import workloads as of_workloads
from benchmarks.lib.contender import Schedule, grid, points
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.profiles import Flags
from benchmarks.lib.style import STYLES, WIDTH, Report, legend, markdown
from benchmarks.lib.sweep import Sweep, run_all

SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")

# The paper's own numbers, from the notebook beside its code (make-plots/plot.ipynb of
# jxbz/madam): accuracy in percent, and for the GAN and Wikitext what is an error.
PAPER_RATES = (1.0, 0.1, 0.01, 0.001, 0.0001)
PAPER = {
    "madam": {
        "CIFAR-10": (20.24, 79.98, 90.46, 83.51, 71.89),
        "CIFAR-100": (10, 67.22, 69.88, 47.72, 19.57),
        "ImageNet": (0.1, 4.5, 56.83, 54.59, 19.69),
        "GAN, FID": (255.7, 115.8, 29.16, 39.28, 83.74),
        "Wikitext-2, perplexity": (3791, 367.6, 214.3, 267.6, 552.2),
    },
    "sgd momentum": {
        "CIFAR-10": (87.82, 92.58, 91.64, 86.79, 78.38),
        "CIFAR-100": (59.58, 70.01, 67.22, 58.81, 36.12),
        "ImageNet": (39.95, 60.88, 47.1, 29.70, 3.8),
        "GAN, FID": (678.7, 380.2, 41.8, 54.95, 109.8),
        "Wikitext-2, perplexity": (204.4, 374.9, 792.3, 2005, 16328),
    },
    "adam": {
        "CIFAR-10": (10, 91.36, 92.19, 93.28, 89.73),
        "CIFAR-100": (1, 61.18, 61.2, 70.47, 62.84),
        "ImageNet": (0.1, 49.9, 67.4, 67.6, 63.2),
        "GAN, FID": (496.1, 496.2, 300, 106.8, 26.79),
        "Wikitext-2, perplexity": (100000, 25519, 1526, 258, 199.7),
    },
}


def lr_sensitivity(options: Flags) -> None:
    """Sweep the learning rate of SGD, Adam and Madam on every workload.

    Eleven rates each, half a decade apart, from three decades below the default rate to
    two above, at a constant rate and with a cosine to zero; the same seeds for all.
    """
    run_all(options.raw, options, options.tasks(), sweeps())
    print(lr_sensitivity_report(options.folder))


def sweeps() -> list[Sweep]:
    """Returns what to run on every workload."""
    return [
        Sweep(name, row, points(grid(row.rate), SCHEDULES))
        for name, row in OPTIMIZERS.items()
    ]


def rate_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns medians over seeds for every rate of the swept optimizers.

    Args:
      runs: records, as read.

    Returns:
      As ``medians``, with ``ratio`` to the best of all swept on the workload.
    """
    runs = of_workloads(runs)
    rates = {name: grid(row.rate) for name, row in OPTIMIZERS.items()}
    swept = [
        rate in rates.get(name, ())
        for name, rate in zip(runs["optimizer"], runs["rate"], strict=True)
    ]
    cells = medians(runs[swept], ["optimizer", "schedule", "rate"])
    best = cells.groupby("workload")["median"].min()
    return cells.assign(ratio=ratios(cells, best))


def lr_sensitivity_table(cells: pd.DataFrame) -> str:
    """Returns best rates, how often each decade is best, and what one rate costs.

    Args:
      cells: of ``rate_cells``.
    """
    rows, edges = best_rates(cells)
    lines = list(cells.groupby(["optimizer", "schedule"]))
    parts = [
        "Error at the best rate, the median of the seeds, with the least and the "
        "greatest:",
        markdown(rows),
        "The best decade of the rate (0.001, 0.01, 0.1, ...):",
        markdown([_decades(*line) for line in lines]),
        "The best single rate for all workloads, and how much larger errors are than "
        "at each one's own best rate (geometric mean, and the worst):",
        markdown([_single_rate(*line) for line in lines]),
        edges_text(edges),
    ]
    return "\n\n".join(parts) + "\n"


def best_rates(cells: pd.DataFrame) -> tuple[list[dict[str, str]], list[str]]:
    """Returns a row for each workload, and the best rates on the edge of the grid.

    Args:
      cells: of ``rate_cells``.
    """
    rows, edges = [], []
    for workload, here in cells.groupby("workload", sort=False):
        row = {"workload": workload}
        for (optimizer, schedule), line in here.groupby(["optimizer", "schedule"]):
            best = line.sort_values("median").iloc[0]
            row[f"{optimizer}, {schedule}"] = f"{spread(best)} at {best['rate']:g}"
            if best["rate"] in (line["rate"].min(), line["rate"].max()):
                edges.append(f"{workload}, {optimizer}, {schedule}: {best['rate']:g}")
        rows.append(row)
    return rows, edges


def _decades(key: tuple[str, str], line: pd.DataFrame) -> dict[str, str]:
    """Returns on how many workloads each decade is best, for a row of the table."""
    where = best_decades(line)
    common = where.mode()[0]
    counts = where.value_counts().sort_index()
    return {
        **dict(zip(("optimizer", "schedule"), key, strict=True)),
        "most common best decade": f"{common:g}",
        "on": f"{(where == common).sum()} of {len(where)} workloads",
        "0.01 on": f"{np.isclose(where, 0.01).sum()} of {len(where)}",
        "all": ", ".join(f"{rate:g} on {n}" for rate, n in counts.items()),
    }


def _single_rate(key: tuple[str, str], line: pd.DataFrame) -> dict[str, str]:
    """Returns what the best single rate costs, for a row of the table."""
    own = line.assign(ratio=ratios(line, line.groupby("workload")["median"].min()))
    first = regrets(own, ["rate"])
    # A rate counts only if it was run on all workloads.
    first = first[first["workloads"] == first["workloads"].max()].iloc[0]
    return {
        **dict(zip(("optimizer", "schedule"), key, strict=True)),
        "rate": f"{first['rate']:g}",
        "mean": f"{100 * first['mean']:.1f} %",
        "worst": f"{100 * first['worst']:.1f} %",
        "on": first["where"],
    }


def best_decades(line: pd.DataFrame) -> pd.Series:
    """Returns the best power of ten of the rate on each workload.

    Args:
      line: cells of one optimizer and schedule.
    """
    exponent = np.log10(line["rate"])
    line = line[np.isclose(exponent, exponent.round())]
    best = line.groupby("workload", sort=False)["median"].idxmin()
    return line.loc[best].set_index("workload")["rate"]


def paper_cells() -> pd.DataFrame:
    """Returns the paper's numbers in the form of ``rate_cells``."""
    cells = pd.DataFrame(
        {
            "workload": task,
            "optimizer": optimizer,
            "schedule": "paper",
            "rate": rate,
            "median": score if "," in task else 100 - score,
        }
        for optimizer, tasks in PAPER.items()
        for task, scores in tasks.items()
        for rate, score in zip(PAPER_RATES, scores, strict=True)
    )
    best = cells.groupby("workload")["median"].min()
    return cells.assign(ratio=ratios(cells, best))


def lr_sensitivity_figure(cells: pd.DataFrame) -> Figure:
    """Draws the best error over the error against the rate.

    A column for each optimizer; a row for each schedule and one for the paper.

    Args:
      cells: of ``rate_cells``.
    """
    rows = {
        "constant": "here, constant rate",
        "cosine": "here, cosine to zero",
        "paper": "the paper's tasks",
    }
    fig = Figure(figsize=(WIDTH, 8.5), layout="constrained")
    panels = fig.subplots(3, 3, sharex="col", sharey=True)
    everything = pd.concat([cells, paper_cells()])
    for across, (schedule, title) in zip(panels, rows.items(), strict=True):
        for axes, optimizer in zip(across, OPTIMIZERS, strict=True):
            chosen = everything["schedule"].eq(schedule)
            chosen &= everything["optimizer"].eq(optimizer)
            _draw_lines(axes, everything[chosen])
            axes.axvline(OPTIMIZERS[optimizer].rate, c="0.8", lw=5, zorder=0)
            axes.set(xscale="log", ylim=(0, 1.05))
            axes.grid(alpha=0.3)
            if schedule == "constant":
                axes.set_title(optimizer)
            if schedule == "paper":
                axes.set_xlabel("rate (grey: default)")
        across[0].set_ylabel(f"{title}\nbest error / error")
    legend(fig, panels[0], columns=4, loc="outside upper center")
    legend(fig, panels[2], columns=3)
    return fig


def _draw_lines(axes: Axes, cells: pd.DataFrame) -> None:
    """Draws a line for each workload, with the spread over seeds."""
    for i, (name, line) in enumerate(cells.groupby("workload", sort=False)):
        line = line.sort_values("rate")
        height = 1 / line["ratio"]
        # Bars go from the worst seed to the best; the paper has one seed each.
        ends = height * (line["median"] / line[["max", "min"]].T)
        axes.errorbar(
            line["rate"],
            height,
            (ends - height).abs().fillna(0),
            label=name,
            markersize=4,
            lw=1.2,
            elinewidth=0.6,
            **STYLES[i % len(STYLES)],
        )


lr_sensitivity_report = Report(
    "lr-sensitivity",
    lr_sensitivity_table,
    lr_sensitivity_figure,
    source="runs",
    cells=rate_cells,
)
