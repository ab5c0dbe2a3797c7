"""Score against depth: how deep a plain MLP each optimizer can train."""

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib.analysis import DEPTH, edges_text, medians
from benchmarks.lib.contender import grid, points
from benchmarks.lib.optimizers import UNTUNED
from benchmarks.lib.profiles import Flags
from benchmarks.lib.style import STYLES, Report, legend, markdown
from benchmarks.lib.sweep import Sweep, run_all
from benchmarks.workloads import PSNR

NAMES = ("sgd momentum", "adam", "madam", "madam floor b1")


def depth(options: Flags) -> None:
    """Train MLPs of up to 75 layers to paint a photograph, at five rates each.

    The rates are a decade apart, around the default rate, with a cosine to zero.
    """
    sweeps = [
        Sweep(name, UNTUNED[name], points(grid(UNTUNED[name].rate, steps=1, below=2)))
        for name in NAMES
    ]
    run_all(options.raw, options, options.depths(), sweeps)
    print(depth_report(options.folder))


def depth_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns medians over seeds of the PSNR in dB, for every depth and rate.

    Args:
      runs: records, as read.
    """
    runs = runs[runs["workload"].str.startswith(DEPTH)]
    if runs.empty:
        return runs
    depths = runs["workload"].str.removeprefix(DEPTH).astype(int)
    runs = runs.assign(depth=depths)
    keys = ["depth", "optimizer", "rate"]
    # A diverged run counts as 0 dB: wrong by the whole range of colours.
    cells = medians(runs, keys, of=PSNR.name, diverged=0.0)
    trained = medians(runs, keys, of=f"{PSNR.name}, trained pixels", diverged=0.0)
    return cells.assign(trained=trained["median"])


def depth_table(cells: pd.DataFrame) -> str:
    """Returns the best PSNR of each optimizer at each depth, in Markdown.

    Args:
      cells: of ``depth_cells``.
    """
    rows, edges = [], []
    for (layers, optimizer), line in cells.groupby(["depth", "optimizer"], sort=False):
        best = line.loc[line["median"].idxmax()]
        rows.append(
            {
                "depth": f"{layers}",
                "optimizer": optimizer,
                "PSNR, held-out pixels": f"{best['median']:.2f}",
                "min to max": f"{best['min']:.2f} to {best['max']:.2f}",
                "PSNR, trained pixels": f"{best['trained']:.2f}",
                "rate": f"{best['rate']:g}",
                "diverged, all rates": f"{line['diverged'].sum()} of "
                f"{line['seeds'].sum()}",
            }
        )
        if best["rate"] in (line["rate"].min(), line["rate"].max()):
            edges.append(f"depth {layers}, {optimizer}: {best['rate']:g}")
    return (
        "\n\n".join(
            [
                "The best of five rates by the median over seeds, in dB:",
                markdown(rows),
                edges_text(edges),
            ]
        )
        + "\n"
    )


def depth_figure(cells: pd.DataFrame) -> Figure:
    """Draws the best PSNR against depth, with bars over the seeds.

    Args:
      cells: of ``depth_cells``.
    """
    fig = Figure(figsize=(6, 4.5), layout="constrained")
    axes = fig.subplots()
    best = cells.loc[cells.groupby(["depth", "optimizer"])["median"].idxmax()]
    for name, style in zip(NAMES, cycle(STYLES)):
        line = best[best["optimizer"] == name].sort_values("depth")
        spread = (line["median"] - line["min"], line["max"] - line["median"])
        axes.errorbar(
            line["depth"], line["median"], spread, label=name, capsize=3, **style
        )
    axes.set(
        xlabel="layers",
        ylabel="PSNR of held-out pixels, dB",
        title="Each at its best of five rates",
        xticks=cells["depth"].unique(),
    )
    axes.grid(alpha=0.3)
    legend(fig, columns=4)
    return fig


depth_report = Report(
    "depth", depth_table, depth_figure, source="runs", cells=depth_cells
)
