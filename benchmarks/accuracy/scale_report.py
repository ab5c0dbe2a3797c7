"""Tables and a figure of the models at scale, from the records alone."""

from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.accuracy.scale_contenders import ADAMW, MUON, TRIALS, TWIN, TWO_BYTES
from benchmarks.lib.records import Record
from benchmarks.lib.style import STYLES, Report, legend, markdown

ERRORS, LEAST_SEEDS = 3, 3
RULE = (
    f"A difference of means counts if it is more than {ERRORS} of its standard errors, "
    "which are the root of the sum of both variances over their seeds, and there are "
    f"{LEAST_SEEDS} seeds or more of both; the rule was stated before the runs."
)
# The bars of the claim: what is compared, with what, and the most that it may be behind
# in percent.
BARS = (
    (TWO_BYTES, ADAMW, 0.0),
    (TWO_BYTES, MUON, 0.5),
    (TWO_BYTES, TWIN, 0.3),
)
GROUPS = ["size", "tokens_per_parameter"]


class Difference(NamedTuple):
    """The change from one mean to another, in percent, and its standard error."""

    percent: float
    error: float
    counts: bool  # by ``RULE``
    seeds: int  # the fewer of both

    def __str__(self) -> str:
        if np.isnan(self.percent):
            return ""
        if self.seeds < 2:
            return f"{self.percent:+.2f} %, n = 1"
        text = f"{self.percent:+.2f} ± {self.error:.2f} %"
        if self.seeds < LEAST_SEEDS:
            return f"{text}, n = {self.seeds}"
        return text if self.counts else f"{text}, no difference"


def difference(losses: np.ndarray, base: np.ndarray) -> Difference:
    """Compares two means by the rule; the loss of a run that diverged is NaN."""
    seeds = min(len(losses), len(base))
    if not seeds:
        return Difference(np.nan, np.nan, False, 0)
    gap, scale = losses.mean() - base.mean(), 100 / base.mean()
    error = np.nan
    if seeds > 1:
        error = np.sqrt(sum(x.var(ddof=1) / len(x) for x in (losses, base)))
    return _by_rule(scale * gap, scale * error, seeds)


def compared(group: pd.DataFrame, name: str, base: str) -> Difference:
    """Compares the means of two over the seeds that both have."""
    seeds = [set(group["seed"][group["name"] == x]) for x in (name, base)]
    group = group[group["seed"].isin(set.intersection(*seeds))]
    return difference(_losses(group, name), _losses(group, base))


def of_the_same_seeds(group: pd.DataFrame, name: str, base: str) -> Difference:
    """The mean change from one to another with the same seed, in percent.

    The seed is of the first weights and of the batches, so part of what it adds to the
    losses of both is the same.
    """
    by_seed = group.assign(loss=group["loss"].astype(float)).set_index("seed")["loss"]
    losses, bases = (by_seed[(group["name"] == x).to_numpy()] for x in (name, base))
    changes = (100 * (losses / bases - 1)).dropna().to_numpy()
    seeds = len(changes)
    if not seeds:
        return Difference(np.nan, np.nan, False, 0)
    error = changes.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
    return _by_rule(changes.mean(), error, seeds)


def _by_rule(percent: float, error: float, seeds: int) -> Difference:
    counts = seeds >= LEAST_SEEDS and abs(percent) > ERRORS * error
    return Difference(percent, error, bool(counts), seeds)


