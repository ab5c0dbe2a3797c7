"""The optimizers compared, and the learning rate each comes with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import madax

# Hyperparameters of a run: "rate", "schedule", and numbers that the optimizer knows.
Point = Mapping[str, Any]
Schedule = Literal["cosine", "constant", "warm-up"]
# The share of a cosine in the rate, and the share of the run in which it rises.
SCHEDULES: dict[Schedule, dict[str, float]] = {
    "cosine": {"decay": 1.0, "warmup": 0.0},
    "constant": {"decay": 0.0, "warmup": 0.0},
    "warm-up": {"decay": 1.0, "warmup": 0.1},
}

# A narrower range is a finer grid, of less rounding noise: two decades of weights at
# 8 bits, and three, "wide", to see what the range costs.
FORMATS: dict[str, madax.formats.Format] = {
    "log 16": madax.LogFormat.from_dynamic_range(bits=16, ratio=1000),
    "log 8": madax.LogFormat.from_dynamic_range(bits=8, ratio=100),
    "wide log 8": madax.LogFormat.from_dynamic_range(bits=8, ratio=1000),
    "log 6": madax.LogFormat.from_dynamic_range(bits=6, ratio=100),
    "log 4": madax.LogFormat.from_dynamic_range(bits=4, ratio=30),
    "symlog 16": madax.SymlogFormat(bits=16, linear_range=1 / 3),
    "symlog 8": madax.SymlogFormat(bits=8, linear_range=1 / 3),
    "finer symlog 8": madax.SymlogFormat(bits=8, linear_range=0.15),
    "uniform 8": madax.UniformFormat(bits=8),
    "uniform 6": madax.UniformFormat(bits=6),
    "uniform 4": madax.UniformFormat(bits=4),
}


def _same(params: optax.Params) -> optax.Params:
    return params


def as_trained(params: optax.Params, state: optax.OptState) -> optax.Params:
    """The parameters themselves are scored."""
    del state
    return params


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One row of the comparison.

    Attributes:
      make: learning rate, or a schedule of it, and hyperparameters by name, to the
        transformation.
      rate: default learning rate, as published or as in optax.
      quantize: initial parameters to those that are stored and trained, some of them
        as codes perhaps.
      evaluated: parameters and optimizer state to the parameters to be scored.
      schedules: schedules it is meant for, the first by default.
    """

    make: Callable[..., optax.GradientTransformation]
    rate: float
    quantize: Callable[[optax.Params], optax.Params] = _same
    evaluated: Callable[[optax.Params, Any], optax.Params] = as_trained
    schedules: tuple[Schedule, ...] = ("cosine",)

    def transform(
        self, point: Mapping[str, jax.Array], steps: int
    ) -> optax.GradientTransformation:
        """Returns the transformation for a run.

        Args:
          point: numbers, as of ``hyperparameters``.
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
    """Returns a point as numbers, those of ``SCHEDULES`` for its schedule."""
    others = {name: value for name, value in point.items() if name != "schedule"}
    return others | SCHEDULES[point["schedule"]]


def cosine(rates: Sequence[float]) -> list[Point]:
    """Returns points: those rates, decayed by a cosine to zero."""
    return [{"rate": rate, "schedule": "cosine"} for rate in rates]


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


def stored(
    name: Literal["madam", "adam"],
    format: madax.formats.Format | None,
    *,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    moment_bits: int = 32,
) -> Optimizer:
    """Returns Madam or Adam that trains weights stored in a format.

    Args:
      name: "madam", which trains them natively, or "adam".
      format: how weight matrices are stored; None for float32.
      rounding: of the steps of codes.
      moment_bits: bits of a moment of Madam.
    """

    def make(
        rate: optax.ScalarOrSchedule, **options: Any
    ) -> optax.GradientTransformation:
        if name == "adam":
            if format is None:
                return optax.adam(rate)
            return madax.with_quantized_params(optax.adam(rate), rounding=rounding)
        moments = madax.MomentFormat(moment_bits) if moment_bits < 32 else None
        return madax.madam(rate, rounding=rounding, moment_format=moments, **options)

    def quantize(params: optax.Params) -> optax.Params:
        return params if format is None else madax.quantize_params(params, format)

    return Optimizer(make, OPTIMIZERS[name].rate, quantize)


def _muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon as its author runs it: Adam, at 3e-4, for all but the inner matrices."""

    def dimensions(path: jax.tree_util.KeyPath, x: jax.Array) -> Any:
        if x.ndim < 2 or any(
            n in jax.tree_util.keystr(path) for n in ("embed", "head")
        ):
            return None
        if x.ndim == 4:  # The kernel of a convolution.
            return contrib.MuonDimensionNumbers((0, 1, 2), 3)
        return contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

    return contrib.muon(
        rate,
        adam_learning_rate=lambda count: 3e-4 / 0.02 * rate(count),
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            dimensions, params
        ),
    )


def _mechanic(rate: optax.Schedule) -> optax.GradientTransformation:
    return contrib.mechanize(optax.adamw(rate))


def _averaged(params: optax.Params, state: Any) -> optax.Params:
    return contrib.schedule_free_eval_params(state, params)


_BOTH: tuple[Schedule, ...] = ("cosine", "constant")
_PLAIN: tuple[Schedule, ...] = ("constant",)

# What the learning rate is swept for.
OPTIMIZERS = {
    "sgd momentum": Optimizer(lambda rate: optax.sgd(rate, momentum=0.9), 0.1),
    "adam": Optimizer(optax.adam, 1e-3),
    "madam": Optimizer(madax.madam, 0.01),
}
DEMO = OPTIMIZERS | {
    "8-bit adam": stored("adam", FORMATS["log 8"]),
    "8-bit madam": stored("madam", FORMATS["log 8"], moment_bits=8),
}
# What runs at one setting everywhere. A learning-rate-free one has the schedules that
# its authors use.
UNTUNED = {
    **{name: replace(row, schedules=_BOTH) for name, row in OPTIMIZERS.items()},
    "adamw": Optimizer(optax.adamw, 1e-3),
    "lion": Optimizer(optax.lion, 1e-4),
    "muon": Optimizer(_muon, 0.02),
    "prodigy": Optimizer(contrib.prodigy, 1.0, schedules=_BOTH),
    "d-adaptation adamw": Optimizer(contrib.dadapt_adamw, 1.0, schedules=_BOTH),
    "mechanic adamw": Optimizer(_mechanic, 1.0, schedules=_BOTH),
    "dowg": Optimizer(contrib.dowg, 1.0, schedules=_PLAIN),
    "cocob": Optimizer(contrib.cocob, 1.0, schedules=_PLAIN),
    "schedule-free adamw": Optimizer(
        contrib.schedule_free_adamw, 2.5e-3, evaluated=_averaged, schedules=_PLAIN
    ),
    "madam b1": Optimizer(partial(madax.madam, b1=0.9), 0.01),
    "madam floor": Optimizer(partial(madax.madam, floor=1.0), 0.01),
    "madam floor b1": Optimizer(partial(madax.madam, floor=1.0, b1=0.9), 0.01),
    **{
        f"{bits}-bit madam of the paper": Optimizer(
            partial(madax.papers.bbit_madam, bits=bits, base_step=precision), 0.01
        )
        for bits, precision in ((12, 0.001), (10, 0.005), (8, 0.01))
    },
}
