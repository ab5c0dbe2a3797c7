"""The demo: Madam beside Adam and SGD, in a minute or two on a laptop."""

import dataclasses
from pathlib import Path

import tyro

from benchmarks import records, report
from benchmarks.cost import cost
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.train import Budget, train
from benchmarks.workloads.digits import digits

MULTIPLIERS = (0.1, 1.0, 10.0)
SMOKE = Budget(steps=80, evaluations=4, seeds=3)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def demo(out: Path = Path("benchmarks/results/demo"), *, smoke: bool = False) -> None:
    """Compare the optimizers on small images of digits, on a CPU in a minute or two.

    Every optimizer runs at its default learning rate, and at a tenth and ten times of
    it, with the same seeds. Prints a table; writes a figure and the records of all
    runs, in place of those of the last demo.

    Args:
        out: Folder for demo.png and demo.jsonl.
        smoke: Take seconds: too few steps to judge by, enough to see that it works.
    """
    budget = SMOKE if smoke else Budget()
    out.mkdir(parents=True, exist_ok=True)
    raw, image = out / "demo.jsonl", out / "demo.png"
    raw.unlink(missing_ok=True)

    workload = digits()
    for name, optimizer in OPTIMIZERS.items():
        measured = cost(workload, optimizer)
        rates = [optimizer.rate * multiplier for multiplier in MULTIPLIERS]
        for run in train(workload, optimizer, rates, budget, label=name):
            settings = dataclasses.asdict(budget) | {"schedule": "cosine to zero"}
            fixed = {"workload": workload.name, "optimizer": name, "settings": settings}
            place = {"multiplier": MULTIPLIERS[rates.index(run["rate"])]}
            records.append(raw, fixed | place | run | measured)

    runs = records.read(raw)
    report.figure(runs, image)
    print(f"\n{report.table(runs)}\n")
    print(f"Test accuracy, the median of {budget.seeds} seeds.")
    print(f"Figure:  {image}\nRecords: {raw}")
