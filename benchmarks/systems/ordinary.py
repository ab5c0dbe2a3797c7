"""The memory of an ordinary train step on codes, measured without running it."""

import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pandas as pd
from tqdm import tqdm

import madax
from benchmarks.compilers import chips
from benchmarks.lib import records
from benchmarks.lib.contender import Contender
from benchmarks.lib.formats import SYMLOG_8
from benchmarks.lib.optimizers import madam_8
from benchmarks.lib.steps import ShapedStep, Tree, apply
from benchmarks.lib.style import Report, markdown
from benchmarks.models import decoder

SIZE, BATCH, LENGTH = decoder.Size(2048, 8, 256, 1024, 8, 4), 2, 128
MADAM = Contender(madam_8, (0.02,), SYMLOG_8)
# What is trained, and the dtype of the network and of gradients.
ROWS = {
    "optax.adamw, float32": (Contender(optax.adamw, (1e-3,)), jnp.float32),
    "madam, codes, 8-bit moments": (MADAM, jnp.float32),
    "the same in bfloat16": (MADAM, jnp.bfloat16),
}
# What is planned for a program's memory is planned before these.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# XLA's default for a CPU runs at once what can run at once.
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def ordinary(out: Path = Path("benchmarks/results/memory")) -> None:
    """Count the bytes of an ordinary train step of a Llama with a list of layers.

    XLA's own count for the compiled step, as JAX's users write it: the gradients of
    all weights, then the update. Layers are computed again on the way back, or not.
    Operations go in XLA's order for a CPU, or in the one that takes the least memory.

    Args:
        out: Folder of a folder for this device: ordinary.jsonl and .md. Takes six
            minutes on a CPU core.
    """
    raw = records.file(out / records.device_name(), "ordinary", fresh=True)
    size = {"parameters": decoder.count(SIZE), "layers": SIZE.layers}
    size |= {"batch": BATCH, "length": LENGTH}
    either = (False, True)
    for name, remat, least in tqdm(list(itertools.product(ROWS, either, either))):
        used = footprint(name, remat, least)
        case = {"step": name, "remat": remat, "least_memory": least}
        records.append(raw, case | size | used)
    print(ordinary_report(raw.parent))


def footprint(name: str, remat: bool, least: bool) -> dict[str, int]:
    """Returns the bytes of XLA's arguments, temporaries and peak, by the row."""
    program = ordinary_step(name, remat).lower()
    options = QUICKLY | (LEAST_MEMORY if least else {})
    return chips.footprint(program.compile(compiler_options=options))


def ordinary_step(name: str, remat: bool) -> ShapedStep:
    """Returns the train step of a row, with its layers under remat or not."""
    contender, dtype = ROWS[name]
    layer = partial(decoder.layer, SIZE)
    layer = jax.checkpoint(layer) if remat else layer

    def start(key: jax.Array) -> Tree:
        floats = decoder.init(SIZE, key)
        stack = floats["layers"]
        layers = [{name: w[i] for name, w in stack.items()} for i in range(SIZE.layers)]
        return contender.store({"ends": floats["ends"], "layers": layers})

    def loss(params: Tree, tokens: jax.Array) -> jax.Array:
        x = decoder.embed(params["ends"], tokens)
        for w in params["layers"]:
            x = layer(w, x)
        return decoder.loss(madax.dequantize_params(params["ends"]), x, tokens)

    def step(params: Tree, state: Tree, tokens: jax.Array) -> tuple:
        value, grads = madax.value_and_grad(loss, dtype=dtype)(params, tokens)
        return *apply(contender.tx, params, state, grads), value

    params = jax.eval_shape(start, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    return ShapedStep(params, jax.eval_shape(contender.tx.init, params), tokens, step)


def ordinary_table(runs: pd.DataFrame) -> str:
    """Returns bytes a parameter in Markdown, from the records alone."""
    first = runs.iloc[0]
    rows = []
    for name, cell in runs.groupby("step", sort=False):
        used = cell.set_index(["remat", "least_memory"])
        kept, peak = (used[x] / first["parameters"] for x in ("arguments", "peak"))
        rows.append(
            {
                "step": name,
                "kept between steps": f"{kept.iloc[0]:.1f}",
                "without remat": f"{peak[False, False]:.1f}",
                "without, least memory": f"{peak[False, True]:.1f}",
                "with remat": f"{peak[True, False]:.1f}",
                "with, least memory": f"{peak[True, True]:.1f}",
            }
        )
    environment = first["environment"]
    return (
        "Bytes a parameter, arguments and temporaries; "
        f"{first['parameters'] / 1e6:.1f} M parameters, {first['layers']} layers, "
        f"{first['batch']} x {first['length']} tokens, compiled for "
        f"{environment['device']} with JAX {environment['jax']}.\n\n"
        f"{markdown(rows, numbers=True)}\n"
    )


ordinary_report = Report("ordinary", ordinary_table)
