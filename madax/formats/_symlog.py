"""A grid that is uniform near zero and logarithmic far out."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from madax._core.checks import check_format_field
from madax._core.numerics import (
    arcsinh,
    expm1_arcsinh,
    log1p,
    plus_product,
    rounded,
    sinh,
    sinh_and_decay,
)
from madax.formats._base import Format


def _root(x: jax.Array) -> jax.Array:
    """``sqrt(1 + x**2)``."""
    return jnp.sqrt(plus_product(1, x, x))


@dataclasses.dataclass(frozen=True)
class SymlogFormat(Format):
    r"""Codes that are uniform near zero and logarithmic far out: a hyperbolic sine.

    .. math::

      w &= \text{scale} \cdot \mathrm{linear\_range}
      \cdot \sinh(c \cdot \mathrm{base\_step}) \\
      \mathrm{base\_step} &= \mathrm{asinh}(1/\mathrm{linear\_range}) / \text{levels}

    Steps are multiplicative far from zero, and can cross zero, as with ``floor`` on
    floats. A log-step is an addition of codes, as in :class:`LogFormat`, :math:`c' = c
    + d / \mathrm{base\_step}`. Far from zero it multiplies by :math:`e^{\pm d}`, near
    zero it adds ``scale * linear_range * d``.

    Attributes:
      bits: width of a code, sign included, 2 to 16.
      linear_range: magnitude, relative to the scale, up to which the grid is about
        uniform; 1/3 by default.

    Raises:
      ValueError: if ``bits`` or ``linear_range`` is out of range.
      TypeError: if ``bits`` is not an int, or ``linear_range`` not a float.

    Example:
      >>> import madax
      >>> fmt = madax.SymlogFormat(bits=8)
      >>> print(f"{fmt.base_step:.4f} {fmt.dynamic_range:.0f}")
      0.0143 210
    """

    linear_range: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format_field(
            "linear_range", self.linear_range, 1e-6, 1e3, "relative to the scale"
        )
        object.__setattr__(self, "linear_range", float(self.linear_range))

    @property
    def base_step(self) -> float:
        """Spacing of the codes, in nats where the grid is logarithmic."""
        return math.asinh(1 / self.linear_range) / self.levels

    @property
    def dynamic_range(self) -> float:
        """Ratio of the max to the min non-zero magnitude."""
        return 1 / (self.linear_range * math.sinh(self.base_step))

    def encode(self, x: jax.Array) -> jax.Array:
        """The real-valued code, in [-levels, levels]."""
        code = arcsinh(x * (1 / self.linear_range)) * (1 / self.base_step)
        return jnp.clip(code, -self.levels, self.levels)

    def decode(self, code: jax.Array) -> jax.Array:
        """The value of a code, relative to the scale."""
        theta = code.astype(jnp.float32) * self.base_step
        return rounded(self.linear_range * sinh(theta))

    def log_step(self, code: jax.Array, d: jax.Array) -> jax.Array:
        """``d / base_step`` for any code."""
        del code
        return d * (1 / self.base_step)

    def relative_step(self, code: jax.Array) -> jax.Array:
        """``tanh(code * base_step)``, the hyperbolic sine over its derivative."""
        x = sinh(code.astype(jnp.float32) * self.base_step)
        return x / _root(x)

    def curvature(self, code: jax.Array) -> jax.Array:
        """``base_step * tanh(code * base_step)``."""
        # These are operations of add_step, so a compiler does them once for both.
        x, _ = sinh_and_decay(
            rounded(jnp.abs(code.astype(jnp.float32)) * self.base_step)
        )
        return jnp.where(code < 0, -self.base_step, self.base_step) * (x / _root(x))

    def add_step(self, code: jax.Array, u: jax.Array) -> jax.Array:
        """The difference of two inverse hyperbolic sines, as one log1p if small.

        Let y = x + u, relative to the linear range, x >= 0 and s(x) = sqrt(1 + x**2).
        Then asinh(y) - asinh(x) = log1p((u + s(y) - s(x)) / (x + s(x))), and
        s(y) - s(x) = u * (x + y) / (s(x) + s(y)).
        """
        theta = rounded(jnp.abs(code.astype(jnp.float32)) * self.base_step)
        sign = jnp.where(code < 0, -1, 1)
        x, decay = sinh_and_decay(theta)
        u = rounded(sign * u * (1 / self.linear_range))
        y = x + u
        slope = 1 + (x + y) / (_root(x) + _root(y))
        ratio = u * slope * decay
        # Far beyond zero nothing is left of the slope in float32.
        small = (jnp.abs(ratio) < 0.5) & (y > -1)
        # Both cases share one logarithm.
        moved = log1p(jnp.where(small, ratio, expm1_arcsinh(jnp.abs(y))))
        whole = jnp.where(y < 0, -moved, moved) - theta
        return sign * jnp.where(small, moved, whole) * (1 / self.base_step)
