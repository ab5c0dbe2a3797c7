"""Which optimizer to take? Settings are judged on the workload that did not choose."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import optax
import pandas as pd
import tyro
from matplotlib.figure import Figure
from optax import contrib

import madax
from benchmarks.accuracy.state import EIGHT, not_a_number, quantize
from benchmarks.lib.analysis import CAP, at_best, change, medians, ratios
from benchmarks.lib.optimizers import OPTIMIZERS, UNTUNED, Optimizer, cosine
from benchmarks.lib.profiles import TASKS, Options
from benchmarks.lib.style import markdown, report
from benchmarks.lib.sweep import Sweep, run_all

SETTING = ["optimizer", "rate"]


class Row(NamedTuple):
    """An optimizer, and the settings to choose from.

    Attributes:
      make: schedule to the transformation.
      rates: half a decade apart, the same number for all.
      bytes: kept a parameter, in weights and state.
      codes: whether matrices are stored in 8 bits.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: Sequence[float]
    bytes: int
    codes: bool = False

    @property
    def optimizer(self) -> Optimizer:
        """The row as the training loop takes it."""
        if not self.codes:
            return Optimizer(self.make, self.rates[2])
        return Optimizer(self.make, self.rates[2], quantize)


def _adam8(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.with_quantized_params(
        optax.adam(rate), moment_format=EIGHT, moment_where=not_a_number
    )


ADAM = (0.0003, 0.001, 0.003, 0.01, 0.03)
MADAM = (0.003, 0.01, 0.03, 0.1, 0.3)
ROWS = {
    "sgd momentum": Row(OPTIMIZERS["sgd momentum"].make, (0.01, 0.03, 0.1, 0.3, 1), 8),
    "adam": Row(optax.adam, ADAM, 12),
    "lion": Row(optax.lion, (3e-5, 0.0001, 0.0003, 0.001, 0.003), 8),
    "muon": Row(UNTUNED["muon"].make, (0.006, 0.02, 0.06, 0.2, 0.6), 8),
    "prodigy": Row(contrib.prodigy, (0.1, 0.3, 1, 3, 10), 20),
    "madam": Row(madax.madam, MADAM, 8),
    "madam, floor": Row(lambda rate: madax.madam(rate, floor=1.0), MADAM, 8),
    "madam, floor, b1": Row(
        lambda rate: madax.madam(rate, floor=1.0, b1=0.9), MADAM, 12
    ),
    "muon_madam, floor": Row(lambda rate: madax.muon_madam(rate, floor=1.0), MADAM, 8),
    "adam, 8 bits": Row(_adam8, ADAM, 3, codes=True),
    "madam, 8 bits": Row(
        lambda rate: madax.madam(rate, moment_format=EIGHT), MADAM, 2, codes=True
    ),
    "madam, b1, 8 bits": Row(
        lambda rate: madax.madam(rate, b1=0.9, moment_format=EIGHT),
        MADAM,
        3,
        codes=True,
    ),
    "muon_madam, 8 bits": Row(
        lambda rate: madax.muon_madam(rate, moment_format=EIGHT), MADAM, 2, codes=True
    ),
}
# What is stored in 8 bits, and the same rule in float32.
FLOATS = {
    "adam, 8 bits": "adam",
    "madam, 8 bits": "madam, floor",
    "madam, b1, 8 bits": "madam, floor, b1",
    "muon_madam, 8 bits": "muon_madam, floor",
}


def choose(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Choose each optimizer's rate on all workloads but one, and judge it on that one.

    Five rates each, half a decade apart, decayed by a cosine to zero, on every
    workload of the profile, with the same seeds; in float32, and with weights and
    state in 8 bits.
    """
    sweeps = [
        Sweep(name, row.optimizer, cosine(row.rates)) for name, row in ROWS.items()
    ]
    tasks = options.tasks(list(TASKS[options.profile]))
    run_all(options.folder / "choose.jsonl", options, tasks, sweeps)
    choose_report(options.folder)


def choose_report(folder: Path) -> None:
    """Writes choose.md and choose.png from the records alone."""
    print(report(folder, "choose", choose_table, choose_figure))


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
    groups = {name: [(name, rate) for rate in row.rates] for name, row in ROWS.items()}
    floats = [name for name, row in ROWS.items() if not row.codes]
    for group, ours in (("any of madax, float32", True), ("any other, float32", False)):
        rows = [name for name in floats if ("madam" in name) == ours]
        groups[group] = [setting for name in rows for setting in groups[name]]
    groups["adam, not tuned"] = [("adam", 0.001)]
    return cells, left_out(cells, groups)


def interval(ratio: np.ndarray, *, draws: int = 10_000) -> tuple[float, float]:
    """Returns the middle 95 % of the geometric mean over workloads drawn anew."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.log(ratio), (draws, len(ratio)))
    low, high = np.exp(np.quantile(drawn.mean(1), [0.025, 0.975]))
    return float(low), float(high)


def choose_table(runs: pd.DataFrame) -> str:
    """Returns the regrets of what was chosen, and what 8 bits cost, in Markdown.

    Args:
      runs: records, as read.
    """
    cells, chosen = judged(runs)
    regrets = chosen.pivot(index="workload", columns="group", values="ratio")
    regrets = regrets[[name for name in means(chosen).index if name in ROWS]]
    regrets = regrets.map(lambda ratio: f"{100 * (ratio - 1):.0f}")
    parts = [
        "The regret is how much larger the error is than the least of all in the "
        "records, on the workload that had no part in the choice; at most "
        f"{CAP:g} times. Its geometric mean over workloads, with the interval of "
        "95 % over workloads drawn anew, and without the GAN, where whatever has "
        "momentum fails; its median and the worst.",
        markdown(summary(chosen)),
        "Regret on each workload, in percent:",
        markdown(regrets.reset_index()),
        "What 8 bits cost, each at its own best rate on the workload:",
        markdown(costs(cells)),
    ]
    return "\n\n".join(parts) + "\n"


def summary(chosen: pd.DataFrame) -> list[dict[str, str]]:
    """Returns a row for each group, the least mean regret first.

    Args:
      chosen: of ``left_out``.
    """
    single = chosen[chosen["group"].isin([*ROWS])]
    ranks = single.groupby("workload")["ratio"].rank().groupby(single["group"])
    mean_rank, first = ranks.mean(), ranks.apply(lambda rank: (rank == 1).sum())
    calm = means(chosen[chosen["workload"] != "gan"])
    rows = []
    for group, mean in means(chosen).to_dict().items():
        mine = chosen[chosen["group"] == group]
        low, high = interval(mine["ratio"].to_numpy())
        worst = mine.loc[mine["ratio"].idxmax()]
        counts = mine.value_counts(SETTING)
        name, rate = counts.index[0]
        row = {
            "optimizer": str(group),
            "bytes": str(ROWS[name].bytes),
            "chosen": f"{'' if name == group else name + ' '}{rate:g} "
            f"({counts.iloc[0]} of {len(mine)})",
            "mean regret": f"{_percent(mean)} ({_percent(low)} to {_percent(high)})",
            "without gan": _percent(calm[group]),
            "median": _percent(mine["ratio"].median()),
            "worst": f"{_percent(worst['ratio'])}, {worst['workload']}",
        }
        if group in ROWS:
            row |= {"mean rank": f"{mean_rank[group]:.1f}", "first": f"{first[group]}"}
        rows.append(row)
    return rows


def means(chosen: pd.DataFrame) -> pd.Series:
    """Returns geometric means over workloads, by group, the least first."""
    logs = chosen.assign(log=np.log(chosen["ratio"])).groupby("group")["log"]
    return logs.mean().map(np.exp).sort_values()


def costs(cells: pd.DataFrame) -> pd.DataFrame:
    """Returns errors of 8 bits against the same rule in float32, as text.

    Args:
      cells: medians over seeds.
    """
    best = at_best(cells).set_index(["workload", "optimizer"])
    rows = []
    for workload in cells["workload"].unique():
        row = {"workload": workload}
        for few, whole in FLOATS.items():
            if {(workload, few), (workload, whole)} <= {*best.index}:
                row[few] = change(
                    best.loc[(workload, few)], best.loc[(workload, whole)]
                )
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def choose_figure(runs: pd.DataFrame) -> Figure:
    """Draws the regret of what was chosen, a dot for each workload.

    Args:
      runs: records, as read.
    """
    _, chosen = judged(runs)
    mean = means(chosen)
    fig = Figure(figsize=(8, 6), layout="constrained")
    axes = fig.subplots()
    order = mean.index[::-1]
    for height, group in enumerate(order):
        ratio = chosen.loc[chosen["group"] == group, "ratio"].to_numpy()
        ours = "mada" in group
        color = "#d55e00" if ours else "#0072b2"
        axes.plot(ratio, [height] * len(ratio), "o", c=color, alpha=0.3, ms=5)
        axes.plot(interval(ratio), [height] * 2, c=color, lw=2)
        marker = "D" if ours else "s"
        axes.plot(mean[group], height, marker, c=color, ms=8, mec="k")
    axes.set_yticks(range(len(order)), order)
    axes.set(
        xscale="log",
        xlim=(0.98, 1.05 * CAP),
        xlabel="error / least error, on the workload that had no part in the choice",
        title="One setting for all: geometric mean, 95 % interval, and each workload",
    )
    axes.set_xticks(
        [1, 1.2, 1.5, 2, 3, 5, 10], ["1", "1.2", "1.5", "2", "3", "5", "10"]
    )
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    return fig


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.0f} %"
