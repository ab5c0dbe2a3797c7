"""Every optimizer's step by XLA's compilers, for chips that need not be there."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding

import madax
from benchmarks.compilers import programs
from benchmarks.compilers.chips import CHIPS, ENVIRONMENT, compiler, footprint
from benchmarks.compilers.compiled_report import compiled_report
from benchmarks.lib import records
from benchmarks.lib.choices import check_choices
from benchmarks.lib.contender import Contender
from benchmarks.lib.formats import LOG_8, MOMENTS_8
from benchmarks.lib.optimizers import BASELINE, RIVALS, TIMED, UNTUNED, codes_adam
from benchmarks.lib.steps import ShapedStep, Tree, nbytes
from benchmarks.models import gpt2

_fed_back = partial(codes_adam, error_feedback=True)
_fed_back_8 = partial(_fed_back, moment_format=MOMENTS_8)
# With rows that take too long to be timed as well.
OPTIMIZERS = TIMED | {
    "madam, floor, b1": UNTUNED["madam floor b1"],
    "lns_madam": Contender(madax.papers.lns_madam, (2**-7,)),
    "native 8 adam, error feedback": Contender(
        _fed_back, (1e-3,), LOG_8, grads=jnp.bfloat16
    ),
    "native 8 adam, 8-bit state, error feedback": Contender(
        _fed_back_8, (1e-3,), LOG_8, grads=jnp.bfloat16
    ),
    **RIVALS,
}
MAIN = (BASELINE, "madam", "native 16", "native 8, 8-bit v", "native 8 adam")


def leaves(count: int, contender: Contender) -> ShapedStep:
    """Returns the step alone, of 16.8 M parameters in matrices of one size."""
    weights = [jax.ShapeDtypeStruct((2**16 // count, 256), jnp.float32)] * count
    return _alone(contender, contender.store, weights)


def transformer(size: str, contender: Contender) -> ShapedStep:
    """Returns the step alone, of all leaves of a network."""
    weights = jax.eval_shape(partial(gpt2.init, gpt2.SIZES[size], jax.random.key(0)))
    return _alone(contender, contender.store, weights)


def stacked(size: str, contender: Contender) -> ShapedStep:
    """Returns the step alone, of a network whose layers are stacked."""
    weights = madax.split_layers(gpt2.shaped(gpt2.SIZES[size]), "blocks").params
    return _alone(contender, contender.store_stack, weights)


def _alone(
    contender: Contender,
    store: Callable[[Tree], Tree],
    weights: Tree,
) -> ShapedStep:
    params = jax.eval_shape(store, weights)
    grads = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, contender.grads), weights
    )
    state = jax.eval_shape(contender.tx.init, params)
    return ShapedStep(params, state, grads, contender.step)


def train_step(size: str, batch: int, length: int, contender: Contender) -> ShapedStep:
    """Returns a whole train step."""
    return gpt2.whole_step(contender, gpt2.SIZES[size], batch, length)


TRAIN = "train step of GPT-2 124M"
TREES: dict[str, Callable[[Contender], ShapedStep]] = {
    "1 leaf": partial(leaves, 1),
    "4 leaves": partial(leaves, 4),
    "GPT-2 124M": partial(transformer, "124M"),
    "GPT-2 124M, layers stacked": partial(stacked, "124M"),
    TRAIN: partial(train_step, "124M", 8, 1024),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile.

    Attributes:
      chip: key of ``chips.CHIPS``, or "CPU".
      tree: key of ``TREES``.
      optimizer: key of ``OPTIMIZERS``.
    """

    chip: str
    tree: str
    optimizer: str


