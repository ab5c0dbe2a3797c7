"""Accuracy against bits per weight: formats and roundings, Madam and Adam alike."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib.contender import Contender, points
from benchmarks.lib.formats import FORMATS
from benchmarks.lib.optimizers import stored
from benchmarks.lib.profiles import Flags, Profile
from benchmarks.lib.style import WIDTH, Report, markdown
from benchmarks.lib.sweep import Sweep, run_missing
from benchmarks.lib.train import Budget
from benchmarks.workloads.fashion_mnist import fashion_mnist

# In the order of the table.
FORMATS_SHOWN = (
    "log 16",
    "log 8",
    "wide log 8",
    "log 6",
    "log 4",
    "symlog 8",
    "uniform 8",
    "uniform 6",
    "uniform 4",
)
# By profile, the factor by which images are made smaller, and the budgets.
SHRINK: dict[Profile, int] = {"smoke": 4, "quick": 2, "full": 1}
BUDGETS: dict[Profile, dict[str, Budget]] = {
    "smoke": {"mlp": Budget(steps=20, evaluations=2, batch_size=64, seeds=1)},
    "quick": {"mlp": Budget(steps=1000, evaluations=5, batch_size=64, seeds=3)},
    "full": {
        "mlp": Budget(steps=3000, evaluations=10, batch_size=128, seeds=3),
        "cnn": Budget(steps=1000, evaluations=10, batch_size=64, seeds=3),
    },
}

SMOKE = ("float32", "log 8")  # Compiling takes time, too.

# The lines differ without colour, too: by marker for the format, by line for the
# rounding.
LINES = {
    ("log", "stochastic", "madam"): {"c": "#d55e00", "ls": "-", "marker": "o"},
    ("log", "nearest", "madam"): {"c": "#d55e00", "ls": ":", "marker": "o"},
    ("uniform", "stochastic", "madam"): {"c": "#e69f00", "ls": "-", "marker": "s"},
    ("log", "stochastic", "adam"): {"c": "#0072b2", "ls": "-", "marker": "^"},
    ("log", "nearest", "adam"): {"c": "#0072b2", "ls": ":", "marker": "^"},
    ("uniform", "stochastic", "adam"): {"c": "#56b4e9", "ls": "-", "marker": "D"},
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """The storage of weights and moments: one row of the table.

    Attributes:
      format: key of ``FORMATS``, or "float32".
      rounding: "stochastic", "nearest", or "-" for float32.
      moments: bits of a moment.
    """

    format: str
    rounding: Literal["stochastic", "nearest", "-"]
    moments: int = 32


STORAGES = [
    Storage("float32", "-"),
    Storage("float32", "-", moments=8),
    *(Storage(name, "stochastic") for name in FORMATS_SHOWN),
    *(Storage(name, "nearest") for name in FORMATS_SHOWN),
    Storage("log 8", "stochastic", moments=8),
    Storage("log 16", "stochastic", moments=8),
]


def bits(options: Flags) -> None:
    """Train Fashion-MNIST on weights of 16, 8, 6 and 4 bits, with Madam and Adam.

    Every optimizer runs at its default learning rate, in float32 and in every format
    and rounding, with the same seeds and schedule.
    """
    raw = options.folder / "bits.jsonl"
    shrink = SHRINK[options.profile]
    for network, budget in BUDGETS[options.profile].items():
        workload = fashion_mnist(network, options.data, shrink=shrink)
        settings = dataclasses.asdict(budget) | {"schedule": "cosine to zero"}
        if shrink > 1:
            settings["shrink"] = shrink
        for name, storage, contender in rows():
            if options.profile == "smoke" and storage.format not in SMOKE:
                continue
            fixed = {
                **dataclasses.asdict(storage),
                "grid": repr(FORMATS.get(storage.format)),
                "settings": settings,
            }
            sweep = Sweep(name, contender, points(contender.rates))
            run_missing(raw, fixed, workload, sweep, budget)
    print(bits_report(options.folder))


def rows() -> Iterator[tuple[str, Storage, Contender]]:
    """Yields every optimizer with every way to store its weights."""
    for storage in STORAGES:
        how = partial(
            stored,
            format=FORMATS.get(storage.format),
            rounding="stochastic" if storage.rounding == "-" else storage.rounding,
            moment_bits=storage.moments,
        )
        yield "madam", storage, how("madam")
        if storage.moments == 32:
            yield "adam", storage, how("adam")


def bits_table(runs: pd.DataFrame) -> str:
    """Returns median accuracies in percent, Markdown, from the records alone.

    Args:
      runs: records, as read.
    """
    rows = []
    keys = ["format", "rounding", "moments"]
    for storage, group in runs.groupby(keys, sort=False):
        row = dict(zip(("weights", "rounding", "moments"), storage, strict=True))
        for (workload, optimizer), cell in group.groupby(["workload", "optimizer"]):
            row[f"{workload.split()[-1]} {optimizer}"] = (
                f"{100 * cell['accuracy'].median():.2f}"
                f" ({100 * cell['accuracy'].min():.2f} to"
                f" {100 * cell['accuracy'].max():.2f})"
            )
        rows.append(row)
    return markdown(rows)


def bits_figure(runs: pd.DataFrame) -> Figure:
    """Draws accuracy against bits per weight, one panel per network.

    Args:
      runs: records, as read.
    """
    runs = runs[runs["moments"] == 32]
    workloads = runs["workload"].unique()
    fig = Figure(
        figsize=(max(4.5, WIDTH / 2 * len(workloads)), 4.6), layout="constrained"
    )
    panels = fig.subplots(1, len(workloads), squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        here = runs[runs["workload"] == workload]
        for (family, rounding, optimizer), style in LINES.items():
            line = here[
                (here["optimizer"] == optimizer)
                & (here["rounding"] == rounding)
                & here["format"].str.startswith(f"{family} ")
            ]
            width = line["format"].str.split().str[-1].astype(int)
            median = 100 * line.groupby(width)["accuracy"].median()
            label = f"{optimizer}, {family}, {rounding}"
            axes.plot(median.index, median, label=label, **style)
        for optimizer, style in (("madam", "-"), ("adam", ":")):
            floats = here[
                (here["format"] == "float32") & (here["optimizer"] == optimizer)
            ]
            level = 100 * floats["accuracy"].median()
            axes.axhline(level, c="0.6", ls=style, lw=1, label=f"{optimizer}, float32")
        axes.set(title=workload, xlabel="bits a weight", xticks=[4, 6, 8, 16])
        axes.set_ylim(bottom=max(60, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    return fig


bits_report = Report("bits", bits_table, bits_figure)
