"""The time of an optimizer step, against optax.adam and the speed of memory."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
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

from benchmarks.lib import records
from benchmarks.lib.choices import check_choices
from benchmarks.lib.contender import Contender
from benchmarks.lib.optimizers import BASELINE, RIVALS, TIMED
from benchmarks.lib.records import Record
from benchmarks.lib.steps import Step, Tree, nbytes
from benchmarks.lib.style import WIDTH, Report, markdown
from benchmarks.models import gpt2

QUEUED = 4  # Steps at a time, unless a profile has more.


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much to measure.

    Attributes:
      leaf: parameters of the trees of one and of four leaves.
      gpt2: key of ``gpt2.SIZES``.
      train: key of ``gpt2.SIZES``, for whole train steps.
      batch: sequences in a train step.
      rounds: times each optimizer step is timed, after two that are not.
      train_rounds: times each whole train step is.
      queued: steps of the optimizer alone that are queued at a time, so that the device
        is never idle for want of work.
    """

    leaf: int
    gpt2: str
    train: str
    batch: int
    rounds: int
    train_rounds: int
    queued: int = QUEUED


PROFILES = {
    "smoke": Profile(2**16, "tiny", "tiny", batch=2, rounds=3, train_rounds=3),
    "quick": Profile(2**24, "12M", "12M", batch=2, rounds=20, train_rounds=4),
    # A GPU takes less time for a step than Python takes to start the first of them.
    "full": Profile(2**28, "124M", "124M", 8, rounds=20, train_rounds=5, queued=16),
}

Weights = Callable[[], optax.Params]
Make = Callable[[Contender, optax.Params], tuple[Step, Tree]]


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def speed(
    out: Path = Path("benchmarks/results/speed"),
    *,
    profile: Literal["smoke", "quick", "full"] = "quick",
    optimizers: tuple[str, ...] = tuple(name for name in TIMED if name != BASELINE),
    only: str = "",
) -> None:
    """Time the optimizer step of every optimizer and format, against optax.adam.

    Steps are compiled, warm and on donated buffers, and each optimizer takes turns with
    optax.adam, so that what else the machine does slows both. Prints a table; writes a
    figure and the records, and replaces records of the same device and optimizers.

    Args:
        out: Folder of a folder for this device: speed.jsonl, .md and .png.
        profile: smoke takes a minute, quick ten minutes on two CPU cores (GPT-2's
            shape at 12 M parameters), full the same on a GPU (at 124 M).
        optimizers: Rows of the table; by default all but FlashAdamW.
        only: Time only steps of trees whose name has this in it.
    """
    check_choices("optimizers", optimizers, TIMED | RIVALS)
    raw = records.file(out / records.device_name(), "speed")
    records.remove(raw, lambda r: r["optimizer"] in optimizers and only in r["tree"])
    chosen = PROFILES[profile]
    copy = copy_bandwidth(chosen)
    for tree, weights, make in cases(chosen):
        if only not in tree:
            continue
        baseline = running(TIMED[BASELINE], weights, make)
        for name in tqdm(optimizers, desc=tree):
            run = compare(name, weights, make, baseline, chosen)
            records.append(raw, {"tree": tree, "copy_gb_s": copy} | run)
    print(speed_report(raw.parent))


