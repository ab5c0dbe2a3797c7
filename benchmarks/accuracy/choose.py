"""Chooses an optimizer: each setting is judged on a workload that did not choose it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from optax import contrib

import madax
from benchmarks.lib.analysis import CAP, at_best, change, medians, ratios
from benchmarks.lib.contender import Contender, points
from benchmarks.lib.formats import MOMENTS_8, SYMLOG_8, has_axes
from benchmarks.lib.optimizers import (
    OPTIMIZERS,
    UNTUNED,
    codes_adam,
    madam_8,
    madam_floor,
    muon_madam_8,
    muon_madam_floor,
)
from benchmarks.lib.profiles import Flags
from benchmarks.lib.style import WIDTH, Report, markdown
from benchmarks.lib.sweep import Sweep, run_all

SETTING = ["optimizer", "rate"]


_adam_8 = partial(codes_adam, moment_format=MOMENTS_8, moment_where=has_axes)
ADAM = (0.0003, 0.001, 0.003, 0.01, 0.03)
MADAM = (0.003, 0.01, 0.03, 0.1, 0.3)
MUON = (0.002, 0.006, 0.02, 0.06, 0.2)
CONTENDERS = {
    "sgd momentum": replace(
        OPTIMIZERS["sgd momentum"], rates=(0.01, 0.03, 0.1, 0.3, 1), bytes=8
    ),
    "adam": Contender(optax.adam, ADAM, bytes=12),
    "lion": Contender(optax.lion, (3e-5, 0.0001, 0.0003, 0.001, 0.003), bytes=8),
    "muon": replace(UNTUNED["muon"], rates=(0.006, 0.02, 0.06, 0.2, 0.6), bytes=8),
    "prodigy": Contender(contrib.prodigy, (0.1, 0.3, 1, 3, 10), bytes=20),
    "madam": Contender(madax.madam, MADAM, bytes=8),
    "madam, floor": Contender(madam_floor, MADAM, bytes=8),
    "madam, floor, b1": Contender(partial(madam_floor, b1=0.9), MADAM, bytes=12),
    "muon_madam, floor": Contender(muon_madam_floor, MADAM, bytes=8),
    "madax.muon": Contender(madax.muon, MUON, bytes=8),
    "adam, 8 bits": Contender(_adam_8, ADAM, SYMLOG_8, bytes=3, against="adam"),
    "madam, 8 bits": Contender(
        madam_8, MADAM, SYMLOG_8, bytes=2, against="madam, floor"
    ),
    "madam, b1, 8 bits": Contender(
        partial(madam_8, b1=0.9), MADAM, SYMLOG_8, bytes=3, against="madam, floor, b1"
    ),
    "muon_madam, 8 bits": Contender(
        muon_madam_8, MADAM, SYMLOG_8, bytes=2, against="muon_madam, floor"
    ),
    "madax.muon, 8 bits": Contender(
        partial(madax.muon, moment_format=MOMENTS_8),
        MUON,
        SYMLOG_8,
        bytes=2,
        against="madax.muon",
    ),
}


def choose(options: Flags) -> None:
    """Choose each optimizer's rate on all workloads but one, and judge it on that one.

    Five rates each, half a decade apart, decayed by a cosine to zero, on every
    workload of the profile, with the same seeds; in float32, and with weights and
    state in 8 bits.
    """
    sweeps = [Sweep(name, row, points(row.rates)) for name, row in CONTENDERS.items()]
    tasks = options.tasks(every=True)
    run_all(options.folder / "choose.jsonl", options, tasks, sweeps)
    print(choose_report(options.folder))


def left_out(
    cells: pd.DataFrame, groups: Mapping[str, Sequence[tuple]]
) -> pd.DataFrame:
    """Chooses a setting on all workloads but one, and says how it does on that one.

    Args:
      cells: a row for each workload and setting, with ``ratio``.
      groups: by name, the settings to choose from; those that were not run on every
        workload are left out.

    Returns:
      A row for each group and workload: ``group``, ``workload``, the columns of the
      setting, and ``ratio``.
    """
    logs = cells.assign(log=np.log(cells["ratio"]))
    logs = logs.pivot(index=SETTING, columns="workload", values="log").dropna()
    rows = []
    for group, settings in groups.items():
        mine = logs.loc[logs.index.isin(settings)]
        if mine.empty:
            continue
        for workload in logs.columns:
            best = mine.drop(columns=workload).sum(axis=1).argmin()
            setting = dict(zip(SETTING, mine.index.to_list()[best], strict=True))
            ratio = float(np.exp(mine[workload].iloc[best]))
            row = {"group": group, "workload": workload, "ratio": ratio}
            rows.append(row | setting)
    return pd.DataFrame(rows)


def judged(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns medians over seeds with ``ratio``, and the regrets of what was chosen.

    Args:
      runs: records, as read.
    """
    cells = medians(runs, SETTING)
    cells = cells.assign(ratio=ratios(cells, cells.groupby("workload")["median"].min()))
    groups = {
        name: [(name, rate) for rate in row.rates] for name, row in CONTENDERS.items()
    }
    floats = [name for name, row in CONTENDERS.items() if row.format is None]
    for group, ours in (("any of madax, float32", True), ("any other, float32", False)):
        rows = [name for name in floats if ("mada" in name) == ours]
        groups[group] = [setting for name in rows for setting in groups[name]]
    groups["adam, not tuned"] = [("adam", 0.001)]
    return cells, left_out(cells, groups)


