"""An optimizer to compare: how it is made, its rates, and how weights are stored."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import madax
from benchmarks.lib.steps import Tree, apply

# Hyperparameters of a run: "rate", "schedule", and numbers that the optimizer knows.
Point = Mapping[str, Any]
Schedule = Literal["cosine", "constant", "warm-up"]
# The fraction of a cosine in the rate, and the fraction of the run in which it rises.
SCHEDULES: dict[Schedule, dict[str, float]] = {
    "cosine": {"decay": 1.0, "warmup": 0.0},
    "constant": {"decay": 0.0, "warmup": 0.0},
    "warm-up": {"decay": 1.0, "warmup": 0.1},
}


def as_trained(params: optax.Params, state: optax.OptState) -> optax.Params:
    """The parameters themselves are scored."""
    del state
    return params


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer to compare, and how the weights that it trains are stored.

    Attributes:
      make: learning rate, or a schedule of it, and hyperparameters by name, to the
        transformation.
      rates: learning rates to choose from; the middle one is the default.
      format: of weight matrices; None for floats.
      p_scale: the bound on codes, as in ``madax.quantize_params``.
      channel_axis: the axis with scales of its own, as in ``madax.quantize_params``.
      params: dtype of float parameters; None for their own.
      grads: dtype of gradients.
      evaluated: parameters and optimizer state to the parameters to be scored.
      schedules: schedules it is meant for, the first by default.
      bytes: kept for each parameter, in weights and state.
      against: name of the contender that it is compared with.
    """

    make: Callable[..., optax.GradientTransformation]
    rates: tuple[float, ...] = ()
    format: madax.formats.Format | None = None
    p_scale: float | None = None
    channel_axis: int | None = None
    params: jax.typing.DTypeLike | None = None
    grads: jax.typing.DTypeLike = jnp.float32
    evaluated: Callable[[optax.Params, optax.OptState], optax.Params] = as_trained
    schedules: tuple[Schedule, ...] = ("cosine",)
    bytes: int | None = None
    against: str | None = None

    @property
    def rate(self) -> float:
        """The default learning rate."""
        return self.rates[len(self.rates) // 2]

    @property
    def tx(self) -> optax.GradientTransformation:
        """The transformation at the default rate."""
        return self.make(self.rate)

    def store(self, weights: Tree) -> Tree:
        """Returns float32 weights as they are stored and trained."""
        if self.format is None:
            return optax.tree.cast(weights, self.params)
        return madax.quantize_params(
            weights,
            self.format,
            p_scale=self.p_scale,
            channel_axis=self.channel_axis,
        )

    def store_stack(self, weights: Tree) -> Tree:
        """Like ``store``, for stacks of layers, with scales for each layer's matrices.

        Args:
          weights: ``{"ends": ..., "layers": ...}``, the latter with a leading axis.
        """
        if self.format is None:
            return self.store(weights)
        own = () if self.channel_axis is None else (self.channel_axis,)
        layers = madax.quantize_params(
            weights["layers"],
            self.format,
            where=lambda path, leaf: leaf.ndim > 2,
            p_scale=self.p_scale,
            channel_axis=(0, *own),
        )
        return {"ends": self.store(weights["ends"]), "layers": layers}

    def step(
        self, params: optax.Params, state: optax.OptState, grads: optax.Updates
    ) -> tuple[optax.Params, optax.OptState]:
        """Returns parameters and state after a step at the default rate."""
        return apply(self.tx, params, state, grads)

    def transform(
        self, point: Mapping[str, jax.Array], steps: int
    ) -> optax.GradientTransformation:
        """Returns the transformation for a run.

        Args:
          point: numbers, as from ``hyperparameters``.
          steps: length of the run, for the schedule.
        """
        own = ("rate", *SCHEDULES["cosine"])
        others = {k: v for k, v in point.items() if k not in own}
        decay = optax.cosine_decay_schedule(1.0, steps)

        def rate(count: jax.typing.ArrayLike) -> jax.Array:
            rising = jnp.maximum(point["warmup"] * steps, 1.0)
            rise = jnp.minimum((count + 1) / rising, 1.0)
            return rise * point["rate"] * (1 - point["decay"] * (1 - decay(count)))

        return self.make(rate, **others)


def hyperparameters(point: Point) -> dict[str, float]:
    """Returns a point as numbers, with those in ``SCHEDULES`` for its schedule."""
    others = {name: value for name, value in point.items() if name != "schedule"}
    return others | SCHEDULES[point["schedule"]]


def points(
    rates: Sequence[float], schedules: Sequence[Schedule] = ("cosine",)
) -> list[Point]:
    """Returns the points of all rates on all schedules; a cosine decays to zero."""
    return [{"rate": r, "schedule": s} for s in schedules for r in rates]


def grid(rate: float, *, steps: int = 2, below: int = 3, above: int = 2) -> list[float]:
    """Returns rates spread evenly, in the logarithm, around one.

    Args:
      rate: one of them.
      steps: to a decade.
      below: decades below that one.
      above: decades above it.
    """
    powers = range(-steps * below, steps * above + 1)
    # A rate is rounded, so that it is the same number wherever it comes from.
    return [float(f"{rate * 10 ** (i / steps):.3g}") for i in powers]
