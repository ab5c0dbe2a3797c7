"""What ``muons`` comes to: tables and a figure, from the records alone."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.accuracy.scale_contenders import (
    MUON,
    MUON_MADAM,
    MUON_MADAM_8,
    ON_CODES,
    TWIN,
    TWO_BYTES,
)
from benchmarks.accuracy.scale_report import RULE, difference
from benchmarks.lib.records import Record
from benchmarks.lib.style import STYLES, WIDTH, Report, legend, markdown

SEEDS, FACTOR_SEEDS = tuple(range(1, 10)), (1, 2)
IN_TWO_BYTES = (ON_CODES, MUON_MADAM_8, TWO_BYTES)
NAMES = (MUON, TWIN, MUON_MADAM, *IN_TWO_BYTES)
BAR = 1.0  # The most that a rule may be behind the best one of two bytes, in percent.
AS_IT_IS = "as it is"
LARGE = 2.0  # A ratio from which on it is not written in percent.
FAR = 1.5  # times the least score: such a task has a panel of its own
SETTING = ["workload", "optimizer", "rate", "other"]


def cells(runs: pd.DataFrame, seeds: tuple[int, ...]) -> pd.DataFrame:
    """Returns scores from some seeds, of each setting: arrays, and their mean."""
    runs = runs[runs["seed"].isin(seeds)]
    score = [run[run["metric"]] for run in runs.to_dict("records")]
    score = np.where(runs["diverged"].astype(bool), np.inf, np.array(score, float))
    groups = runs.assign(score=score).groupby(SETTING, sort=False)["score"]
    table = groups.agg(scores=np.array, mean="mean").reset_index()
    return table[table["scores"].map(len) == len(seeds)]


def judged(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the cells of all rows at their best trials."""
    return cells(runs[runs["optimizer"].isin(NAMES)], SEEDS)


