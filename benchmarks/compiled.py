"""What XLA's compilers make of every optimizer's step, for chips that are not there."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd
import tyro
from flax import nnx
from jax.sharding import SingleDeviceSharding

import madax
from benchmarks import gpt2, memory, programs, records
from benchmarks.compilers import CHIPS, ENVIRONMENT, footprint
from benchmarks.rows import BASELINE, ROWS, Row
from benchmarks.style import markdown

# Shapes of parameters, of the state, of gradients or tokens; and the step.
Work = tuple[Any, Any, Any, Callable[..., Any]]

PARAMETERS = 2**24
TRAIN = {"batch": 8, "length": 1024}


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile.

    Attributes:
      chip: key of ``compilers.CHIPS``, or "CPU".
      tree: key of ``TREES``.
      optimizer: key of ``ROWS``.
    """

    chip: str
    tree: str
    optimizer: str


def leaves(count: int, row: Row) -> Work:
    """Returns the step alone, of matrices of one size."""
    shape = (PARAMETERS // count // 256, 256)
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
    return _alone(row, row.quantize, weights)


def transformer(size: str, row: Row) -> Work:
    """Returns the step alone, of all leaves of a network."""
    weights = jax.eval_shape(partial(gpt2.init, gpt2.SIZES[size], jax.random.key(0)))
    return _alone(row, row.quantize, weights)


def stacked(size: str, row: Row) -> Work:
    """Returns the step alone, of a network with its layers' leaves stacked."""
    model = nnx.eval_shape(lambda: gpt2.GPT2(gpt2.SIZES[size], nnx.Rngs(0)))
    return _alone(row, row.quantize_stack, madax.split_layers(model, "blocks").params)


def _alone(row: Row, quantize: Callable[[Any], Any], weights: Any) -> Work:
    params = jax.eval_shape(quantize, weights)
    grads = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, row.grads), weights)
    return params, jax.eval_shape(row.tx.init, params), grads, row.step


def train_step(size: str, row: Row) -> Work:
    """Returns a whole train step."""
    params, state, step, tokens = memory.whole_work(row, gpt2.SIZES[size], **TRAIN)
    return params, state, tokens, step


TREES: dict[str, Callable[[Row], Work]] = {
    "1 leaf": partial(leaves, 1),
    "4 leaves": partial(leaves, 4),
    "GPT-2": partial(transformer, "124M"),
    "GPT-2, stacked": partial(stacked, "124M"),
    "train step of GPT-2": partial(train_step, "124M"),
}


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def compiled(
    out: Path = Path("benchmarks/results/compiled"),
    *,
    chips: tuple[str, ...] = ("TPU v5e", "H100"),
    trees: tuple[str, ...] = ("4 leaves",),
    optimizers: tuple[str, ...] = tuple(ROWS),
) -> None:
    """Compile the step of every optimizer for TPUs and GPUs; run nothing.

    Takes the compilers of TPUs and GPUs (``pip install madax[compilers]``), but neither
    a TPU nor a GPU. What the records have is not compiled again.

    Args:
        out: Folder for compiled.jsonl, .md and .png.
        chips: What to compile for.
        trees: Parameters to compile steps of.
        optimizers: Names of optimizers.
    """
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "compiled.jsonl"
    for chip in chips:
        jobs = [Job(chip, tree, name) for tree in trees for name in optimizers]
        while todo := [j for j in jobs if not records.find(raw, dataclasses.asdict(j))]:
            _in_a_process(raw, todo)
    print(compiled_report(out))


def _in_a_process(raw: Path, jobs: Sequence[Job]) -> None:
    """Compiles, for one chip; the job is recorded in which a compiler ends it all."""
    text = json.dumps([dataclasses.asdict(job) for job in jobs])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", str(raw), text],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for job in map(dataclasses.asdict, jobs):
        if done.returncode and not records.find(raw, job):
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            records.append(raw, job | {"error": last})
            break


def compile_all(raw: Path, jobs: Sequence[Job]) -> None:
    """Compiles for one chip, and appends the records."""
    sharding = SingleDeviceSharding(_device(jobs[0].chip))
    # The first program of a process waits for much to be loaded.
    measure(leaves(1, ROWS["sgd"]), sharding)
    for job in jobs:
        print(job.chip, job.tree, job.optimizer, sep=", ", end=": ", flush=True)
        try:
            result = measure(TREES[job.tree](ROWS[job.optimizer]), sharding)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        records.append(raw, dataclasses.asdict(job) | result)
        print(result, flush=True)


