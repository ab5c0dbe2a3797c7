"""A table and a figure of models in the shape of Llama, from the records."""

from collections.abc import Callable
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib.records import Record
from benchmarks.lib.style import STYLES, Report, legend, markdown

# Rows of AdamW, by its settings, begin with this; the best of them is the baseline.
BASELINE = "AdamW float32"
# What one byte is compared with, beside the baseline.
TWO_BYTES = ("muon_madam 8 bits", "Muon on 8 bits")
# Rows that differ in the clip of madax.layerwise begin with this.
CLIPPED_BY, EXACT = "AdamW in 3 bytes, clipped by ", "the exact norm"
BAR = 0.5  # percent that other clips may be behind the exact one


def best_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs of seed 0 at the best rates, one per row and text."""
    first = runs[runs["seed"] == 0].sort_values("loss", kind="stable")
    return first.drop_duplicates(["source", "name"]).sort_index()


def _at_best(runs: pd.DataFrame, best: Record) -> pd.DataFrame:
    """Returns the runs of all seeds of one of the best runs."""
    same = pd.Series(True, runs.index)
    for name in ("source", "name", "rate", "other"):
        # Rows without a second rate have None, or NaN, there.
        same &= (runs[name] == best[name]) | (runs[name].isna() & pd.isna(best[name]))
    return runs[same]


def _losses(runs: pd.DataFrame, best: Record) -> pd.Series:
    """Returns the losses of one of the best runs, by seed."""
    return _at_best(runs, best).set_index("seed")["loss"]


def _least(
    runs: pd.DataFrame, group: pd.DataFrame, wanted: Callable[[str], bool]
) -> tuple[str, pd.Series]:
    """Returns the wanted row with the least median of losses, and these by seed."""
    rows = [run for run in group.to_dict("records") if wanted(run["name"])]
    losses = {run["name"]: _losses(runs, run) for run in rows}
    empty = {"": pd.Series(dtype=float)}
    return min((losses or empty).items(), key=lambda item: item[1].median())


def _is_baseline(name: str) -> bool:
    return name.startswith(BASELINE)


def llama_table(runs: pd.DataFrame) -> str:
    """Returns held-out losses in Markdown, from the records alone."""
    parts = [
        f"{_size(runs)}; held-out nats a byte, at the best rate of each, "
        "the median of the seeds; a second rate is of all leaves but matrices. Against "
        "the same seeds of the best AdamW, and of the better of muon_madam and Muon in "
        "two bytes.\n"
    ]
    best = best_runs(runs)
    for source, group in best.groupby("source", sort=False):
        against = {
            "against AdamW": _least(runs, group, _is_baseline)[1],
            "against two bytes": _least(runs, group, TWO_BYTES.__contains__)[1],
        }
        rows = []
        for run in group.to_dict("records"):
            losses = _losses(runs, run)
            tried = runs[(runs["source"] == source) & (runs["name"] == run["name"])]
            rate = f"{run['rate']:g}"
            rows.append(
                {
                    "optimizer": run["name"],
                    "bytes / parameter": f"{run['bytes_per_parameter']:.2f}",
                    "rate": rate
                    if pd.isna(run["other"])
                    else f"{rate}; {run['other']:g}",
                    "of rates": f"{tried['rate'].nunique()}",
                    "loss": f"{losses.median():.4f}",
                    "min to max": f"{losses.min():.4f} to {losses.max():.4f}",
                    "seeds": f"{len(losses)}",
                }
                | {
                    name: f"{100 * (losses / base - 1).median():+.1f} %"
                    for name, base in against.items()
                    if len(base)
                }
            )
        parts.append(f"\n**{source}:**\n\n{markdown(rows, numbers=True)}\n")
    return "".join(parts)


def _size(runs: pd.DataFrame) -> str:
    """Returns how large the models are, and how long they are trained."""
    first = runs.iloc[0]
    budget = first["budget"]
    return (
        f"{first['parameters'] / 1e6:.2f} M parameters, {budget['layers']} layers of "
        f"{budget['width']}; {budget['steps']} steps of {budget['batch']} x "
        f"{budget['length']} bytes"
    )


def clip_table(runs: pd.DataFrame) -> str:
    """Returns how far clips are behind the exact one in Markdown, seed by seed."""
    rows = []
    for source, group in runs.groupby("source", sort=False):
        losses = {
            str(name).removeprefix(CLIPPED_BY): cell.set_index("seed")["loss"]
            for name, cell in group.groupby("name", sort=False)
        }
        for name, found in losses.items():
            behind = 100 * (found / losses[EXACT] - 1)
            row = {"text": source, "clipped by": name, "loss": f"{found.mean():.4f}"}
            row["seeds"] = f"{len(found)}"
            if name != EXACT:
                row[f"against {EXACT}"] = f"{behind.mean():+.2f} ± {behind.sem():.2f} %"
                met = "met" if behind.mean() <= BAR else "missed"
                row[f"at most {BAR:+g} %"] = met
            rows.append(row)
    return (
        f"{_size(runs)}, at a rate of {runs.iloc[0]['rate']:g}; held-out nats a byte, "
        "the mean of the seeds, and the mean difference of the same seeds with its "
        f"standard error.\n\n{markdown(rows)}\n"
    )


def llama_figure(runs: pd.DataFrame) -> Figure:
    """Draws the loss over steps, and over bytes a parameter; a row of panels a text."""
    groups = list(best_runs(runs).groupby("source", sort=False))
    # All settings of AdamW share a style, and only the best is drawn.
    kinds = {name: BASELINE if _is_baseline(name) else name for name in runs["name"]}
    styles = dict(zip(dict.fromkeys(kinds.values()), cycle(STYLES)))
    fig = Figure(figsize=(9, 1.2 + 3.2 * len(groups)), layout="constrained")
    panels = fig.subplots(len(groups), 2, squeeze=False)
    for (over_steps, over_bytes), (source, group) in zip(panels, groups, strict=True):
        baseline, _ = _least(runs, group, _is_baseline)
        for run in group.to_dict("records"):
            if _is_baseline(run["name"]) and run["name"] != baseline:
                continue
            style, seeds = styles[kinds[run["name"]]], _at_best(runs, run)
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
            if run["name"] == baseline:
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


def _clips(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs of clips, or none without the exact one."""
    clips = runs[runs["name"].str.startswith(CLIPPED_BY)]
    return clips if (clips["name"] == CLIPPED_BY + EXACT).any() else clips[:0]


def _others(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[~runs["name"].str.startswith(CLIPPED_BY)]


llama_report = Report("llama", llama_table, llama_figure, cells=_others)
clip_report = Report("clip", clip_table, source="llama", cells=_clips)
