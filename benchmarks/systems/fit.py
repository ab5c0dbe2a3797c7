"""Which models fit which chips: whole train steps, compiled and not run."""

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

import madax
from benchmarks.compilers import programs
from benchmarks.compilers.chips import (
    CHIPS,
    ENVIRONMENT,
    footprint,
    gathered,
    needed,
)
from benchmarks.lib import records
from benchmarks.lib.contender import Contender
from benchmarks.lib.formats import MOMENTS_8, SYMLOG_8
from benchmarks.lib.optimizers import madam_8, muon_8
from benchmarks.lib.records import Record
from benchmarks.lib.steps import Functions, Step, Tree
from benchmarks.lib.style import STYLES, WIDTH, Report, markdown
from benchmarks.models import decoder

# The bytes per parameter of AdamW, whatever the chip: parameters, moments and gradients
# in float32; or in bfloat16, with a copy of the parameters and moments in float32.
ADAMW = 16
Way = Literal[
    "muon, one byte",
    "muon, two bytes",
    "one byte",
    "two bytes",
    "layerwise",
    "checkpoint",
    "adam",
    "mixed",
]
WAYS: dict[Way, str] = {
    "muon, one byte": "muon(b1=None), a layer at a time",
    "muon, two bytes": "muon, a layer at a time",
    "one byte": "muon_madam(b1=None), a layer at a time",
    "two bytes": "muon_madam, a layer at a time",
    "layerwise": "madam, a layer at a time",
    "checkpoint": "madam, jax.checkpoint",
    "adam": "optax.adam float32, jax.checkpoint",
    "mixed": "optax.adamw mixed precision, jax.checkpoint",
}
LAYERWISE = tuple(way for way in WAYS if way not in ("checkpoint", "adam", "mixed"))
_muon_madam_8 = partial(madax.muon_madam, moment_format=MOMENTS_8)
CONTENDERS: dict[Way, Contender] = {
    "muon, one byte": Contender(partial(muon_8, b1=None), (1e-3,), SYMLOG_8),
    "muon, two bytes": Contender(muon_8, (1e-3,), SYMLOG_8),
    "one byte": Contender(partial(_muon_madam_8, b1=None), (1e-3,), SYMLOG_8),
    "two bytes": Contender(_muon_madam_8, (1e-3,), SYMLOG_8),
    "layerwise": Contender(madam_8, (1e-3,), SYMLOG_8),
    "checkpoint": Contender(madam_8, (1e-3,), SYMLOG_8),
    "adam": Contender(optax.adam, (1e-3,)),
    "mixed": Contender(optax.adamw, (1e-3,)),
}
# What the papers of others say that they take: bytes per parameter, and a Llama of 7 B.
PAPERS = (
    ("AdamW", "16", "107.8 GB, by arithmetic", "-"),
    ("FlashOptim AdamW", "7; 5 with gradient release", "", "2602.23349"),
    ("SCALE", "", "13.74 GB of bfloat16 weights and state", "2506.16659"),
    ("APOLLO-Mini", "", "0.0 GB of state beside bfloat16 weights", "2412.05270"),
    ("Q-GaLore", "", "trains on a card of 16 GB", "2407.08296"),
    ("Q-APOLLO-Mini", "", "trains in less than 12 GB", "2412.05270"),
)


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
    way: Way = "two bytes"
    length: int = 1024
    chips: int = 1


