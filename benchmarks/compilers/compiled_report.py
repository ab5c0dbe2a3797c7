"""The table and the figure of what was compiled, from its records alone."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.lib.optimizers import BASELINE
from benchmarks.lib.records import Record
from benchmarks.lib.style import STYLES, WIDTH, Report, legend, markdown

CAPTION = "compiled for, not run"
# In the order of the figure, a colour and a marker each.
CHIPS = ("TPU v5e", "H100", "CPU", "TPU v5p", "TPU v6e", "H200", "B200")


def compiled_table(runs: pd.DataFrame) -> str:
    """Returns a Markdown table per chip and tree, from the records alone."""
    sections = [
        "All of this is what XLA's compilers say of programs compiled for chips that "
        f"were not there: {CAPTION}. Kernels: of one step, loops unrolled. Bytes: what "
        "kernels take from main memory and give back; the floor is all parameters, "
        "state and gradients read, parameters and state written. Operations: on "
        "elements, no matrix products, roots, exponentials or logarithms; unknown "
        "where Pallas or a library makes kernels. Cycles: a TPU's, as its compiler "
        "estimates. Compiling: CPU seconds of lowering and compiling, which vary by a "
        "fifth. Peak: arguments, temporaries and results, donated. "
        "Ratios are to optax.adam.\n"
    ]
    for (chip, tree), group in runs.groupby(["chip", "tree"], sort=False):
        title = f"**{chip}, {tree}** ({CAPTION}, by {group['compiler'].iloc[-1]})"
        sections.append(title + _section(tree, group))
    return "\n".join(sections)


def _section(tree: str, group: pd.DataFrame) -> str:
    """What was compiled for a chip and a tree, what failed and why."""
    good, failed = group[group["parameters"].notna()], group[group["parameters"].isna()]
    rows, errors = good.to_dict("records"), failed.to_dict("records")
    text = ".\n"
    if rows:
        first = next((r for r in rows if r["optimizer"] == BASELINE), None)
        text = f": {rows[0]['parameters'] / 1e6:.1f} M parameters"
        text += f" in {rows[0]['leaves']:.0f} leaves"
        if first is not None:
            text += f"; optax.adam takes {first['cpu_s']:.1f} s to compile"
            text += f", and {first['peak'] / 1e6:.0f} MB"
        table = [_row(run, first, "train" not in tree) for run in rows]
        dashes = dict.fromkeys(table[0], "-")
        table += [dashes | {"optimizer": run["optimizer"]} for run in errors]
        text += f".\n\n{markdown(table, numbers=True)}\n"
    for run in errors:
        text += f"\n{run['optimizer']} failed: {run['error'].splitlines()[0][:160]}\n"
    return text


def _row(run: Record, adam: Record | None, is_step: bool) -> dict[str, str]:
    def ratio(name: str) -> str:
        return "-" if adam is None else f"{run[name] / adam[name]:.2f}"

    n = run["parameters"]
    row = {"optimizer": run["optimizer"], "kernels": f"{run['kernels']:.0f}"}
    if is_step:
        row["bytes / parameter"] = f"{run['bytes'] / n:.2f}"
        row["floor"] = f"{run['floor'] / n:.2f}"
        operations = "-" if run["foreign"] else f"{run['operations'] / n:.1f}"
        row["operations / parameter"] = operations
    if run["cycles"]:
        row["cycles / adam"] = ratio("cycles")
    row["StableHLO"] = f"{run['stablehlo']:.0f}"
    row["lowering s"] = f"{run['lowering_s']:.2f}"
    row["compile s"] = f"{run['compile_s']:.2f}"
    row["compiling / adam"] = ratio("cpu_s")
    row["peak / adam"] = ratio("peak")
    return row


def compiled_figure(runs: pd.DataFrame) -> Figure:
    """Draws bytes, operations, cycles and compile time, one panel each."""
    alone = runs[runs["parameters"].notna() & ~runs["tree"].str.contains("train")]
    names = list(dict.fromkeys(alone["optimizer"]))
    fig = Figure(figsize=(WIDTH, 2 + 0.44 * len(names)), layout="constrained")
    panels = fig.subplots(2, 2, sharey=True).flat
    four = alone[alone["tree"] == "4 leaves"]
    whole = alone[alone["leaves"] == alone["leaves"].max()]
    ours = four[four["foreign"] == 0]
    tpus = four[four["cycles"] > 0]
    _points(panels[0], names, four, "bytes / parameter", four["bytes"])
    _points(panels[1], names, ours, "operations / parameter", ours["operations"])
    _points(panels[2], names, tpus, "estimated cycles / adam", tpus["cycles"])
    label = f"compiling {whole['leaves'].max():.0f} leaves / adam"
    _points(panels[3], names, whole, label, whole["cpu_s"])
    lines = [names.index(name) for name in four["optimizer"]]
    floor = four["floor"] / four["parameters"]
    panels[0].plot(floor, lines, "k|", ms=14, label="floor", zorder=1)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for axes in panels:
        axes.tick_params(labelsize=8)
    fig.suptitle(f"The optimizer step alone: {CAPTION}", fontsize=11)
    legend(fig, columns=4)
    return fig


def _points(
    axes: Axes, names: Sequence[str], runs: pd.DataFrame, label: str, values: pd.Series
) -> None:
    """Draws a number of every optimizer, a marker a chip.

    Args:
      axes: where.
      names: of optimizers, a line each.
      runs: of one tree.
      label: what it is, ending in what it is divided by: "parameter" or "adam".
      values: of each run, as they were recorded.
    """
    is_ratio = label.endswith("adam")
    for i, (chip, style) in enumerate(zip(CHIPS, cycle(STYLES[1:]))):
        here = runs[runs["chip"] == chip]
        unit = here["parameters"]
        if is_ratio:
            adam = values[here.index[here["optimizer"] == BASELINE]]
            unit = adam.iloc[-1] if len(adam) else np.nan
        lines = [names.index(name) for name in here["optimizer"]]
        if lines:
            # The dots stand beside each other, so that equal ones are seen.
            apart = 0.6 * (i / (len(CHIPS) - 1) - 0.5)
            axes.plot(
                values[here.index] / unit,
                np.add(lines, apart),
                **style | {"linestyle": "", "ms": 4},
                label=chip,
            )
    if is_ratio:
        axes.axvline(1, c="black", ls="--", lw=1)
    axes.set(xlabel=label, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


compiled_report = Report("compiled", compiled_table, compiled_figure)