def cases(profile: Profile) -> Iterator[tuple[str, Weights, Make]]:
    """Yields what to time: a name, what makes the parameters, what makes the step."""

    def normal(leaves: int) -> optax.Params:
        shape = (profile.leaf // leaves // 256, 256)
        keys = jax.random.split(jax.random.key(0), leaves)
        return [0.02 * jax.random.normal(key, shape) for key in keys]

    def transformer(size: gpt2.Size) -> optax.Params:
        return gpt2.init(size, jax.random.key(0))

    yield f"1 leaf of {profile.leaf:,}", partial(normal, 1), optimizer_step
    yield f"4 leaves of {profile.leaf // 4:,}", partial(normal, 4), optimizer_step
    weights = partial(transformer, gpt2.SIZES[profile.gpt2])
    yield f"GPT-2 {profile.gpt2}", weights, optimizer_step
    size = gpt2.SIZES[profile.train]
    make = partial(gpt2.train_step, size, profile.batch, size.context)
    name = f"train step, GPT-2 {profile.train}, batch {profile.batch}"
    yield name, partial(transformer, size), make


def optimizer_step(contender: Contender, weights: optax.Params) -> tuple[Step, Tree]:
    """Returns the step from gradients to new parameters, and the gradients."""
    keys = optax.tree.split_key_like(jax.random.key(1), weights)
    grads = jax.tree.map(
        lambda key, w: 1e-3 * jax.random.normal(key, w.shape, contender.grads),
        keys,
        weights,
    )
    return contender.step, grads


@dataclasses.dataclass
class Running:
    """A compiled step with what it works on.

    Attributes:
      step: compiled; takes and gives parameters and state, which it overwrites.
      params: parameters.
      state: optimizer state.
      data: gradients, or tokens.
      compile_s: seconds to trace and compile.
    """

    step: Step
    params: Tree
    state: Tree
    data: Tree
    compile_s: float

    def time(self, steps: int = QUEUED) -> float:
        """Takes some steps; returns the seconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = self.step(self.params, self.state, self.data)
        jax.block_until_ready((self.params, self.state))
        return (time.perf_counter() - start) / steps


def running(contender: Contender, weights: Weights, make: Make) -> Running:
    """Compiles a step and makes what it works on."""
    floats = jax.jit(weights)()
    step, data = make(contender, floats)
    params = jax.jit(contender.store)(floats)
    state = jax.jit(contender.tx.init)(params)
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, data).compile()
    return Running(compiled, params, state, data, time.perf_counter() - begin)


def compare(
    name: str, weights: Weights, make: Make, baseline: Running, profile: Profile
) -> records.Record:
    """Times an optimizer and the baseline by turns.

    Args:
      name: key of ``TIMED`` or ``RIVALS``.
      weights: makes the parameters, float32.
      make: from a contender and parameters to a step and its data.
      baseline: the same step of the baseline.
      profile: how often, and how many steps at a time.

    Returns:
      One record: seconds per step of both, round by round; seconds to compile; and, of
      an optimizer step, the bytes a parameter that it cannot help but move: gradients,
      parameters and state read, parameters and state written.
    """
    contender = (TIMED | RIVALS)[name]
    is_step_alone = make is optimizer_step
    rounds = profile.rounds if is_step_alone else profile.train_rounds
    queued = profile.queued if is_step_alone else QUEUED
    pair = (baseline, running(contender, weights, make))
    times = [[r.time(queued) for r in pair] for _ in range(rounds + 2)]
    baseline_seconds, seconds = np.array(times[2:]).T.tolist()
    leaves = jax.tree.leaves(jax.eval_shape(weights))
    count = sum(w.size for w in leaves)
    kept = nbytes((pair[1].params, pair[1].state))
    moved = (2 * kept + nbytes(pair[1].data)) / count if is_step_alone else None
    return {
        "optimizer": name,
        "parameters": count,
        "leaves": len(leaves),
        "bytes_per_parameter": moved,
        "seconds": seconds,
        "baseline_seconds": baseline_seconds,
        "compile_s": pair[1].compile_s,
        "baseline_compile_s": pair[0].compile_s,
    }


def copy_bandwidth(profile: Profile) -> float:
    """Returns the speed of a copy on this device, read and written, in GB/s."""
    x = jnp.zeros(4 * profile.leaf, jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(profile.queued):
            x = copy(x)
        x.block_until_ready()
        times.append((time.perf_counter() - start) / profile.queued)
    return 2 * x.nbytes / statistics.median(times[2:]) / 1e9


def quantiles(seconds: list[float], baseline: list[float]) -> np.ndarray:
    """Returns the 10, 50 and 90 % quantiles of times over the times of a baseline."""
    return np.quantile(np.divide(seconds, baseline), [0.1, 0.5, 0.9])


def speed_table(runs: pd.DataFrame) -> str:
    """Returns the times in Markdown, a table per tree, from the records alone."""
    sections = []
    for tree, group in runs.groupby("tree", sort=False):
        baseline = np.median(np.concatenate(group["baseline_seconds"].to_list()))
        n, leaves = group["parameters"].iloc[0], group["leaves"].iloc[0]
        rows = [_table_row(run) for run in group.to_dict("records")]
        sections.append(
            f"**{tree}**: {n / 1e6:.1f} M parameters in {leaves} leaves; optax.adam "
            f"takes {1e3 * baseline:.2f} ms.\n\n{markdown(rows, numbers=True)}\n"
        )
    copy = runs["copy_gb_s"].iloc[0]
    device = runs["environment"].iloc[0]["device"]
    return f"On {device}, where a copy moves {copy:.0f} GB/s.\n\n" + "\n".join(sections)


def _table_row(run: Record) -> dict[str, str]:
    seconds = statistics.median(run["seconds"])
    low, mid, high = quantiles(run["seconds"], run["baseline_seconds"])
    row = {
        "optimizer": run["optimizer"],
        "time / adam": f"{mid:.2f}",
        "10 to 90 %": f"{low:.2f} to {high:.2f}",
        "compile / adam": f"{run['compile_s'] / run['baseline_compile_s']:.2f}",
    }
    moved = run["bytes_per_parameter"]
    if not pd.isna(moved):
        speed = moved * run["parameters"] / seconds / 1e9
        row["ns / parameter"] = f"{1e9 * seconds / run['parameters']:.3g}"
        row["bytes / parameter"] = f"{moved:.1f}"
        row["of copy speed"] = f"{100 * speed / run['copy_gb_s']:.0f} %"
    return row


def speed_figure(runs: pd.DataFrame) -> Figure:
    """Draws time over the time of optax.adam, one panel per tree."""
    groups = list(runs.groupby("tree", sort=False))
    rows = (len(groups) + 1) // 2
    bars = runs["optimizer"].nunique()
    fig = Figure(figsize=(WIDTH, rows * (0.9 + 0.18 * bars)), layout="constrained")
    panels = fig.subplots(rows, 2, sharey=True, squeeze=False).flat
    for axes, (tree, group) in zip(panels, groups, strict=False):
        pairs = zip(group["seconds"], group["baseline_seconds"], strict=True)
        low, mid, high = np.transpose([quantiles(*pair) for pair in pairs])
        ours = "madam|madax|native|8-bit state"
        mine = group["optimizer"].str.contains(ours).to_numpy()
        limit = min(mid.max() * 1.1, 4)
        axes.barh(
            group["optimizer"],
            mid,
            xerr=(mid - low, high - mid),
            color=np.where(mine, "#d55e00", "#bbbbbb"),
            capsize=2,
        )
        axes.axvline(1, c="black", ls="--", lw=1)
        for row in np.flatnonzero(mid > limit):
            axes.text(limit, row, f"{mid[row]:.1f} ", ha="right", va="center")
        axes.set(xlabel="time / optax.adam", xlim=(0, limit))
        axes.set_title(tree, fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
    panels[0].invert_yaxis()
    for axes in panels[len(groups) :]:
        axes.remove()
    return fig


speed_report = Report("speed", speed_table, speed_figure)