def jobs(profile: str) -> Iterator[Job]:
    """Yields what to compile, what matters most first."""
    if profile == "smoke":
        yield Job("tiny", "H100", length=64)
        return
    yield Job("Llama-2 70B", "H100", "muon, one byte", 2048)
    yield Job("Llama-2 70B", "H200", "muon, two bytes", 2048)
    yield Job("Llama-2 70B", "H100", "one byte", 2048)
    yield Job("Llama-2 70B", "H200", "two bytes", 2048)
    yield Job("Llama-2 7B", "RTX 4070", "muon, one byte")
    yield Job("Llama-2 7B", "RTX 4090", "muon, two bytes")
    yield Job("CodeLlama 34B", "H100", "muon, two bytes", 2048)
    yield Job("Llama-2 7B", "TPU v5e", "two bytes")
    yield Job("Llama-2 13B", "TPU v5e", "one byte")
    small = ("Llama-2 7B", "Llama-3 8B", "Llama-2 13B")
    for chip, models in (
        ("RTX 4070", small[:2]),
        ("RTX 4090", small),
        ("TPU v5e", small),
        ("H100", (*small, "CodeLlama 34B")),
        ("B200", (*small, "CodeLlama 34B", "Llama-2 70B")),
        ("H200", (*small, "CodeLlama 34B", "Llama-2 70B")),
    ):
        for model in models:
            yield Job(model, chip, "one byte", 1024 if model in small else 2048)
    for way in ("one byte", "two bytes", "layerwise", "checkpoint", "adam"):
        yield Job("GPT-2 124M", "H100", way, length=128)
    yield Job("Llama-2 7B", "RTX 4070", "one byte", 2048)
    yield Job("Llama-2 70B", "H100", "one byte", 4096)
    yield Job("Llama-2 7B", "H100", "checkpoint")
    for way in ("two bytes", "layerwise"):
        yield Job("Llama-2 7B", "TPU v5e", way)
        yield Job("Llama-3 8B", "H100", way)
        yield Job("Llama-2 70B", "B200", way, 2048)
        yield Job("Llama-2 13B", "H100", way)
        yield Job("Llama-2 13B", "TPU v6e", way)
        yield Job("Llama-2 13B", "TPU v5p", way)
        yield Job("CodeLlama 34B", "TPU v5p", way, 2048)
        for model, chip, count in (
            ("Llama-2 7B", "H100", 8),
            ("Llama-2 70B", "H100", 8),
            ("Llama-2 7B", "TPU v5e", 16),
            ("Llama-2 70B", "TPU v5e", 16),
            ("Llama-2 70B", "TPU v5e", 256),
        ):
            yield Job(model, chip, way, chips=count)
        for model, chip, first in (
            ("Llama-2 7B", "RTX 4090", 10),
            ("CodeLlama 34B", "H100", 11),
            ("Llama-2 70B", "H200", 11),
        ):
            # Lengths are tried until one does not fit; longer ones are left out.
            for power in range(first, 18):
                yield Job(model, chip, way, length=2**power)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def fit(
    out: Path = Path("benchmarks/results/fit"),
    *,
    profile: Literal["smoke", "full"] = "full",
    only: str = "",
) -> None:
    """Compile train steps of models of up to 70 B parameters for chips; run nothing.

    Takes the compilers of TPUs and GPUs (``pip install '.[compilers]'``), but neither
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
    begin, processor = time.perf_counter(), sum(os.times()[:4])
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*args)
    lowering = time.perf_counter() - begin
    try:
        compiled = lowered.compile()
        used: dict[str, Any] = dict(footprint(compiled))
        text = compiled.as_text() or ""
        used |= {"gathered": gathered(text), "cycles": programs.count(text).cycles}
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
        "cpu_s": round(sum(os.times()[:4]) - processor, 1),
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
    if way in LAYERWISE:
        return decoder.layerwise(size, tx, dtype=jnp.bfloat16, **options)
    return decoder.ordinary(size, tx, None if way == "adam" else jnp.bfloat16)


def fit_table(runs: pd.DataFrame) -> str:
    """Returns what each step takes in Markdown, from the records alone."""
    one = runs[runs["chips"] == 1]
    memory = one.drop_duplicates("chip").sort_values("memory")
    names = {r["chip"]: f"{r['chip']}, {r['memory'] / 1e9:.1f}" for r in _rows(memory)}
    steps = one.assign(order=one["way"].map(list(WAYS).index))
    steps = steps.groupby(["parameters", "order", "length"])
    rows = []
    for _, group in steps:
        first, rest = group.iloc[0], _rows(group)
        rows.append(
            {
                "model": first["model"],
                "step": WAYS[first["way"]],
                "tokens": f"1 x {first['length']}",
                "kept": f"{(group['arguments'] / first['parameters']).min():.2f}",
                "peak": f"{group['bytes_per_parameter'].min():.2f}",
                **dict.fromkeys(names.values(), ""),
                **{names[run["chip"]]: _peak(run) for run in rest},
            }
        )
    text = (
        "Train steps on 8-bit codes; moments, where there are any, have 8 bits, too. "
        "Compiled for the chips, not run: GB (10^9 bytes) of each chip's memory, which "
        "stands behind its name. Kept: weights and state, and peak, in bytes per "
        "parameter.\n\n**One chip, a sequence a step:**\n\n"
        f"{markdown(rows, numbers=True)}"
    )
    rows = [
        {
            "model": run["model"],
            "chip": f"{run['chips']} x {run['chip']}",
            "step": WAYS[run["way"]],
            "tokens": f"{run['chips']} x {run['length']}",
            "GB of each": _peak(run),
            "gathered": _gathered(run["gathered"]),
        }
        for run in _rows(runs[runs["chips"] > 1])
    ]
    if rows:
        text += (
            "\n\n**Meshes**, parameters spread over all chips, a sequence a chip; "
            "bytes that all-gathers in the program result in, those of one layer "
            f"counted once:\n\n{markdown(rows, numbers=True)}"
        )
    columns = ("method", "bytes / parameter", "Llama 7B", "arXiv")
    papers = [dict(zip(columns, paper, strict=True)) for paper in PAPERS]
    return (
        f"{text}\n\n**Others, as their papers say**, not compiled here; bytes per "
        "parameter are of weights, gradients and state, without activations:\n\n"
        f"{markdown(papers)}\n"
    )


def _rows(runs: pd.DataFrame) -> list[Record]:
    return runs.to_dict("records")


def _peak(run: Record) -> str:
    """Returns the GB that a step takes, and whether they are too many."""
    return f"{run['peak'] / 1e9:.2f}{'' if run['fits'] else ': too many'}"


def _gathered(found: object) -> str:
    if not isinstance(found, dict):
        return "-"
    return ", ".join(f"{v / 1e6:.1f} MB of {k}" for k, v in sorted(found.items()))


def fit_figure(runs: pd.DataFrame) -> Figure:
    """Draws the peak of the shortest sequences over the memory of chips."""
    one = runs[(runs["chips"] == 1) & runs["way"].isin(LAYERWISE)]
    one = one.sort_values(["parameters", "memory", "length"], kind="stable")
    one = one.drop_duplicates(["model", "chip", "way"])
    pairs = one.drop_duplicates(["model", "chip"])
    places = {(r["model"], r["chip"]): i for i, r in enumerate(_rows(pairs))}
    fig = Figure(figsize=(WIDTH, 1.4 + 0.4 * len(pairs)), layout="constrained")
    axes = fig.subplots()
    lines = range(len(pairs))
    adamw = ADAMW * pairs["parameters"] / 1e9
    axes.plot(adamw, lines, "x", c="0.5", label="AdamW, no activations (arithmetic)")
    for way, style in zip(LAYERWISE, STYLES[1:], strict=False):
        here = one[one["way"] == way]
        at = [places[r["model"], r["chip"]] for r in _rows(here)]
        points = style | {"linestyle": "", "label": WAYS[way].partition(",")[0]}
        axes.plot(here["peak"] / 1e9, at, **points)
    axes.plot(pairs["memory"] / 1e9, lines, "k|", ms=16, mew=2, label="memory")
    names = [f"{model}, {chip}" for model, chip in places]
    axes.set(xscale="log", xlabel="GB", yticks=list(lines), yticklabels=names)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", labelsize=9)
    axes.set_title("Peak memory of a train step, compiled and not run")
    axes.grid(alpha=0.3)
    axes.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=3, fontsize=9)
    return fig


fit_report = Report("fit", fit_table, fit_figure)


if __name__ == "__main__":
    tyro.cli(compile_one)
