"""Which model fits which chip: whole train steps, compiled for it and not run."""

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import pandas as pd
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.compilers.chips import (
    CHIPS,
    ENVIRONMENT,
    footprint,
    gathered,
    needed,
)
from benchmarks.lib import records
from benchmarks.lib.contender import Contender
from benchmarks.lib.formats import SYMLOG_8
from benchmarks.lib.optimizers import madam_8
from benchmarks.lib.records import Record
from benchmarks.lib.steps import Functions, Step, Tree
from benchmarks.lib.style import Report, markdown
from benchmarks.models import decoder

# The bytes per parameter of AdamW, whatever the chip: parameters, moments and gradients
# in float32; or in bfloat16, with a copy of the parameters and moments in float32.
ADAMW = 16
Way = Literal["layerwise", "checkpoint", "adam", "mixed"]
WAYS: dict[Way, str] = {
    "layerwise": "madax, a layer at a time",
    "checkpoint": "madax, jax.checkpoint",
    "adam": "optax.adam float32, jax.checkpoint",
    "mixed": "optax.adamw mixed precision, jax.checkpoint",
}
OURS = Contender(madam_8, (1e-3,), SYMLOG_8)
CONTENDERS: dict[Way, Contender] = {
    "layerwise": OURS,
    "checkpoint": OURS,
    "adam": Contender(optax.adam, (1e-3,)),
    "mixed": Contender(optax.adamw, (1e-3,)),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One train step to compile.

    Attributes:
      model: key of ``decoder.SIZES``.
      chip: key of ``chips.CHIPS``.
      way: key of ``WAYS``.
      length: tokens in a sequence.
      chips: how many; parameters are spread over them all, and each has a sequence.
    """

    model: str
    chip: str
    way: Way = "layerwise"
    length: int = 1024
    chips: int = 1


def jobs(profile: str) -> Iterator[Job]:
    """Yields what to compile, what matters most first."""
    if profile == "smoke":
        yield Job("tiny", "H100", length=64)
        return
    yield Job("Llama-3 8B", "H100")
    yield Job("CodeLlama 34B", "H100", length=2048)
    yield Job("Llama-2 70B", "H200", length=2048)
    for way in ("layerwise", "checkpoint", "adam"):
        yield Job("GPT-2 124M", "H100", way, length=128)
    yield Job("Llama-2 7B", "TPU v5e")
    yield Job("Llama-2 7B", "RTX 4090")
    yield Job("Llama-2 7B", "H100", "checkpoint")
    yield Job("Llama-2 7B", "TPU v5e", chips=16)
    yield Job("Llama-2 70B", "TPU v5e", chips=16)
    yield Job("Llama-2 70B", "TPU v5e", chips=256)
    yield Job("Llama-2 70B", "H100", chips=8)
    yield Job("Llama-2 7B", "H100", chips=8)
    yield Job("Llama-2 70B", "B200", length=2048)
    yield Job("Llama-2 13B", "H100")
    yield Job("Llama-2 13B", "TPU v6e")
    yield Job("Llama-2 13B", "TPU v5p")
    yield Job("CodeLlama 34B", "TPU v5p", length=2048)
    for model, chip, first in (
        ("Llama-2 7B", "RTX 4090", 11),
        ("CodeLlama 34B", "H100", 12),
        ("Llama-2 70B", "H200", 12),
    ):
        # Lengths are tried until one does not fit; longer ones are left out.
        for power in range(first, 18):
            yield Job(model, chip, length=2**power)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def fit(
    out: Path = Path("benchmarks/results/fit"),
    *,
    profile: Literal["smoke", "full"] = "full",
    only: str = "",
) -> None:
    """Compile train steps of models of up to 70 B parameters for chips; run nothing.

    Takes the compilers of TPUs and GPUs (``pip install madax[compilers]``), but neither
    a TPU nor a GPU. What the records have is not compiled again.

    Args:
        out: Folder for fit.jsonl, .md and .png.
        profile: smoke compiles one small step, full takes hours on two CPU cores.
        only: Compile only for chips, or of models, whose name has this in it.
    """
    raw = records.file(out, "fit")
    wanted = [j for j in jobs(profile) if only in j.model or only in j.chip]
    for job in tqdm(dict.fromkeys(wanted), desc="fit"):
        known = records.find(raw, dataclasses.asdict(job))
        if not known and not _is_too_long(raw, job):
            _in_its_own_process(job, raw)
    print(fit_report(out))


def _is_too_long(raw: Path, job: Job) -> bool:
    """Whether a smaller step is known not to fit."""
    same = {k: v for k, v in dataclasses.asdict(job).items() if k != "length"}
    runs = records.find(raw, same)
    return any(not run["fits"] and run["length"] < job.length for run in runs)


def _in_its_own_process(job: Job, raw: Path) -> None:
    """Compiles in another process, which a compiler that fails may end; records it."""
    command = [sys.executable, "-m", "benchmarks.systems.fit", str(raw), *flags(job)]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        tqdm.write(f"{job}: {done.stderr.strip().splitlines()[-1]}")


def flags(settings: Any) -> list[str]:
    """Returns a dataclass as the options that tyro makes of it."""
    pairs = ((f"--{k}", str(v)) for k, v in dataclasses.asdict(settings).items())
    return list(itertools.chain.from_iterable(pairs))


def compile_one(raw: Path, /, job: tyro.conf.OmitArgPrefixes[Job]) -> None:
    """Compiles one train step, and appends what it takes to the records."""
    chip = CHIPS[job.chip]
    devices = chip.devices(job.chips)
    step, args = train_step(job, devices)
    begin = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*args)
    lowering = time.perf_counter() - begin
    try:
        compiled = lowered.compile()
        used: dict[str, Any] = dict(footprint(compiled))
        used["gathered"] = gathered(compiled.as_text() or "")
    except Exception as error:
        # The TPU's compiler refuses what does not fit.
        peak = needed(error)
        if peak is None:
            raise
        used = {"peak": peak}
    size = decoder.SIZES[job.model]
    count = decoder.count(size)
    result = {
        "parameters": count,
        "memory": chip.memory,
        **used,
        "bytes_per_parameter": used["peak"] * job.chips / count,
        "fits": used["peak"] <= chip.memory,
        "lowering_s": round(lowering, 1),
        "compile_s": round(time.perf_counter() - begin - lowering, 1),
    }
    records.append(raw, dataclasses.asdict(job) | result)


def train_step(job: Job, devices: Sequence[jax.Device]) -> tuple[Step, Tree]:
    """Returns a train step and the shapes that it takes, on those devices."""
    size = decoder.SIZES[job.model]
    mesh = Mesh(devices[: job.chips], ("chips",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    gather = None
    if job.chips > 1:
        gather = partial(jax.lax.with_sharding_constraint, shardings=everywhere)
    params = jax.eval_shape(partial(decoder.init, size), jax.random.key(0))
    contender = CONTENDERS[job.way]
    params = jax.eval_shape(contender.store_stack, params)
    init, step = functions(size, job.way, contender.rate, gather=gather)
    state = jax.eval_shape(init, params)

    def spread(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """A matrix, or a stack of them, along its longer axis."""
        axes: list[str | None] = [None] * len(x.shape)
        if job.chips > 1 and len(x.shape) > 1:
            axis = max((-2, -1), key=lambda i: x.shape[i])
            if x.shape[axis] % job.chips == 0:
                axes[axis] = "chips"
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes))
        )

    batch = jax.ShapeDtypeStruct(
        (job.chips, job.length + 1), jnp.int32, sharding=NamedSharding(mesh, P("chips"))
    )
    return step, (*jax.tree.map(spread, (params, state)), batch)


def functions(
    size: decoder.Size, way: Way, rate: optax.ScalarOrSchedule, **options: Any
) -> Functions:
    """Returns the functions that make the state, and that take a step.

    Args:
      size: of the network.
      way: key of ``WAYS``.
      rate: learning rate, or a schedule of it.
      **options: of ``madax.layerwise``.
    """
    tx = CONTENDERS[way].make(rate)
    if way == "layerwise":
        return decoder.layerwise(size, tx, dtype=jnp.bfloat16, **options)
    return decoder.ordinary(size, tx, None if way == "adam" else jnp.bfloat16)


def fit_table(runs: pd.DataFrame) -> str:
    """Returns what each step takes in Markdown, from the records alone."""
    text = (
        "Train steps on 8-bit codes and 8-bit second moments, a sequence a chip: "
        "compiled for, not run. GB are 10^9 bytes of each chip.\n\n"
        "**One chip:**\n\n"
    )
    job = ["parameters", "chip", "way"]
    one = runs[runs["chips"] == 1].sort_values([*job, "length"], kind="stable")
    first = one.drop_duplicates(job)
    text += markdown([_row(run) for run in first.to_dict("records")], numbers=True)
    longer = one[one.duplicated(job, keep=False)]
    if len(longer):
        text += "\n\n**Longer sequences**, of those that were compiled:\n\n" + markdown(
            [_row(run) for run in longer.to_dict("records")], numbers=True
        )
    many = runs[runs["chips"] > 1]
    if len(many):
        rows = [
            _row(run) | {"gathered": _gathered(run["gathered"])}
            for run in many.to_dict("records")
        ]
        text += (
            "\n\n**Meshes**, parameters spread over all chips; bytes that all-gathers "
            "in the program result in, those of one layer counted once:\n\n"
            + markdown(rows, numbers=True)
        )
    return text + (
        "\n\nAdamW takes 16 bytes a parameter without activations, in float32 and in "
        "mixed precision (2 of weights, 2 of gradients, 12 of a float32 copy and "
        "moments): by arithmetic.\n"
    )


def _row(run: Record) -> dict[str, str]:
    chips = "" if run["chips"] == 1 else f"{run['chips']} x "
    adamw = ADAMW * run["parameters"] / run["chips"]
    return {
        "model": run["model"],
        "chip": f"{chips}{run['chip']}",
        "step": WAYS[run["way"]],
        "tokens": f"1 x {run['length']}",
        "peak GB": f"{run['peak'] / 1e9:.2f}",
        "of GB": f"{run['memory'] / 1e9:.1f}",
        "fits": "yes" if run["fits"] else "no",
        "bytes / parameter": f"{run['bytes_per_parameter']:.2f}",
        "AdamW GB": f"{adamw / 1e9:.1f}",
    }


def _gathered(found: object) -> str:
    if not isinstance(found, dict):
        return "-"
    return ", ".join(f"{v / 1e6:.1f} MB of {k}" for k, v in sorted(found.items()))


def fit_figure(runs: pd.DataFrame) -> Figure:
    """Draws the peak of the shortest sequences over the memory of chips."""
    one = runs[(runs["chips"] == 1) & (runs["way"] == "layerwise")]
    one = one.sort_values(["parameters", "memory", "length"], kind="stable")
    one = one.drop_duplicates(["model", "chip"])
    fig = Figure(figsize=(8, 1.2 + 0.45 * len(one)), layout="constrained")
    axes = fig.subplots()
    names = [f"{r['model']}\n{r['chip']}" for r in one.to_dict("records")]
    rows = range(len(one))
    adamw = ADAMW * one["parameters"] / 1e9
    axes.barh(rows, adamw, color="#dddddd", label="AdamW, no activations (arithmetic)")
    axes.barh(
        rows, one["peak"] / 1e9, color="#d55e00", height=0.5, label="madax.layerwise"
    )
    axes.plot(one["memory"] / 1e9, rows, "k|", ms=16, mew=2, label="the chip's memory")
    axes.set(xscale="log", xlabel="GB", yticks=list(rows), yticklabels=names)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title("Peak of a train step: compiled for, not run", fontsize=10)
    axes.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=3, fontsize=8)
    return fig


fit_report = Report("fit", fit_table, fit_figure)


if __name__ == "__main__":
    tyro.cli(compile_one)
