"""The memory of a training run, measured without running it."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import pandas as pd
import tyro
from flax import nnx
from tqdm import tqdm

import madax
from benchmarks.compilers import chips
from benchmarks.lib import records
from benchmarks.lib.rows import BASELINE, ROWS, Row
from benchmarks.lib.style import markdown
from benchmarks.models import gpt2
from benchmarks.systems.speed import Step, device_name, train_step

# Shapes of parameters and of the state, the step, and the shape of tokens.
Work = tuple[optax.Params, Any, Step, Any]

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
    folder = out / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "memory.jsonl"
    raw.unlink(missing_ok=True)
    model, batch, length = PROFILES[profile]
    jobs = [(name, False) for name in ROWS] + [(name, True) for name in LAYERWISE]
    for name, by_layer in tqdm(jobs, desc=f"GPT-2 {model}"):
        work = {"model": f"GPT-2 {model}", "batch": batch, "length": length}
        make = layerwise_work if by_layer else whole_work
        used = footprint(*make(ROWS[name], gpt2.SIZES[model], batch, length))
        records.append(
            raw, work | {"optimizer": name, "layer by layer": by_layer} | used
        )
    print(memory_report(folder))


def whole_work(row: Row, size: gpt2.Size, batch: int, length: int) -> Work:
    """Returns the usual train step, which decodes all weights first."""
    weights = jax.eval_shape(partial(gpt2.init, size, jax.random.key(0)))
    step, tokens = train_step(size, batch, length, row, weights)
    params = jax.eval_shape(row.quantize, weights)
    return params, jax.eval_shape(row.tx.init, params), step, tokens


def layerwise_work(row: Row, size: gpt2.Size, batch: int, length: int) -> Work:
    """Returns a step by ``madax.layerwise``."""
    model = nnx.eval_shape(lambda: gpt2.GPT2(size, nnx.Rngs(0)))
    split = madax.split_layers(model, "blocks")

    def loss(ends, x, tokens):
        return gpt2.cross_entropy(split.ends(ends).logits(x), tokens[:, 1:])

    _, step = run = madax.layerwise(
        row.tx,
        lambda ends, tokens: split.ends(ends).embed(tokens[:, :-1]).astype(row.grads),
        split.layer,
        loss,
        dtype=row.grads,
    )
    params = jax.eval_shape(row.quantize_stack, split.params)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    return params, jax.eval_shape(run.init, params), step, tokens


def footprint(
    params: optax.Params, state: Any, step: Step, tokens: Any
) -> dict[str, int]:
    """Compiles a train step for shapes alone, and reads off its memory.

    Args:
      params: shapes of the parameters.
      state: shapes of the optimizer state.
      step: from parameters, state and tokens to parameters and state.
      tokens: their shape.

    Returns:
      Bytes: ``params`` and ``state``; XLA's ``arguments``, ``temporaries``, and
      ``peak``, which is both together with what is returned and not donated.
    """
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)
    used = chips.footprint(lowered.compile())
    return {"params": _nbytes(params), "state": _nbytes(state), **used}


def _nbytes(tree: Any) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def memory_report(folder: Path) -> str:
    """Writes the table from a folder's records, and returns it."""
    text = memory_table(records.read(folder / "memory.jsonl"))
    (folder / "memory.md").write_text(text, encoding="utf-8")
    return text


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