def interval(
    ratio: np.ndarray, *, of: Callable = np.mean, draws: int = 10_000
) -> tuple[float, float]:
    """Returns the middle 95 % of a statistic of logarithms, workloads resampled."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.log(ratio), (draws, len(ratio)))
    low, high = np.exp(np.quantile(of(drawn, axis=1), [0.025, 0.975]))
    return float(low), float(high)


def choose_table(runs: pd.DataFrame) -> str:
    """Returns the regrets of what was chosen, and what 8 bits cost, in Markdown.

    Args:
      runs: records, as read.
    """
    cells, chosen = judged(runs)
    regrets = chosen.pivot(index="workload", columns="group", values="ratio")
    regrets = regrets[[name for name in medians_of(chosen).index if name in CONTENDERS]]
    regrets = regrets.map(lambda ratio: f"{100 * (ratio - 1):.0f}")
    parts = [
        "The regret is how much larger the error is than the least of all in the "
        "records, on the workload that had no part in the choice; at most "
        f"{CAP:g} times. Rows are in the order of its median over workloads. Then its "
        "geometric mean, with the interval of 95 % over resampled workloads, and "
        "without the GAN, where all optimizers with a momentum fail; and the worst.",
        markdown(summary(chosen)),
        "Regret on each workload, in percent:",
        markdown(regrets.reset_index()),
        "What 8 bits cost, each at its own best rate on the workload:",
        markdown(costs(cells)),
    ]
    return "\n\n".join(parts) + "\n"


def summary(chosen: pd.DataFrame) -> list[dict[str, str]]:
    """Returns a row for each group, the min median regret first.

    Args:
      chosen: of ``left_out``.
    """
    single = chosen[chosen["group"].isin([*CONTENDERS])]
    ranks = single.groupby("workload")["ratio"].rank().groupby(single["group"])
    mean_rank, first = ranks.mean(), ranks.apply(lambda rank: (rank == 1).sum())
    mean, calm = means(chosen), means(chosen[chosen["workload"] != "gan"])
    rows = []
    for group, median in medians_of(chosen).to_dict().items():
        mine = chosen[chosen["group"] == group]
        low, high = interval(mine["ratio"].to_numpy())
        worst = mine.loc[mine["ratio"].idxmax()]
        counts = mine.value_counts(SETTING)
        name, rate = counts.index[0]
        row = {
            "optimizer": str(group),
            "bytes": str(CONTENDERS[name].bytes),
            "chosen": f"{'' if name == group else name + ' '}{rate:g} "
            f"({counts.iloc[0]} of {len(mine)})",
            "median regret": _percent(median),
            "mean": f"{_percent(mean[group])} ({_percent(low)} to {_percent(high)})",
            "without gan": _percent(calm[group]),
            "worst": f"{_percent(worst['ratio'])}, {worst['workload']}",
        }
        if group in CONTENDERS:
            row |= {"mean rank": f"{mean_rank[group]:.1f}", "first": f"{first[group]}"}
        rows.append(row)
    return rows


def means(chosen: pd.DataFrame) -> pd.Series:
    """Returns geometric means over workloads, by group, the least first."""
    logs = chosen.assign(log=np.log(chosen["ratio"])).groupby("group")["log"]
    return logs.mean().map(np.exp).sort_values()


def medians_of(chosen: pd.DataFrame) -> pd.Series:
    """Returns medians over workloads, by group, the min first; ties by the mean."""
    table = pd.DataFrame(
        {"median": chosen.groupby("group")["ratio"].median(), "mean": means(chosen)}
    )
    return table.sort_values(["median", "mean"])["median"]


def costs(cells: pd.DataFrame) -> pd.DataFrame:
    """Returns errors of 8 bits against the same rule in float32, as text.

    Args:
      cells: medians over seeds.
    """
    best = at_best(cells).set_index(["workload", "optimizer"])
    rows = []
    for workload in cells["workload"].unique():
        row = {"workload": workload}
        for name, contender in CONTENDERS.items():
            pair = [(workload, name), (workload, contender.against)]
            if {*pair} <= {*best.index}:
                row[name] = change(*(best.loc[key] for key in pair))
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def choose_figure(runs: pd.DataFrame) -> Figure:
    """Draws the regret of what was chosen, a dot for each workload.

    Args:
      runs: records, as read.
    """
    _, chosen = judged(runs)
    median = medians_of(chosen)
    fig = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = fig.subplots()
    order = median.index[::-1]
    for height, group in enumerate(order):
        ratio = chosen.loc[chosen["group"] == group, "ratio"].to_numpy()
        ours = "mada" in group
        color = "#d55e00" if ours else "#0072b2"
        axes.plot(ratio, [height] * len(ratio), "o", c=color, alpha=0.3, ms=5)
        axes.plot(interval(ratio, of=np.median), [height] * 2, c=color, lw=2)
        marker = "D" if ours else "s"
        axes.plot(median[group], height, marker, c=color, ms=8, mec="k")
    axes.set_yticks(range(len(order)), order)
    axes.set(
        xscale="log",
        xlim=(0.98, 1.05 * CAP),
        xlabel="error / min error, on the workload that had no part in the choice",
        title="One setting for all: median, 95 % interval, 15 workloads",
    )
    axes.set_xticks(
        [1, 1.2, 1.5, 2, 3, 5, 10], ["1", "1.2", "1.5", "2", "3", "5", "10"]
    )
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    return fig


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.0f} %"


choose_report = Report("choose", choose_table, choose_figure)
