"""The figures of the page of ideas: steps on log|w| and on each grid, and bytes."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import madax
from benchmarks import RESULTS
from benchmarks.lib.style import STYLES, WIDTH
from madax.formats import Format

STEP = 0.4  # nats
FLOOR = 0.1
STARTS = (0.012, 0.06, 0.2, 0.8)
COLORS = [STYLES[i]["color"] for i in (1, 2, 5)]
# Few bits, so that single codes are seen.
GRIDS = {
    "LogFormat(bits=5)": madax.LogFormat(bits=5),
    "SymlogFormat(bits=5)": madax.SymlogFormat(bits=5),
    "UniformFormat(bits=5)": madax.UniformFormat(bits=5),
}
# What is kept of one weight of a matrix, in bytes.
BYTES = {
    "Adam, float32": {"weight": 4, "first moment": 4, "second moment": 4},
    "muon, two bytes": {"code of the weight": 1, "code of its moment": 1},
    "muon, one byte": {"code of the weight": 1},
}


def ideas(out: Path = RESULTS / "ideas") -> None:
    """Draw the figures of the page "Ideas in five minutes"; nothing is trained.

    Args:
        out: Folder of the figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {"steps": steps_figure, "grids": grids_figure, "bytes": bytes_figure}
    for name, draw in figures.items():
        draw().savefig(out / f"{name}.png", dpi=150)


def moved(start: np.ndarray) -> dict[str, np.ndarray]:
    """Returns where one step takes positive weights, by the name of the rule."""
    return {
        f"additive: w + {STEP * FLOOR:g}": start + STEP * FLOOR,
        f"multiplicative: w · exp({STEP:g})": start * np.exp(STEP),
        f"multiplicative, additive below a floor of {FLOOR:g}": np.where(
            start <= FLOOR, start + STEP * FLOOR, start * np.exp(STEP)
        ),
    }


def steps_figure() -> Figure:
    """Draws one step of each rule as arrows on an axis of log|w|."""
    fig = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = fig.subplots()
    start = np.array(STARTS)
    for row, ((name, end), color) in enumerate(
        zip(moved(start).items(), COLORS, strict=True)
    ):
        axes.plot(start, [row] * len(start), "o", c=color, ms=5)
        for tail, head in zip(start, end, strict=True):
            _arrow(axes, (tail, row), (head, row), color)
        axes.text(0.0095, row - 0.28, name, color=color)
    axes.axvline(FLOOR, c="0.7", lw=1, zorder=0)
    axes.text(FLOOR * 1.03, 2.6, "floor", color="0.4")
    axes.set(xscale="log", xlim=(0.009, 1.6), ylim=(2.7, -0.6), yticks=[])
    axes.set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
    axes.minorticks_off()
    axes.set_xlabel("|w|, on a logarithmic axis")
    axes.set_title(
        "One step of four weights: a dot where it starts, an arrow to where it ends"
    )
    return fig


def grids_figure() -> Figure:
    """Draws the values of all codes of each format, and one log-step of two weights."""
    fig = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = fig.subplots(1, len(GRIDS), sharex=True, sharey=True)
    for axes, color, (name, format) in zip(panels, COLORS, GRIDS.items(), strict=True):
        codes = jnp.arange(-format.levels, format.levels + 1)
        axes.plot(codes, format.decode(codes), ".", c="0.6", ms=5)
        for value in (0.1, 0.6):
            code, steps = step_of(format, value)
            tail = (code, _decoded(format, code))
            head = (code + steps, _decoded(format, code + steps))
            axes.plot(*tail, "o", c=color, ms=6)
            _arrow(axes, tail, head, color)
            axes.annotate(
                f"{steps:+.1f} codes",
                tail,
                (-8, 2),
                textcoords="offset points",
                ha="right",
                color=color,
            )
        axes.set(title=name, xlabel="code")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("value over the scale")
    fig.suptitle(
        f"The codes of three grids, and a log-step of {STEP:g} from two of them"
    )
    return fig


def bytes_figure() -> Figure:
    """Draws the bytes that training keeps for each weight, a square a byte."""
    fig = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    axes = fig.subplots()
    for row, parts in enumerate(BYTES.values()):
        left = 0
        for (name, size), color in zip(parts.items(), COLORS, strict=False):
            squares = [(left + i, 0.94) for i in range(size)]
            axes.broken_barh(squares, (row - 0.35, 0.7), color=color)
            if size > 1:
                box = {"color": color, "pad": 1}
                place = left + size / 2, row
                look = {"color": "white", "ha": "center", "va": "center", "bbox": box}
                axes.text(*place, name, **look)
            left += size
        if left == len(parts):
            axes.text(left + 0.2, row, ", ".join(parts), va="center")
    axes.set(xlim=(-0.2, 12.2), ylim=(len(BYTES) - 0.3, -0.6), xlabel="bytes")
    axes.set_yticks(range(len(BYTES)), BYTES)
    axes.set_title("What training keeps for each weight: a square is a byte")
    return fig


def step_of(format: Format, value: float) -> tuple[float, float]:
    """Returns the code nearest to a value, and the codes that a log-step adds to it."""
    code = format.nearest(jnp.float32(value))
    return float(code), float(format.log_step(code, jnp.float32(STEP)))


def _decoded(format: Format, code: float) -> float:
    return float(format.decode(jnp.float32(code)))


def _arrow(
    axes: Axes, tail: tuple[float, float], head: tuple[float, float], color: str
) -> None:
    look = {"arrowstyle": "->", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", head, tail, arrowprops=look)
