"""A physics-informed network: Burgers' equation, whose exact solution is known.

u_t + u u_x = ν u_xx on -1 ≤ x ≤ 1 and 0 ≤ t ≤ 1, from u = -sin πx, with u = 0 at both
ends: the example of Raissi et al. (arXiv:1711.10561), at any viscosity ν.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.workloads import Measure, Workload, functional
from benchmarks.workloads.layers import Layers

RELATIVE = Measure("relative squared error", "lower", lambda error: error)


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


def on_grid(size: int, viscosity: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns times, places and the solution on a square grid, each of (size²,)."""
    line = np.linspace(0, 1, size)
    times, places = (x.ravel() for x in np.meshgrid(line, 2 * line - 1))
    values = times, places, exact(times, places, viscosity)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def residual(
    solution: Callable[[jax.Array, jax.Array], jax.Array],
    times: jax.Array,
    places: jax.Array,
    viscosity: float,
) -> jax.Array:
    """Returns u_t + u u_x - ν u_xx of a solution, point by point.

    Args:
      solution: times and places to u.
      times: of shape (points,).
      places: of the same shape.
      viscosity: ν.
    """
    one = jnp.ones_like(times)

    # A tangent of ones gives every point its own derivative.
    def slope(places: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda x: solution(times, x), (places,), (one,))

    (u, u_x), (_, u_xx) = jax.jvp(slope, (places,), (one,))
    _, u_t = jax.jvp(lambda t: solution(t, places), (times,), (one,))
    return u_t + u * u_x - viscosity * u_xx


def pinn(
    folder: Path | None = None,
    *,
    viscosity: float,
    points: int,
    widths: tuple[int, ...],
    grid: int,
) -> Workload:
    """Returns the workload: the equation at random points, the start and the ends.

    Args:
      folder: not used, as there is no data.
      viscosity: ν.
      points: where the equation is to hold in a step; a quarter as many at the start,
        and at the ends.
      widths: of the hidden layers.
      grid: points on a side of the grid to score on.
    """
    del folder
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
            residual(partial(solution, params), times, places, viscosity),
            solution(params, jnp.zeros_like(start), start) + jnp.sin(jnp.pi * start),
            solution(params, ends, side),
        )
        return jnp.stack([jnp.mean(x**2) for x in wrong]).sum()

    def metric(params: optax.Params, test: Any) -> dict[str, jax.Array]:
        times, places, truth = test
        wrong = solution(params, times, places) - truth
        return {RELATIVE.name: jnp.sum(wrong**2) / jnp.sum(truth**2)}

    return Workload(
        "pinn",
        jnp.zeros(1),
        on_grid(grid, viscosity),
        init,
        loss,
        metric,
        RELATIVE,
        batch,
        examples=1,
        settings={"data": "Burgers' equation", "held_out": grid**2},
    )
