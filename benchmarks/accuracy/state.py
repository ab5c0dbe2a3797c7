"""Optimizer state of eight bits against float32, on every workload."""

from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import optax
import pandas as pd
import tyro

import madax
from benchmarks.lib.analysis import at_best, medians, number, spread
from benchmarks.lib.optimizers import FORMATS, UNTUNED, Optimizer, cosine, grid
from benchmarks.lib.profiles import Options
from benchmarks.lib.style import markdown, report
from benchmarks.lib.sweep import Sweep, run_all

EIGHT = madax.MomentFormat(8)
CODES = "symlog 8"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      bytes: kept a parameter, in weights and state.
      optimizer: what is trained.
      against: the row it is to be as good as; None for those in float32.
    """

    bytes: int
    optimizer: Optimizer
    against: str | None = None


def eight_bit(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Stores all of a state but scalars: workloads here are of small leaves."""
    return madax.with_quantized_state(tx, moment_format=EIGHT, where=not_a_number)


def not_a_number(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Which leaves of a state are stored here."""
    del path
    return leaf.ndim > 0


def quantize(params: optax.Params) -> optax.Params:
    """Makes codes of matrices."""
    return madax.quantize_params(params, FORMATS[CODES])


def _adamw8(rate: optax.Schedule) -> optax.GradientTransformation:
    return eight_bit(optax.adamw(rate))


def _adamw_codes(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.with_quantized_params(_adamw8(rate))


def _direction(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.muon_madam(rate, floor=1.0)


def _direction_codes(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.muon_madam(rate, moment_format=EIGHT)


ROWS = {
    "adamw": Row(12, Optimizer(optax.adamw, 0.003)),
    "adamw, 8-bit state": Row(6, Optimizer(_adamw8, 0.003), "adamw"),
    "adamw, 8-bit state and codes": Row(
        3, Optimizer(_adamw_codes, 0.003, quantize), "adamw"
    ),
    "muon": Row(8, UNTUNED["muon"]),
    "muon_madam": Row(8, Optimizer(_direction, 0.03)),
    "muon_madam, 8-bit moments and codes": Row(
        2, Optimizer(_direction_codes, 0.03, quantize), "muon_madam"
    ),
}


def state(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Compare optimizer state of eight bits with float32, on every workload.

    AdamW with its state in eight bits, on floats and on codes; Muon as optax has it;
    and Muon's direction with multiplicative steps, in float32 and in two bytes a
    parameter. Four rates each, with the same seeds and schedule.
    """
    sweeps = []
    for name, row in ROWS.items():
        # From half a decade below the rate of the row to a decade above it.
        rates = grid(row.optimizer.rate, below=1, above=1)[1:]
        sweeps.append(Sweep(name, row.optimizer, cosine(rates)))
    run_all(options.folder / "state.jsonl", options, options.tasks(), sweeps)
    state_report(options.folder)


def state_report(folder: Path) -> None:
    """Writes state.md from the records alone."""
    print(report(folder, "state", state_table))


def state_table(runs: pd.DataFrame) -> str:
    """Returns median errors at the best rate of each row, Markdown.

    Args:
      runs: records, as read.
    """
    cells = medians(runs, ["optimizer", "rate"])
    best = at_best(cells).set_index(["workload", "optimizer"])
    lines = []
    for workload in runs["workload"].unique():
        for name, row in ROWS.items():
            if (workload, name) not in best.index:
                continue
            cell = best.loc[(workload, name)]
            line = {
                "workload": workload,
                "optimizer": name,
                "bytes a parameter": str(row.bytes),
                "rate": number(cell["rate"]),
                "error (seeds)": spread(cell),
            }
            for against in (row.against, "muon"):
                other = best["median"].get((workload, against))
                if other and against != name:
                    change = 100 * (cell["median"] / other - 1)
                    line[f"against {'float32' if against != 'muon' else against}"] = (
                        f"{change:+.1f} %"
                    )
            lines.append(line)
    return markdown(lines)
