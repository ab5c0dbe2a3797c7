"""Optimizer state of eight bits against float32, on every workload."""

from dataclasses import replace

import optax
import pandas as pd

import madax
from benchmarks.lib.analysis import at_best, medians, number, spread
from benchmarks.lib.contender import Contender, grid, points
from benchmarks.lib.formats import SYMLOG_8, eight_bit_state
from benchmarks.lib.optimizers import UNTUNED, muon_madam_8, muon_madam_floor
from benchmarks.lib.profiles import Flags
from benchmarks.lib.style import Report, markdown
from benchmarks.lib.sweep import Sweep, run_all


def _adamw_8(rate: optax.Schedule) -> optax.GradientTransformation:
    return eight_bit_state(optax.adamw(rate))


def _adamw_codes(rate: optax.Schedule) -> optax.GradientTransformation:
    return madax.with_quantized_params(_adamw_8(rate))


CONTENDERS = {
    "adamw": Contender(optax.adamw, (0.003,), bytes=12),
    "adamw, 8-bit state": Contender(_adamw_8, (0.003,), bytes=6, against="adamw"),
    "adamw, 8-bit state and codes": Contender(
        _adamw_codes, (0.003,), SYMLOG_8, bytes=3, against="adamw"
    ),
    "muon": replace(UNTUNED["muon"], bytes=8),
    "muon_madam": Contender(muon_madam_floor, (0.03,), bytes=8),
    "muon_madam, 8-bit moments and codes": Contender(
        muon_madam_8, (0.03,), SYMLOG_8, bytes=2, against="muon_madam"
    ),
}


def state(options: Flags) -> None:
    """Compare optimizer state of eight bits with float32, on every workload.

    AdamW with its state in eight bits, on floats and on codes; Muon as optax has it;
    and Muon's direction with multiplicative steps, in float32 and in two bytes a
    parameter. Four rates each, with the same seeds and schedule.
    """
    sweeps = []
    for name, row in CONTENDERS.items():
        # From half a decade below the rate of the row to a decade above it.
        rates = grid(row.rate, below=1, above=1)[1:]
        sweeps.append(Sweep(name, row, points(rates)))
    run_all(options.folder / "state.jsonl", options, options.tasks(), sweeps)
    print(state_report(options.folder))


def state_table(runs: pd.DataFrame) -> str:
    """Returns median errors at the best rate of each row, Markdown.

    Args:
      runs: records, as read.
    """
    cells = medians(runs, ["optimizer", "rate"])
    best = at_best(cells).set_index(["workload", "optimizer"])
    lines = []
    for workload in runs["workload"].unique():
        for name, row in CONTENDERS.items():
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


state_report = Report("state", state_table)
