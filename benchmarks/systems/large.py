"""Models of billions of parameters, trained on the accelerator that is there."""

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.compilers.chips import footprint
from benchmarks.data.text import text
from benchmarks.lib import records
from benchmarks.lib.records import Record
from benchmarks.lib.style import STYLES, WIDTH, Report, markdown
from benchmarks.models import decoder
from benchmarks.systems.fit import CONTENDERS, WAYS, Way, flags, functions

# XLA takes three quarters of a GPU's memory unless it is told otherwise.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.985"}
UNTIMED = 3  # Steps, of which the first one loads kernels.


@dataclasses.dataclass(frozen=True)
class Run:
    """One model to train for some steps.

    Attributes:
      model: key of ``decoder.SIZES``.
      way: key of ``fit.WAYS``.
      batch: sequences in a step.
      length: tokens in a sequence.
      steps: of the optimizer.
      rate: of learning, after the warm-up.
      warm_up: steps until then.
    """

    model: str
    way: Way = "two bytes"
    batch: int = 1
    length: int = 1024
    steps: int = 50
    rate: float = 0.003
    warm_up: int = 5


def runs(profile: str) -> Iterator[Run]:
    """Yields what to train, what matters most first."""
    if profile == "smoke":
        for way in WAYS:
            yield Run("tiny", way, batch=2, length=64, steps=5)
        return
    yield Run("Llama-2 7B")
    yield Run("Llama-2 70B", length=2048, steps=12)
    for way in ("one byte", "two bytes", "layerwise"):
        yield Run("Llama-2 7B", way, batch=4, length=2048, steps=16)
    yield Run("Llama-2 7B", "mixed", batch=4, length=2048, steps=16, rate=1e-4)
    yield Run("Llama-2 7B", "checkpoint", batch=4, length=2048, steps=16)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def large(
    out: Path = Path("benchmarks/results/large"),
    *,
    profile: Literal["smoke", "full"] = "full",
    only: str = "",
) -> None:
    """Train models of 7 and 70 B parameters for some steps, on one accelerator.

    From random codes, on the bytes of CPython's modules: a few steps show speed and
    memory, and that the loss falls, not how good a model gets. Each is a process of its
    own. What the records have is not run again; what does not fit is reported and left
    out.

    Args:
        out: Folder of a folder for each device: large.jsonl, .md and .png.
        profile: smoke takes a minute anywhere; full is for a GPU of 140 GB.
        only: Train only models whose name has this in it.
    """
    for run in runs(profile):
        if only in run.model:
            _in_its_own_process(run, out)
    for folder in sorted(raw.parent for raw in out.rglob("large.jsonl")):
        print(large_report(folder))


def _in_its_own_process(run: Run, out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.systems.large", str(out), *flags(run)],
        env=ENVIRONMENT | os.environ,
    )
    if done.returncode:
        print(f"{run} failed; its error is above.", file=sys.stderr)


def train(out: Path, /, run: tyro.conf.OmitArgPrefixes[Run]) -> None:
    """Trains one model, and appends what it took to the records, if it is not there."""
    raw = records.file(out / records.device_name(), "large")
    if records.find(raw, dataclasses.asdict(run)):
        return
    size, shape = decoder.SIZES[run.model], (run.steps, run.batch, run.length + 1)
    rate = optax.linear_schedule(0.0, run.rate, run.warm_up)
    init, step = functions(size, run.way, rate)
    make = jax.jit(partial(_parameters, size, run.way))
    params = jax.eval_shape(make, jax.random.key(0))
    state = jax.eval_shape(init, params)
    batch = jax.ShapeDtypeStruct(shape[1:], jnp.int32)
    # Compiled before there are parameters, while there is memory to try kernels in.
    begin = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    compiled = lowered.compile()
    compile_s = time.perf_counter() - begin
    params = make(jax.random.key(0))
    state = jax.jit(init)(params)

    data = text("stdlib").train
    starts = np.random.default_rng(0).integers(0, len(data) - shape[2], shape[:2])
    losses, seconds = [], []
    with tqdm(starts, desc=f"{run.model}, {run.way}", unit="step") as bar:
        for start in bar:
            tokens = data[start[:, None] + np.arange(shape[2])].astype(np.int32)
            begin = time.perf_counter()
            params, state, loss = compiled(params, state, tokens)
            losses.append(float(loss))
            seconds.append(time.perf_counter() - begin)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    memory = jax.devices()[0].memory_stats() or {}
    result = {
        "parameters": decoder.count(size),
        "losses": losses,
        "seconds": seconds,
        "compiled_peak": footprint(compiled)["peak"],
        "peak": memory.get("peak_bytes_in_use"),
        "memory": memory.get("bytes_limit"),
        "compile_s": round(compile_s, 1),
    }
    records.append(raw, dataclasses.asdict(run) | result)


