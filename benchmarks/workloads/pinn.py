"""Physics-informed networks: two equations whose exact solutions are known.

On -1 ≤ x ≤ 1 and 0 ≤ t ≤ 1, Burgers' u_t + u u_x = ν u_xx, from u = -sin πx, with u = 0
at both ends: the example of Raissi et al. (arXiv:1711.10561), at any viscosity ν. And
u_t = α u_xx, the temperature of a rod whose ends are at 20 °C and whose middle is at
30 °C at first: there the outputs are far from zero, so the last bias has to grow.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.workloads import Measure, Workload, functional
from benchmarks.workloads.layers import Layers

RELATIVE = Measure("relative squared error", "lower", lambda error: error)


class Equation(NamedTuple):
    """The equation that a network has to solve.

    Attributes:
      name: of the workload.
      data: what it is, for the records.
      exact: times and places, float64, to the solution.
      residual: a solution, times and places to what should be zero.
      start: places to the solution at time 0.
      ends: the solution at both ends.
    """

    name: str
    data: str
    exact: Callable[[np.ndarray, np.ndarray], np.ndarray]
    residual: Callable[..., jax.Array]
    start: Callable[[jax.Array], jax.Array]
    ends: float


def exact(times: np.ndarray, places: np.ndarray, viscosity: float) -> np.ndarray:
    """Returns the solution, float64, by Cole and Hopf's transformation.

    The integrals over the heat kernel are Gauss-Hermite sums of 100 nodes.

    Args:
      times: of any shape.
      places: of the same shape.
      viscosity: ν.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    angles = np.pi * (
        places[..., None] - np.sqrt(4 * viscosity * times[..., None]) * nodes
    )
    heat = weights * np.exp(-np.cos(angles) / (2 * np.pi * viscosity))
    return -(np.sin(angles) * heat).sum(-1) / heat.sum(-1)


def on_grid(
    size: int, exact: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns times, places and the solution on a square grid, each of (size²,)."""
    line = np.linspace(0, 1, size)
    times, places = (x.ravel() for x in np.meshgrid(line, 2 * line - 1))
    values = times, places, exact(times, places)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def derivatives(
    solution: Callable[[jax.Array, jax.Array], jax.Array],
    times: jax.Array,
    places: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns u, u_t, u_x and u_xx of a solution, point by point.

    Args:
      solution: times and places to u.
      times: of shape (points,).
      places: of the same shape.
    """
    one = jnp.ones_like(times)

    # A tangent of ones gives every point its own derivative.
    def slope(places: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda x: solution(times, x), (places,), (one,))

    (u, u_x), (_, u_xx) = jax.jvp(slope, (places,), (one,))
    _, u_t = jax.jvp(lambda t: solution(t, places), (times,), (one,))
    return u, u_t, u_x, u_xx


def residual(
    solution: Callable[[jax.Array, jax.Array], jax.Array],
    times: jax.Array,
    places: jax.Array,
    viscosity: float,
) -> jax.Array:
    """Returns u_t + u u_x - ν u_xx of a solution; arguments as in ``derivatives``."""
    u, u_t, u_x, u_xx = derivatives(solution, times, places)
    return u_t + u * u_x - viscosity * u_xx


def burgers(viscosity: float) -> Equation:
    """Returns Burgers' equation."""
    return Equation(
        "pinn",
        "Burgers' equation",
        partial(exact, viscosity=viscosity),
        partial(residual, viscosity=viscosity),
        lambda places: -jnp.sin(jnp.pi * places),
        0.0,
    )


def heat(diffusivity: float) -> Equation:
    """Returns the equation of heat, in degrees Celsius."""

    def solution(times: np.ndarray, places: np.ndarray) -> np.ndarray:
        decay = np.exp(-((np.pi / 2) ** 2) * diffusivity * times)
        return 20 + 10 * decay * np.cos(np.pi / 2 * places)

    def wrong(
        found: Callable[..., jax.Array], times: jax.Array, places: jax.Array
    ) -> jax.Array:
        _, u_t, _, u_xx = derivatives(found, times, places)
        return u_t - diffusivity * u_xx

    def start(places: jax.Array) -> jax.Array:
        return 20 + 10 * jnp.cos(jnp.pi / 2 * places)

    return Equation("pinn, heat", "the equation of heat", solution, wrong, start, 20.0)


def pinn(
    folder: Path | None = None,
    *,
    viscosity: float = 0.01,
    diffusivity: float | None = None,
    points: int,
    widths: tuple[int, ...],
    grid: int,
) -> Workload:
    """Returns the workload: the equation at random points, the start and the ends.

    Args:
      folder: not used, as there is no data.
      viscosity: ν of Burgers' equation.
      diffusivity: α of the equation of heat, which is taken if this is given.
      points: where the equation is to hold in a step; a quarter as many at the start,
        and at the ends.
      widths: of the hidden layers.
      grid: points on a side of the grid to score on.
    """
    del folder
    equation = burgers(viscosity) if diffusivity is None else heat(diffusivity)
    init, apply = functional(lambda rngs: Layers((2, *widths, 1), rngs, bend=jnp.tanh))

    def solution(params: optax.Params, times: jax.Array, places: jax.Array):
        return apply(params, jnp.stack([2 * times - 1, places], -1))[:, 0]

    def batch(train: Any, indices: jax.Array, key: jax.Array) -> Any:
        del train, indices
        of_times, of_places, of_start, of_ends = jax.random.split(key, 4)
        few = (points // 4,)
        return (
            jax.random.uniform(of_times, (points,)),
            jax.random.uniform(of_places, (points,), minval=-1),
            jax.random.uniform(of_start, few, minval=-1),
            jax.random.uniform(of_ends, few),
        )

    def loss(params: optax.Params, batch: Any) -> jax.Array:
        times, places, start, ends = batch
        side = jnp.where(jnp.arange(len(ends)) % 2, 1.0, -1.0)
        wrong = (
            equation.residual(partial(solution, params), times, places),
            solution(params, jnp.zeros_like(start), start) - equation.start(start),
            solution(params, ends, side) - equation.ends,
        )
        return jnp.stack([jnp.mean(x**2) for x in wrong]).sum()

    def metric(params: optax.Params, test: Any) -> dict[str, jax.Array]:
        times, places, truth = test
        wrong = solution(params, times, places) - truth
        return {RELATIVE.name: jnp.sum(wrong**2) / jnp.sum(truth**2)}

    return Workload(
        equation.name,
        jnp.zeros(1),
        on_grid(grid, equation.exact),
        init,
        loss,
        metric,
        RELATIVE,
        batch,
        examples=1,
        settings={"data": equation.data, "held_out": grid**2},
    )