def jobs(profile: str) -> Iterator[Job]:
    """Yields what to compile, what matters most first."""

    def each(*names: Iterable[str]) -> Iterator[Job]:
        return (Job(*these) for these in itertools.product(*names))

    if profile == "smoke":
        yield from each(["CPU"], ["4 leaves"], MAIN[:2])
        return
    chips, whole = ["TPU v5e", "H100"], list(TREES)[2:4]
    yield from each(chips, ["4 leaves"], OPTIMIZERS)
    yield from each([*chips, "CPU"], whole, MAIN)
    if profile == "full":
        yield from each(chips, [TRAIN], MAIN)
        others = ["TPU v5p", "TPU v6e", "H200", "B200"]
        yield from each(others, ["4 leaves"], OPTIMIZERS)
        yield from each([*chips, *others, "CPU"], TREES, OPTIMIZERS)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def compiled(
    out: Path = Path("benchmarks/results/compiled"),
    *,
    profile: Literal["smoke", "quick", "full"] = "quick",
    chips: tuple[str, ...] = (),
    trees: tuple[str, ...] = (),
    optimizers: tuple[str, ...] = (),
) -> None:
    """Compile the step of every optimizer for TPUs and GPUs; run nothing.

    Takes the compilers of TPUs and GPUs (``pip install '.[compilers]'``), but neither
    a TPU nor a GPU. What the records have is not compiled again: remove them when the
    code has changed.

    Args:
        out: Folder for compiled.jsonl, .md and .png.
        profile: smoke takes seconds and no such compiler, quick ten minutes, full hours
            on two CPU cores.
        chips: Some of the profile's; all by default.
        trees: Some of the profile's parameters to compile steps of; all by default.
        optimizers: Some of the profile's; all by default.
    """
    raw = records.file(out, "compiled")
    wanted = list(dict.fromkeys(jobs(profile)))
    for field, names in (("chip", chips), ("tree", trees), ("optimizer", optimizers)):
        known = sorted({getattr(job, field) for job in wanted})
        check_choices(f"{field}s", names, known)
        wanted = [job for job in wanted if not names or getattr(job, field) in names]
    for chip in sorted({job.chip for job in wanted}):
        if compiler(chip) is None:
            raise ModuleNotFoundError(
                f"no compiler for {chip}: pip install '.[compilers]', or choose "
                "other chips."
            )
    while todo := [j for j in wanted if not records.find(raw, dataclasses.asdict(j))]:
        in_a_process(raw, todo)
    print(compiled_report(out))


def in_a_process(raw: Path, jobs: Sequence[Job]) -> None:
    """Compiles in another process; if a compiler ends that, records it, too."""
    text = json.dumps([dataclasses.asdict(job) for job in jobs])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compilers.compiled", str(raw), text],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    left = [j for j in map(dataclasses.asdict, jobs) if not records.find(raw, j)]
    if left:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        by = {"compiler": compiler(left[0]["chip"])}
        records.append(raw, left[0] | by | {"error": f"{done.returncode}: {last}"})


def compile_all(raw: Path, jobs: Sequence[Job]) -> None:
    """Compiles, and appends the records."""
    for job in jobs:
        print(job.chip, job.tree, job.optimizer, sep=", ", flush=True)
        try:
            sharding = _sharding(job.chip)
            result = measure(TREES[job.tree](OPTIMIZERS[job.optimizer]), sharding)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
        by = {"compiler": compiler(job.chip)}
        records.append(raw, dataclasses.asdict(job) | by | result)


@functools.cache
def _sharding(chip: str) -> SingleDeviceSharding:
    """Returns where shapes are put, with its compiler loaded."""
    device = jax.devices("cpu")[0] if chip == "CPU" else CHIPS[chip].devices()[0]
    sharding = SingleDeviceSharding(device)
    measure(leaves(1, TIMED["sgd"]), sharding)
    return sharding


def measure(step: ShapedStep, sharding: SingleDeviceSharding) -> records.Record:
    """Compiles a step, for shapes on that device, and returns what can be told of it.

    Returns:
      Numbers of ``parameters``, of ``leaves`` and of operations in ``stablehlo``; the
      ``floor``, bytes of what must be read or written; ``lowering_s``, ``compile_s``
      and ``cpu_s``, processor seconds of both, each the least of up to three times;
      those of ``programs.Counts`` and of ``chips.footprint``.
    """
    times: list[tuple[float, float, float]] = []
    while True:
        processor, begin = sum(os.times()[:4]), time.perf_counter()
        lowered = step.lower(sharding)
        middle = time.perf_counter()
        program = lowered.compile()
        end = time.perf_counter()
        processor = sum(os.times()[:4]) - processor
        times.append((middle - begin, end - middle, processor))
        if len(times) == 3 or sum(t[0] + t[1] for t in times) >= 2:
            break
    lowering, compiling, processor = map(min, zip(*times, strict=True))
    weights = jax.tree.leaves(
        step.params, is_leaf=lambda x: isinstance(x, madax.QuantizedArray)
    )
    return {
        "parameters": sum(w.size for w in weights),
        "leaves": len(weights),
        "floor": 2 * nbytes((step.params, step.state)) + nbytes(step.data),
        "stablehlo": stablehlo(lowered),
        "lowering_s": round(lowering, 3),
        "compile_s": round(compiling, 3),
        "cpu_s": round(processor, 3),
        **dataclasses.asdict(programs.count(program.as_text() or "")),
        **footprint(program),
    }


def stablehlo(lowered: jax.stages.Lowered) -> int:
    """Returns the number of operations that the compiler is given."""
    return lowered.as_text().count(" stablehlo.")


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), [Job(**job) for job in json.loads(sys.argv[2])])