def _parameters(size: decoder.Size, way: Way, key: jax.Array) -> decoder.Params:
    """Returns the first parameters, one layer at a time where their floats are many."""
    contender = CONTENDERS[way]
    if contender.format is None:
        return decoder.init(size, key)

    def one(key: jax.Array) -> decoder.Params:
        stack = decoder.init(size, key, layers=1)["layers"]
        return contender.store(jax.tree.map(lambda w: w[0], stack))

    ends = decoder.init(size, key, layers=1)["ends"]
    return {
        "ends": contender.store(ends),
        "layers": jax.lax.map(one, jax.random.split(key, size.layers)),
    }


def _tokens_per_second(run: Record) -> float:
    """Returns the speed of a run, at its median step."""
    return run["batch"] * run["length"] / statistics.median(run["seconds"][UNTIMED:])


def _way(run: Record) -> str:
    return WAYS[run["way"]].removesuffix(", jax.checkpoint")


def large_table(runs: pd.DataFrame) -> str:
    """Returns time, memory and losses in Markdown, from the records alone."""
    rows = []
    for run in runs.to_dict("records"):
        speed, peak = _tokens_per_second(run), run["peak"]
        rows.append(
            {
                "model": run["model"],
                "step": _way(run),
                "tokens": f"{run['batch']} x {run['length']}",
                "s / step": f"{run['batch'] * run['length'] / speed:.3g}",
                "tokens / s": f"{speed:.0f}",
                "TFLOP/s": f"{6e-12 * run['parameters'] * speed:.3g}",
                "peak GB": "" if pd.isna(peak) else f"{peak / 1e9:.1f}",
                "compiler's": f"{run['compiled_peak'] / 1e9:.1f}",
                "rate": f"{run['rate']:g}",
                "steps": f"{run['steps']}",
                "loss": f"{run['losses'][0]:.1f} to {run['losses'][-1]:.1f}",
            }
        )
    return (
        f"Run on one {runs['environment'].iloc[0]['device']}; bytes of text as tokens, "
        "from random parameters. TFLOP/s are 6 a parameter and token: what is computed "
        "again counts nothing. Peaks are the device's, and the compiler's estimate.\n\n"
        f"{markdown(rows, numbers=True)}\n"
    )


def large_figure(runs: pd.DataFrame) -> Figure:
    """Draws what each run takes of memory, and below its loss in the same colour."""
    fig = Figure(figsize=(WIDTH, 3 + 0.5 * len(runs)), layout="constrained")
    bars, lines = fig.subplots(2, height_ratios=(0.17 * len(runs), 1))
    names, peaks = [], runs["peak"].fillna(runs["compiled_peak"]) / 1e9
    styles = zip(runs.to_dict("records"), peaks, cycle(STYLES))
    for row, (run, peak, style) in enumerate(styles):
        tokens = f"{run['batch']} x {run['length']}"
        names.append(f"{run['model']}, {tokens}\n{_way(run)}")
        bars.barh(row, peak, color=style["color"], height=0.6)
        speed = f"  {_tokens_per_second(run):.0f} tokens/s, rate {run['rate']:g}"
        bars.text(peak, row, speed, va="center", fontsize=9)
        lines.plot(run["losses"], **(style | {"markersize": 3}))
    bars.set(xlabel="peak GB", yticks=range(len(runs)), xlim=(0, 1.5 * peaks.max()))
    bars.set_yticklabels(names, fontsize=9)
    bars.invert_yaxis()
    bars.set_title(
        f"Peak memory of runs on one {runs['environment'].iloc[0]['device']}"
    )
    lines.set(xlabel="step", ylabel="nats a token")
    lines.grid(alpha=0.3)
    return fig


large_report = Report("large", large_table, large_figure)


if __name__ == "__main__":
    tyro.cli(train)
