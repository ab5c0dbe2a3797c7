"""What a training run takes of memory, without running it."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pandas as pd
import tyro
from tqdm import tqdm

from benchmarks import gpt2, records
from benchmarks.speed import BASELINE, ROWS, Row, device_name, train_step
from benchmarks.style import markdown

# The network, sequences in a step, tokens in a sequence: a small batch, so that weights
# and what goes with them are most of what there is.
PROFILES = {"smoke": ("tiny", 2, 32), "full": ("124M", 1, 128)}


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def memory(
    out: Path = Path("benchmarks/results/memory"),
    *,
    profile: Literal["smoke", "full"] = "full",
) -> None:
    """Count the bytes of a 124 M-parameter Transformer in training, per optimizer.

    Bytes of the parameters and the optimizer state, from their arrays; and XLA's own
    count for the compiled train step, of one sequence of 128 tokens: nothing is run.

    Args:
        out: Folder of a folder for this device: memory.jsonl and .md.
        profile: smoke takes seconds, full ten minutes on two CPU cores.
    """
    folder = out / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "memory.jsonl"
    raw.unlink(missing_ok=True)
    model, batch, length = PROFILES[profile]
    for name, row in tqdm(ROWS.items(), desc=f"GPT-2 {model}"):
        work = {"model": f"GPT-2 {model}", "batch": batch, "length": length}
        used = footprint(row, gpt2.SIZES[model], batch, length)
        records.append(raw, work | {"optimizer": name} | used)
    print(memory_report(folder))


def footprint(row: Row, size: gpt2.Size, batch: int, length: int) -> dict[str, int]:
    """Compiles a train step for arrays that are not there, and reads off its memory.

    Args:
      row: the optimizer.
      size: of the network.
      batch: sequences in a step.
      length: tokens in a sequence.

    Returns:
      Bytes: ``params`` and ``state``; XLA's ``arguments``, ``temporaries``, and
      ``peak``, which is both together with what is returned and not donated.
    """
    weights = jax.eval_shape(partial(gpt2.init, size, jax.random.key(0)))
    params = jax.eval_shape(row.quantize, weights)
    state = jax.eval_shape(row.tx.init, params)
    step, tokens = train_step(size, batch, length, row, weights)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)
    used: Any = compiled.compile().memory_analysis()
    return {
        "params": _nbytes(params),
        "state": _nbytes(state),
        "arguments": used.argument_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "peak": used.argument_size_in_bytes
        + used.temp_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes,
    }


def _nbytes(tree: Any) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def memory_report(folder: Path) -> str:
    """Writes the table from a folder's records, and returns it."""
    text = memory_table(records.read(folder / "memory.jsonl"))
    (folder / "memory.md").write_text(text, encoding="utf-8")
    return text


def memory_table(runs: pd.DataFrame) -> str:
    """Returns the bytes in Markdown, in MB, from the records alone."""
    base = runs[runs["optimizer"] == BASELINE].iloc[0]
    rows = [
        {
            "optimizer": run["optimizer"],
            **{
                name: f"{run[name] / 1e6:.0f}"
                for name in ("params", "state", "temporaries", "peak")
            },
            "peak / adam": f"{run['peak'] / base['peak']:.2f}",
        }
        for run in runs.to_dict("records")
    ]
    device = base["environment"]["device"]
    return (
        f"{base['model']}, {base['batch']} sequence(s) of {base['length']} tokens, "
        f"compiled for {device}; MB.\n\n"
        f"{markdown(rows)}\n"
    )
