"""Moments of few bits: directions under hard conditions, and losses."""

from collections.abc import Callable
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import madax
from benchmarks.lib import records
from benchmarks.lib.analysis import change, medians, spread
from benchmarks.lib.contender import Contender, points
from benchmarks.lib.optimizers import madam_floor
from benchmarks.lib.profiles import Flags, Profile
from benchmarks.lib.style import STYLES, WIDTH, Report, legend, markdown
from benchmarks.lib.sweep import Sweep, run_all

BITS = (8, 9, 12, 16)
ROWS, COLUMNS, WINDOWS = 1000, 4, 50
STEPS: dict[Profile, int] = {"smoke": 1000, "quick": 100_000, "full": 100_000}
RATE = 0.03

Gradient = Callable[[jax.Array, jax.Array, int], jax.Array]


def _rare(step: jax.Array, g: jax.Array, steps: int) -> jax.Array:
    del steps
    return jnp.where(jnp.arange(ROWS)[:, None] == step % ROWS, g, 0)


def _constant(step: jax.Array, g: jax.Array, steps: int) -> jax.Array:
    """Gradients of many sizes, none of them random."""
    del step, steps
    return jnp.broadcast_to(jnp.logspace(-2, 2, ROWS)[:, None], g.shape)


def _jump(
    step: jax.Array, g: jax.Array, steps: int, *, before: float, after: float
) -> jax.Array:
    return g * jnp.where(step < steps // 2, before, after)


# What becomes of normal random numbers.
HARD: dict[str, Gradient] = {
    "each row once in 1000 steps": _rare,
    "gradients grow 10⁴ times at once": partial(_jump, before=1e-4, after=1.0),
    "gradients fall 10⁴ times at once": partial(_jump, before=1.0, after=1e-4),
    "one constant gradient": _constant,
}


def moments(options: Flags) -> None:
    """Store both moments in 8, 9, 12 and 16 bits, and compare with float32.

    First directions, over 100 000 steps of gradients that are rare, that grow or fall
    10 000 times, and of one that is constant; then the errors of every workload, by
    ``madam`` with a first moment at one rate.
    """
    steps = STEPS[options.profile]
    raw = options.folder / "hard.jsonl"
    for name in HARD:
        for bits in BITS:
            fixed = {"condition": name, "bits": bits, "steps": steps}
            if not records.find(raw, fixed):
                records.append(raw, fixed | off(name, bits, steps))
    print(hard_report(options.folder))

    sweeps = [_sweep("float32", None)]
    sweeps += [_sweep(f"{b} bits", madax.MomentFormat(b)) for b in BITS]
    tasks = options.tasks(every=True)
    run_all(options.folder / "moments.jsonl", options, tasks, sweeps)
    print(moments_report(options.folder))


def _sweep(name: str, stored: madax.MomentFormat | None) -> Sweep:
    madam = partial(madam_floor, b1=0.9, moment_format=stored)
    return Sweep(name, Contender(madam), points([RATE]))


def off(name: str, bits: int, steps: int) -> records.Record:
    """Returns how far directions differ from directions with float32 moments.

    Args:
      name: of the condition.
      bits: of each moment.
      steps: length of the run.

    Returns:
      ``mean``, the mean size of directions over that of float32, in each of the windows
      that the run is cut into; and ``spread``, the root mean square of the difference
      of directions over that of the directions.
    """
    forms = (None, madax.MomentFormat(bits))
    both = [madax.scale_by_second_moment(b1=0.9, moment_format=f) for f in forms]

    def step(states, i):
        key = jax.random.fold_in(jax.random.key(0), i)
        noise = jax.random.normal(key, (ROWS, COLUMNS))
        g = HARD[name](i, noise, steps)
        found = [tx.update(g, s) for tx, s in zip(both, states, strict=True)]
        # Directions are bounded as madam bounds them. Gradients of zero give no steps
        # to compare.
        directions = (jnp.asarray(direction) for direction, _ in found)
        want, got = (jnp.where(g == 0, 0, d.clip(-10, 10)) for d in directions)
        sums = [jnp.abs(want), jnp.abs(got), want**2, (got - want) ** 2]
        return [s for _, s in found], jnp.stack([x.sum() for x in sums])

    @jax.jit
    def run():
        states = [tx.init(jnp.zeros((ROWS, COLUMNS))) for tx in both]
        return jax.lax.scan(step, states, jnp.arange(steps))[1]

    sums = np.asarray(run(), np.float64).reshape(WINDOWS, -1, 4).sum(1)
    return {
        "mean": (sums[:, 1] / sums[:, 0]).tolist(),
        "spread": np.sqrt(sums[:, 3] / sums[:, 2]).tolist(),
    }


def hard_table(runs: pd.DataFrame) -> str:
    """Returns how far directions are off, in Markdown.

    Args:
      runs: records, as read.
    """
    rows = []
    for name, mine in runs.groupby("condition", sort=False):
        row = {"gradients": name}
        for run in mine.to_dict("records"):
            mean = 100 * (np.array(run["mean"]) - 1)
            worst = mean[np.argmax(np.abs(mean))]
            row[f"{run['bits']} bits"] = (
                f"{mean.mean():+.1f} % ({worst:+.1f} %), "
                f"{100 * np.mean(run['spread']):.1f} %"
            )
        rows.append(row)
    return f"{markdown(rows)}\n"


def hard_figure(runs: pd.DataFrame) -> Figure:
    """Draws the mean size of directions over the size with float32, against the step.

    Args:
      runs: records, as read.
    """
    fig = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    panels = fig.subplots(2, 2, sharex=True, sharey=True)
    for axes, (name, mine) in zip(
        panels.flat, runs.groupby("condition", sort=False), strict=False
    ):
        for run, style in zip(mine.to_dict("records"), cycle(STYLES)):
            ends = np.linspace(0, run["steps"], WINDOWS + 1)[1:]
            axes.plot(
                ends, run["mean"], ms=3, lw=1, label=f"{run['bits']} bits", **style
            )
        axes.axhline(1, c="0.7", lw=1, zorder=0)
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    fig.supylabel("mean |direction| / mean |direction| with float32 moments")
    legend(fig)
    return fig


def moments_table(runs: pd.DataFrame) -> str:
    """Returns the errors of every workload by the bits of moments, in Markdown.

    Args:
      runs: records, as read.
    """
    cells = medians(runs, ["optimizer"])
    rows = []
    for workload, mine in cells.groupby("workload", sort=False):
        by_bits = {cell["optimizer"]: cell for _, cell in mine.iterrows()}
        exact = by_bits["float32"]
        row = {"workload": workload, "float32": spread(exact)}
        for bits in BITS:
            row[f"{bits} bits"] = change(by_bits[f"{bits} bits"], exact)
        rows.append(row)
    return markdown(rows)


hard_report = Report("hard", hard_table, hard_figure)


moments_report = Report("moments", moments_table)
