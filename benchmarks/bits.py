"""Accuracy against bits a weight: formats and roundings, Madam and Adam alike."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import optax
import pandas as pd
import tyro
from matplotlib.figure import Figure

import madax
from benchmarks import records
from benchmarks.optimizers import OPTIMIZERS, Optimizer
from benchmarks.train import Budget, train
from benchmarks.workloads.fashion_mnist import NETWORKS, fashion_mnist

# A narrower range is a finer grid, of less rounding noise: two decades of weights at
# 8 bits, and three, "wide", to see what the range costs.
FORMATS: dict[str, madax.Format] = {
    "log 16": madax.LogFormat.from_dynamic_range(bits=16, ratio=1000),
    "log 8": madax.LogFormat.from_dynamic_range(bits=8, ratio=100),
    "wide log 8": madax.LogFormat.from_dynamic_range(bits=8, ratio=1000),
    "log 6": madax.LogFormat.from_dynamic_range(bits=6, ratio=100),
    "log 4": madax.LogFormat.from_dynamic_range(bits=4, ratio=30),
    "symlog 8": madax.SymlogFormat(bits=8, linear_range=1 / 3),
    "uniform 8": madax.UniformFormat(bits=8),
    "uniform 6": madax.UniformFormat(bits=6),
    "uniform 4": madax.UniformFormat(bits=4),
}
BUDGETS = {
    "mlp": Budget(steps=3000, evaluations=10, batch_size=128, seeds=3),
    "cnn": Budget(steps=1000, evaluations=10, batch_size=64, seeds=3),
}
SMOKE = Budget(steps=20, evaluations=2, batch_size=64, seeds=1)

# Told apart without colour, too: the marker is the format, the line the rounding.
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
    """How weights and moments are stored: one row of the table.

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
    *(Storage(name, "stochastic") for name in FORMATS),
    *(Storage(name, "nearest") for name in FORMATS),
    Storage("log 8", "stochastic", moments=8),
    Storage("log 16", "stochastic", moments=8),
]


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def bits(
    out: Path = Path("benchmarks/results/bits"),
    *,
    data: Path | None = None,
    smoke: bool = False,
) -> None:
    """Train Fashion-MNIST on weights of 16, 8, 6 and 4 bits, with Madam and Adam.

    Every optimizer runs at its default learning rate, in float32 and in every format
    and rounding, with the same seeds and schedule. Takes an hour or two on two CPU
    cores; runs already recorded are not run again.

    Args:
        out: Folder for bits.png, bits.md and bits.jsonl.
        data: Folder of Fashion-MNIST's IDX files; by default where Debian's package
            dataset-fashion-mnist puts them, else Hugging Face.
        smoke: Take a minute: too few steps to judge by, enough to see that it works.
    """
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "bits.jsonl"
    for network in NETWORKS:
        budget = SMOKE if smoke else BUDGETS[network]
        settings = dataclasses.asdict(budget) | {"schedule": "cosine to zero"}
        workload = fashion_mnist(network, data)
        for name, storage, optimizer in rows():
            fixed = {
                "workload": workload.name,
                "optimizer": name,
                **dataclasses.asdict(storage),
                "grid": repr(FORMATS.get(storage.format)),
                "settings": settings,
            }
            done = records.seeds(raw, fixed)
            if len(done) < budget.seeds:
                label = f"{network} {name} {storage.format} {storage.rounding}"
                runs = train(workload, optimizer, [optimizer.rate], budget, label=label)
                for run in runs:
                    if run["seed"] not in done:
                        records.append(raw, fixed | run)

    runs = records.read(raw)
    table = bits_table(runs)
    (out / "bits.md").write_text(f"{table}\n", encoding="utf-8")
    bits_figure(runs, out / "bits.png")
    print(f"\n{table}\n\nFigure:  {out / 'bits.png'}\nRecords: {raw}")


def rows() -> Iterator[tuple[str, Storage, Optimizer]]:
    """Yields every optimizer with every way to store its weights."""
    for storage in STORAGES:
        for name in ("madam", "adam"):
            if name == "madam" or storage.moments == 32:
                yield name, storage, stored(name, storage)


def stored(name: str, storage: Storage) -> Optimizer:
    """Returns an optimizer that trains weights and moments stored that way.

    Args:
      name: "madam" or "adam".
      storage: how.
    """
    base = OPTIMIZERS[name]
    if storage.format == "float32" and storage.moments == 32:
        return base
    format = FORMATS.get(storage.format)
    rounding = "stochastic" if storage.rounding == "-" else storage.rounding

    def make(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        if name == "adam":
            return madax.with_quantized_params(base.make(rate), rounding=rounding)
        moments = madax.MomentFormat(storage.moments) if storage.moments < 32 else None
        return madax.madam(rate, rounding=rounding, moment_format=moments)

    def quantize(params: optax.Params) -> optax.Params:
        return params if format is None else madax.quantize_params(params, format)

    return Optimizer(make, base.rate, quantize)


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
    return pd.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True)


def bits_figure(runs: pd.DataFrame, path: Path) -> None:
    """Draws accuracy against bits a weight, one panel a network, into an image file.

    Args:
      runs: records, as read.
      path: the image file.
    """
    runs = runs[runs["moments"] == 32]
    workloads = runs["workload"].unique()
    fig = Figure(figsize=(4.5 * len(workloads), 4), layout="constrained")
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
    fig.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    fig.savefig(path, dpi=150)