def factors(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the best of three rates of each change, with ``base`` and ``change``."""
    runs = runs[runs["optimizer"].str.contains(": ")]
    found = cells(runs, FACTOR_SEEDS)
    found = found.loc[
        found.groupby(["workload", "optimizer"], sort=False)["mean"].idxmin()
    ]
    names = found["optimizer"].str.split(": ", n=1, expand=True)
    return found.assign(base=names[0], change=names[1])


def muons_table(runs: pd.DataFrame) -> str:
    """Returns bars, scores, settings and factors in Markdown, what loses first."""
    found = judged(runs)
    first, last, (one, two) = min(SEEDS), max(SEEDS), FACTOR_SEEDS
    metrics = dict(zip(runs["workload"], runs["metric"], strict=True))
    parts = [
        f"{RULE}\n\nAgainst the best of two bytes, bar {BAR:+g} %:",
        markdown(_bars(found)),
        f"Scores, less is better: mean and deviation of seeds {first} to {last}.",
        markdown(_scores(found, metrics)),
        "Chosen from seed 0: the rate, and its ratio to the rate of other leaves.",
        markdown(_settings(runs, found)),
    ]
    if runs["optimizer"].str.contains(": ").any():
        parts += [
            "One thing changed at a time: the score against the row as it is, each at "
            f"the best of three rates, mean of seeds {one} and {two}, with a standard "
            "error.",
            markdown(_changes(factors(runs))),
        ]
    return "\n\n".join(parts) + "\n"


def _scores_of(found: pd.DataFrame, **where: str) -> np.ndarray:
    for name, value in where.items():
        found = found[found[name] == value]
    return found["scores"].iloc[0] if len(found) else np.array([])


def _bars(found: pd.DataFrame) -> list[Record]:
    rows = []
    for task in found["workload"].unique():
        scores = {
            name: _scores_of(found, workload=task, optimizer=name)
            for name in IN_TWO_BYTES
        }
        if not all(map(len, scores.values())):
            continue
        best = min(scores, key=lambda name: scores[name].mean())
        gaps = {name: difference(scores[name], scores[best]) for name in scores}
        row: Record = {"task": task}
        for name, gap in gaps.items():
            verdict = "met" if gap.percent <= BAR else "missed"
            row[name] = "the best" if name == best else f"{gap}: {verdict}"
        rows.append((max(gap.percent for gap in gaps.values()), row))
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def _scores(found: pd.DataFrame, metrics: dict[str, str]) -> list[Record]:
    rows = []
    for task in found["workload"].unique():
        row: Record = {"task": f"{task}, {metrics[task]}"}
        for name in NAMES:
            scores = _scores_of(found, workload=task, optimizer=name)
            if len(scores):
                row[name] = f"{scores.mean():.4g} ± {scores.std(ddof=1):.2g}"
        rows.append(row)
    return rows


def _settings(runs: pd.DataFrame, found: pd.DataFrame) -> list[Record]:
    rows = []
    trials = runs[runs["optimizer"].isin(NAMES) & (runs["seed"] == 0)]
    for task in found["workload"].unique():
        row: Record = {"task": task}
        for cell in found[found["workload"] == task].to_dict("records"):
            name = cell["optimizer"]
            mine = trials[(trials["workload"] == task) & (trials["optimizer"] == name)]
            row[name] = f"{cell['rate']:g}, {cell['other']:g} ({len(mine)} trials)"
            rates = mine["rate"]
            if not rates.min() < cell["rate"] < rates.max():
                row[name] += ", at the end of the rates"
        rows.append(row)
    return rows


def _changes(found: pd.DataFrame) -> list[Record]:
    rows: dict[tuple, Record] = {}
    for cell in found.to_dict("records"):
        task, base, change = (cell[name] for name in ("workload", "base", "change"))
        row = rows.setdefault((base, change), {"row": base, "changed": change})
        own = _scores_of(found, workload=task, base=base, change=AS_IT_IS)
        if change == AS_IT_IS:
            row[task] = f"{cell['mean']:.4g}"
        elif len(own):
            row[task] = _ratio(cell["scores"] / own)  # Both have the same seeds.
    return sorted(rows.values(), key=lambda row: NAMES.index(row["row"]))


def _ratio(ratio: np.ndarray) -> str:
    """Writes the mean of ratios less 1, in percent, or of large ones as it is."""
    mean, error = ratio.mean(), ratio.std(ddof=1) / len(ratio) ** 0.5
    if mean >= LARGE:
        return f"{mean:.3g} ± {error:.2g} times"
    return f"{100 * (mean - 1):+.1f} ± {100 * error:.1f} %"


def muons_figure(runs: pd.DataFrame) -> Figure:
    """Draws scores over the least mean, by task: the mean and the range of seeds."""
    found = judged(runs)
    least = found.groupby("workload", sort=False)["mean"].transform("min")
    found = found.assign(ratio=found["scores"] / least)
    worst = found.groupby("workload", sort=False)["ratio"].agg(
        lambda ratios: np.concatenate(list(ratios)).max()
    )
    near, far = worst.index[worst < FAR], worst.index[worst >= FAR]
    fig = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    panels = [tasks for tasks in (near, far) if len(tasks)]
    widths = [len(tasks) for tasks in panels]
    grid = fig.subplots(1, len(panels), width_ratios=widths, squeeze=False)
    for axes, tasks in zip(grid[0], panels, strict=True):
        for k, (name, style) in enumerate(zip(NAMES, cycle(STYLES))):
            for i, task in enumerate(tasks):
                cell = found[(found["workload"] == task) & (found["optimizer"] == name)]
                for ratios in cell["ratio"]:
                    # The mean, and all from the least to the largest.
                    heights = np.array([ratios.min(), ratios.mean(), ratios.max()])
                    axes.plot(
                        [i + 0.14 * (k - (len(NAMES) - 1) / 2)] * 3,
                        heights if tasks is far else 100 * (heights - 1),
                        **(style | {"linestyle": "-"}),
                        label=name,
                        markersize=6,
                        markevery=[1],
                    )
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_xlim(-0.5, len(tasks) - 0.5)
        axes.grid(axis="y", alpha=0.3)
        if tasks is far:
            axes.set(yscale="log", ylabel="score / min mean")
            axes.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
            axes.minorticks_off()
        else:
            axes.set_ylabel("score above the min mean, %")
    legend(fig, columns=2)
    return fig


muons_report = Report("muons", muons_table, muons_figure)
