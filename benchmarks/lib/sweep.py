"""Sweeps: what is not in the records yet is run, and recorded."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lib import records
from benchmarks.lib.contender import Contender, Point
from benchmarks.lib.profiles import Options, Task
from benchmarks.lib.train import Budget, train
from benchmarks.workloads import Workload


class Sweep(NamedTuple):
    """The runs of a contender on one workload, in one compiled program."""

    optimizer: str
    contender: Contender
    points: Sequence[Point]


def run_missing(
    raw: Path,
    fixed: Mapping[str, Any],
    workload: Workload,
    sweep: Sweep,
    budget: Budget,
    *,
    at_once: int = 32,
    seeds: Sequence[int] = (),
) -> None:
    """Runs a sweep, but for the runs that are in the records; appends to those.

    Args:
      raw: the file of records.
      fixed: what is the same in all runs, for the records.
      workload: what to train.
      sweep: the runs.
      budget: length and number of runs.
      at_once: points to train side by side.
      seeds: of the runs; by default the first ones of the budget.
    """
    seeds = seeds or range(budget.seeds)
    fixed = {"workload": workload.name, "optimizer": sweep.optimizer, **fixed}
    found = records.find(raw, fixed)
    done = {
        i: {run["seed"] for run in found if records.has(run, point)}
        for i, point in enumerate(sweep.points)
    }
    missing = [i for i in done if not done[i].issuperset(seeds)]
    if not missing:
        return
    alike = {"workload": workload.name, "settings": fixed.get("settings")}
    records.check_text(raw, alike, workload.settings.get("data", ""))
    points = [sweep.points[i] for i in missing]
    label = f"{workload.name}, {sweep.optimizer}"
    runs = train(
        workload,
        sweep.contender,
        points,
        budget,
        label=label,
        at_once=at_once,
        seeds=seeds,
    )
    new = [
        fixed | run
        for i, run in zip(missing * len(seeds), runs, strict=True)
        if run["seed"] not in done[i]
    ]
    records.append(raw, *new)


def run_all(
    raw: Path, options: Options, tasks: Iterable[Task], sweeps: Iterable[Sweep]
) -> None:
    """Runs sweeps on workloads.

    Args:
      raw: the file of records.
      options: of the command line.
      tasks: the workloads.
      sweeps: what to run, the same for every workload.
    """
    sweeps = list(sweeps)
    for task in tasks:
        workload = task.make(options.data)
        fixed = settings(task, workload)
        for sweep in sweeps:
            run_missing(raw, fixed, workload, sweep, task.budget, at_once=task.at_once)


def settings(task: Task, workload: Workload) -> dict[str, Any]:
    """Returns what is the same in all runs of a task, for the records."""
    budget: dict[str, Any] = dataclasses.asdict(task.budget)
    del budget["seeds"]  # A run does not depend on how many others there are.
    return {
        "metric": workload.measure.name,
        "settings": budget | {"model": task.model, **workload.settings},
    }