def _device(chip: str) -> Any:
    return jax.devices("cpu")[0] if chip == "CPU" else CHIPS[chip].devices()[0]


def measure(work: Work, sharding: Any) -> dict[str, Any]:
    """Compiles a step, for shapes on that device, and returns what can be told of it.

    Returns:
      Numbers of ``parameters``, ``leaves`` and StableHLO ``operations``; the ``floor``,
      bytes of what must be read or written; ``lowering_s`` and ``compile_s``, the least
      of up to three times, and ``cpu_s``, processor seconds of both; those of
      ``programs.Work`` and of ``compilers.footprint``.
    """
    params, state, data, step = work
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, state, data),
    )
    times: list[tuple[float, float, float]] = []
    while len(times) < 3 and sum(t[0] + t[1] for t in times) < 2:
        cpu, begin = sum(os.times()[:4]), time.perf_counter()
        # Another function each time, or JAX would know what it is to be.
        lowered = jax.jit(lambda *x: step(*x), donate_argnums=(0, 1)).lower(*args)
        middle = time.perf_counter()
        program = lowered.compile()
        end = time.perf_counter()
        times.append((middle - begin, end - middle, sum(os.times()[:4]) - cpu))
    lowering, compiling, processor = map(min, zip(*times, strict=True))
    done = programs.work(program.as_text())
    is_step = data is not None and jax.tree.structure(data).num_leaves > 1
    del is_step
    return {
        "parameters": _count(params),
        "leaves": len(jax.tree.leaves(params, is_leaf=_is_codes)),
        "floor": 2 * _nbytes((params, state)) + _nbytes(data),
        "stablehlo": lowered.as_text().count(" stablehlo."),
        "lowering_s": round(lowering, 3),
        "compile_s": round(compiling, 3),
        "cpu_s": round(processor, 3),
        **dataclasses.asdict(done),
        **footprint(program),
    }


def _is_codes(x: Any) -> bool:
    return isinstance(x, madax.QuantizedArray)


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params, is_leaf=_is_codes))


def _nbytes(tree: Any) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def compiled_report(folder: Path) -> str:
    """Writes the table and the figure from a folder's records; returns the table."""
    runs = records.read(folder / "compiled.jsonl")
    text = compiled_table(runs)
    (folder / "compiled.md").write_text(text, encoding="utf-8")
    return text


def compiled_table(runs: pd.DataFrame) -> str:
    """Returns the numbers in Markdown, a table a chip and tree, from records alone."""
    text = "Compiled for, not run.\n"
    for (chip, tree), group in runs.groupby(["chip", "tree"], sort=False):
        rows = group.to_dict("records")
        adam = next((r for r in rows if r["optimizer"] == BASELINE), {})
        text += f"\n**{chip}, {tree}**\n\n"
        text += markdown([_row(run, adam) for run in rows]) + "\n"
    return text


def _row(run: Any, adam: Any) -> dict[str, str]:
    n = run["parameters"]
    if pd.isna(n):
        return {"optimizer": run["optimizer"], "kernels": str(run["error"])[:60]}
    return {
        "optimizer": run["optimizer"],
        "kernels": f"{run['kernels']:.0f}",
        "bytes / parameter": f"{run['bytes'] / n:.2f}",
        "floor": f"{run['floor'] / n:.2f}",
        "operations / parameter": f"{run['operations'] / n:.1f}",
        "cycles": f"{run['cycles'] / 1e3:.0f} k",
        "cycles / adam": f"{run['cycles'] / adam['cycles']:.2f}"
        if adam and adam["cycles"]
        else "",
        "StableHLO": f"{run['stablehlo']:.0f}",
        "lowering s": f"{run['lowering_s']:.2f}",
        "compile s": f"{run['compile_s']:.2f}",
        "both, CPU s": f"{run['cpu_s']:.2f}",
        "both / adam": f"{run['cpu_s'] / adam['cpu_s']:.2f}" if adam else "",
        "peak MB": f"{run['peak'] / 1e6:.1f}",
    }


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), [Job(**job) for job in json.loads(sys.argv[2])])
