"""The memory of a training run, measured without running it."""

from pathlib import Path
from typing import Literal

import pandas as pd
import tyro
from tqdm import tqdm

from benchmarks.compilers import chips
from benchmarks.lib import records
from benchmarks.lib.optimizers import BASELINE, TIMED
from benchmarks.lib.steps import ShapedStep, nbytes
from benchmarks.lib.style import Report, markdown
from benchmarks.models import gpt2

# The network, sequences per step, tokens per sequence. The batch is small, so that
# weights and what goes with them are most of the memory.
PROFILES = {"smoke": ("tiny", 2, 32), "full": ("124M", 1, 128)}
LAYERWISE = ("adam", "madam", "native 16, 8-bit v", "native 8, 8-bit v")


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def memory(
    out: Path = Path("benchmarks/results/memory"),
    *,
    profile: Literal["smoke", "full"] = "full",
) -> None:
    """Count the bytes of a 124 M-parameter Transformer in training, per optimizer.

    Bytes of the parameters and the optimizer state, from their arrays; and XLA's own
    count for the compiled train step, of one sequence of 128 tokens: nothing is run.
    Some optimizers are counted twice: with all weights decoded at once, and by layer.

    Args:
        out: Folder of a folder for this device: memory.jsonl and .md.
        profile: smoke takes seconds, full ten minutes on two CPU cores.
    """
    raw = records.file(out / records.device_name(), "memory", fresh=True)
    model, batch, length = PROFILES[profile]
    jobs = [(name, False) for name in TIMED] + [(name, True) for name in LAYERWISE]
    for name, by_layer in tqdm(jobs, desc=f"GPT-2 {model}"):
        work = {"model": f"GPT-2 {model}", "batch": batch, "length": length}
        make = gpt2.layerwise_step if by_layer else gpt2.whole_step
        used = footprint(make(TIMED[name], gpt2.SIZES[model], batch, length))
        records.append(
            raw, work | {"optimizer": name, "layer by layer": by_layer} | used
        )
    print(memory_report(raw.parent))


def footprint(step: ShapedStep) -> dict[str, int]:
    """Compiles a train step for shapes alone, and reads off its memory.

    Returns:
      Bytes: ``params`` and ``state``; XLA's ``arguments``, ``temporaries``, and
      ``peak``, which is both together with what is returned and not donated.
    """
    used = chips.footprint(step.lower().compile())
    return {"params": nbytes(step.params), "state": nbytes(step.state), **used}


def memory_table(runs: pd.DataFrame) -> str:
    """Returns the bytes in Markdown, in MB, from the records alone."""
    first = runs.iloc[0]
    text = (
        f"{first['model']}, {first['batch']} sequence(s) of {first['length']} tokens, "
        f"compiled for {first['environment']['device']}; MB.\n"
    )
    for by_layer, title in (
        (False, "All weights decoded for the step"),
        (True, "One layer decoded at a time, and computed again on the way back"),
    ):
        here = runs[runs["layer by layer"] == by_layer]
        adam = here[here["optimizer"] == BASELINE].iloc[0]
        rows = [
            {
                "optimizer": run["optimizer"],
                **{
                    name: f"{run[name] / 1e6:.0f}"
                    for name in ("params", "state", "temporaries", "peak")
                },
                "peak / adam": f"{run['peak'] / adam['peak']:.2f}",
            }
            for run in here.to_dict("records")
        ]
        text += f"\n**{title}:**\n\n{markdown(rows, numbers=True)}\n"
    return text


memory_report = Report("memory", memory_table)
