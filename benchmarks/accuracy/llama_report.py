"""What models in the shape of Llama come to: a table and a figure, from the records."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib.records import Record
from benchmarks.lib.style import STYLES, Report, legend, markdown

BASELINE = "AdamW float32"


def best_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs of seed 0 at the best rate, one per row and text."""
    first = runs[runs["seed"] == 0].sort_values("loss", kind="stable")
    return first.drop_duplicates(["source", "name"]).sort_index()


def _at_best(runs: pd.DataFrame, best: Record) -> pd.DataFrame:
    """Returns the runs of all seeds of one of the best runs."""
    same = (runs["source"] == best["source"]) & (runs["name"] == best["name"])
    return runs[same & (runs["rate"] == best["rate"])]


def _losses(runs: pd.DataFrame, best: Record) -> pd.Series:
    """Returns the losses of one of the best runs, by seed."""
    return _at_best(runs, best).set_index("seed")["loss"]


def llama_table(runs: pd.DataFrame) -> str:
    """Returns held-out losses in Markdown, from the records alone."""
    first = runs.iloc[0]
    budget = first["budget"]
    parts = [
        f"{first['parameters'] / 1e6:.2f} M parameters, {budget['layers']} layers of "
        f"{budget['width']}; {budget['steps']} steps of {budget['batch']} x "
        f"{budget['length']} bytes; held-out nats a byte, at the best rate of each, "
        "the median of the seeds; against AdamW's of the same seed.\n"
    ]
    best = best_runs(runs)
    for source, group in best.groupby("source", sort=False):
        base = group[group["name"] == BASELINE]
        base = (
            _losses(runs, base.to_dict("records")[0])
            if len(base)
            else pd.Series(dtype=float)
        )
        rows = []
        for run in group.to_dict("records"):
            losses = _losses(runs, run)
            tried = runs[(runs["source"] == source) & (runs["name"] == run["name"])]
            rows.append(
                {
                    "optimizer": run["name"],
                    "bytes / parameter": f"{run['bytes_per_parameter']:.2f}",
                    "rate": f"{run['rate']:g}",
                    "of rates": f"{tried['rate'].nunique()}",
                    "loss": f"{losses.median():.4f}",
                    "min to max": f"{losses.min():.4f} to {losses.max():.4f}",
                    "seeds": f"{len(losses)}",
                    "against AdamW": f"{100 * (losses / base - 1).median():+.1f} %",
                }
            )
        parts.append(f"\n**{source}:**\n\n{markdown(rows, numbers=True)}\n")
    return "".join(parts)


def llama_figure(runs: pd.DataFrame) -> Figure:
    """Draws the loss over steps, and over bytes a parameter; a row of panels a text."""
    groups = list(best_runs(runs).groupby("source", sort=False))
    styles = dict(zip(runs["name"].unique(), cycle(STYLES)))
    fig = Figure(figsize=(9, 1.2 + 3.2 * len(groups)), layout="constrained")
    panels = fig.subplots(len(groups), 2, squeeze=False)
    for (over_steps, over_bytes), (source, group) in zip(panels, groups, strict=True):
        for run in group.to_dict("records"):
            style, seeds = styles[run["name"]], _at_best(runs, run)
            curves = np.array([c["loss"] for c in seeds["curve"]], float)
            steps = run["curve"]["step"]
            over_steps.plot(steps, np.median(curves, 0), label=run["name"], **style)
            middle, low, high = (seeds["loss"].agg(f) for f in ("median", "min", "max"))
            over_bytes.errorbar(
                run["bytes_per_parameter"],
                middle,
                [[middle - low], [high - middle]],
                capsize=3,
                elinewidth=1,
                **style,
            )
            if run["name"] == BASELINE:
                over_bytes.axhline(middle, color="0.6", linewidth=1, zorder=0)
        over_steps.set(title=source, xlabel="step", ylabel="held-out nats a byte")
        over_bytes.set(
            title="at the end: median, all seeds",
            xlabel="bytes a parameter, of parameters and state",
        )
        over_bytes.set_xlim(left=0)
        for axes in (over_steps, over_bytes):
            axes.grid(alpha=0.3)
    legend(fig, panels[:, 0], columns=3)
    return fig


llama_report = Report("llama", llama_table, llama_figure)