def judged(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs at tuned values, by size, without the trials."""
    return runs[runs["tuned_on"].notna()]


def by_size(runs: pd.DataFrame) -> list[tuple]:
    """Returns the size and tokens of runs, and the runs, the smallest models first."""
    runs = runs.sort_values("parameters", kind="stable")
    return list(runs.groupby(GROUPS, sort=False))


def _losses(group: pd.DataFrame, name: str) -> np.ndarray:
    return group[group["name"] == name]["loss"].to_numpy(float)


def scale_table(runs: pd.DataFrame) -> str:
    """Returns held-out losses, bars and the trend in Markdown, what loses first."""
    groups = by_size(judged(runs))
    seeds = "Means are compared over the seeds that both have."
    parts = [f"{RULE} {seeds}\n\n{_bars(groups)}\n"]
    if len(groups) > 1:
        parts.append(f"\n**Against {ADAMW}, by size:**\n\n{_trend(groups)}\n")
    parts += [f"\n{_heading(group)}\n\n{_rows(group)}\n" for _, group in groups]
    parts.append(f"\n**Trials, {TRIALS} of each:**\n\n{_trials(runs)}\n")
    return "".join(parts)


def _heading(group: pd.DataFrame) -> str:
    run = group.iloc[0]
    config = run["config"]
    tables = 2 * config["vocabulary"] * config["width"]
    tokens = run["steps"] * config["batch"] * config["length"]
    facts = config["corpus"]
    in_bytes = facts["held-out"] / facts["held-out bytes"]
    return (
        f"**{run['size']}**: {(run['parameters'] - tables) / 1e6:.2f} M parameters and "
        f"{tables / 1e6:.2f} M of tables, {config['layers']} layers of "
        f"{config['width']}; {tokens / 1e6:.1f} M tokens of {facts['name']}, "
        f"{run['tokens_per_parameter']:g} a parameter, of "
        f"{facts['train'] / 1e6:.1f} M; {run['steps']} steps of {config['batch']} x "
        f"{config['length']}; products in {config['dtype']}, on "
        f"{run['environment']['device']}; tuned on {run['tuned_on']}. A nat a token is "
        f"{in_bytes:.3f} nats a byte. The peak is the compiler's, of a whole step, "
        "layers computed again on the way back."
    )


def _rows(group: pd.DataFrame) -> str:
    rows = []
    for name, cell in group.groupby("name", sort=False):
        run, losses = cell.iloc[0], _losses(group, str(name))
        mean = losses.mean()
        against = {
            f"against {base}": ""
            if name == base
            else str(compared(group, str(name), base))
            for base in (ADAMW, MUON)
        }
        row = {
            "optimizer": name,
            "bytes / parameter": f"{run['bytes_per_parameter']:.2f}",
            "peak MB": f"{run['peak'] / 1e6:.0f}",
            "n": f"{len(cell)}",
            "nats a token": "diverged" if np.isnan(mean) else f"{mean:.4f}",
            **against,
            "at": ", ".join(f"{k} {value:g}" for k, value in run["values"].items()),
        }
        rows.append((np.nan_to_num(mean, nan=np.inf), row))
    # What diverged is first, and then what has the greatest loss.
    rows.sort(key=lambda pair: pair[0], reverse=True)
    return markdown([row for _, row in rows])


def _bars(groups: list) -> str:
    rows = []
    for (size, _), group in groups:
        for name, base, most in BARS:
            found = compared(group, name, base)
            if np.isnan(found.percent):
                continue
            met = "met" if found.percent <= most else "missed"
            rows.append(
                {
                    "bar": f"{name} against {base}",
                    "size": size,
                    "at most": f"{most:+.1f} %",
                    "measured": str(found),
                    "with the same seeds": str(of_the_same_seeds(group, name, base)),
                    "": "open" if found.seeds < LEAST_SEEDS else met,
                }
            )
    rows.sort(key=lambda row: ("missed", "open", "met").index(row[""]))
    return markdown(rows) if rows else "No bar can be judged yet."


def _trend(groups: list) -> str:
    rows: dict[str, Record] = {}
    for (size, _), group in groups:
        for name in group["name"].unique():
            found = compared(group, name, ADAMW)
            if name != ADAMW:
                rows.setdefault(name, {"optimizer": name})[size] = str(found)
    return markdown(list(rows.values()))


def _trials(runs: pd.DataFrame) -> str:
    rows = []
    trials = runs[runs["tuned_on"].isna()]
    for (size, _, name), cell in trials.groupby([*GROUPS, "name"], sort=False):
        rates = cell["values"].map(lambda values: values["rate"])
        losses = cell["loss"].astype(float)
        if losses.notna().any():
            best = cell.loc[losses.idxmin()]
            inside = rates.min() < best["values"]["rate"] < rates.max()
            loss = f"{best['loss']:.4f}"
        else:
            inside, loss = False, "diverged"
        rows.append(
            {
                "optimizer": name,
                "size": size,
                "trials": f"{len(cell)}",
                "rates": f"{rates.min():g} to {rates.max():g}",
                "best between two": "yes" if inside else "no",
                "least loss": loss,
            }
        )
    return markdown(rows, numbers=True)


def scale_figure(runs: pd.DataFrame) -> Figure:
    """Draws the distance from AdamW over sizes, and losses over bytes a parameter."""
    runs = judged(runs)
    groups = [group for _, group in by_size(runs)]
    # The largest size whose runs are enough to judge by, if there is one.
    last = max(
        reversed(groups), key=lambda group: min(LEAST_SEEDS, group["seed"].nunique())
    )
    styles = dict(zip(runs["name"].unique(), cycle(STYLES)))
    fig = Figure(figsize=(9, 4.6), layout="constrained")
    over_size, over_bytes = fig.subplots(1, 2)
    for name, style in styles.items():
        cells = [group for group in groups if name in set(group["name"])]
        found = [compared(g, str(name), ADAMW) for g in cells]
        sizes = [group["parameters"].iloc[0] for group in cells]
        over_size.errorbar(
            sizes,
            [x.percent for x in found],
            np.nan_to_num([x.error for x in found]),
            capsize=3,
            label=name,
            **style,
        )
        losses = _losses(last, name)
        if len(losses):
            used = last[last["name"] == name]["bytes_per_parameter"].iloc[0]
            error = losses.std(ddof=1) if len(losses) > 1 else 0.0
            over_bytes.errorbar(used, losses.mean(), error, capsize=3, **style)
    over_size.axhline(0, color="0.6", linewidth=1, zorder=0)
    # matplotlib has no logarithmic axis without data.
    scale = "log" if ADAMW in styles else "linear"
    over_size.set(xscale=scale, xlabel="parameters", ylabel=f"loss against {ADAMW}, %")
    over_bytes.set(
        title=f"{last['size'].iloc[0]}: mean, and deviation of seeds",
        xlabel="bytes a parameter, of parameters and state",
        ylabel="held-out nats a token",
    )
    over_bytes.set_xlim(left=0)
    for axes in (over_size, over_bytes):
        axes.grid(alpha=0.3)
    legend(fig, [over_size], columns=3)
    return fig


def _if_judged(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs, or none where there are only trials yet."""
    return runs if len(judged(runs)) else runs[:0]


scale_report = Report("scale", scale_table, scale_figure, cells=_if_judged)
