"""Equally spaced values: integer quantisation."""

import dataclasses

import jax
import jax.numpy as jnp

from madax._core.numerics import expm1, rounded
from madax.formats._base import Format


@dataclasses.dataclass(frozen=True)
class UniformFormat(Format):
    r"""Equally spaced values: integer quantisation, the baseline to compare with.

    .. math:: w = \text{scale} \cdot c / \text{levels}

    A log-step is a multiplication of the code, :math:`c\,e^{\pm d}`. At zero it is an
    addition, so that zero is not a trap.

    Attributes:
      bits: width of a code, sign included, 2 to 16.

    Raises:
      ValueError: if ``bits`` is out of range.
      TypeError: if ``bits`` is not an int.

    Example:
      >>> import madax
      >>> print(madax.UniformFormat(bits=8).dynamic_range)
      127.0
    """

    @property
    def dynamic_range(self) -> float:
        """Ratio of the max to the min non-zero magnitude."""
        return float(self.levels)

    def encode(self, x: jax.Array) -> jax.Array:
        """The real-valued code, in [-levels, levels]."""
        return jnp.clip(x * self.levels, -self.levels, self.levels)

    def decode(self, code: jax.Array) -> jax.Array:
        """The value of a code, relative to the scale."""
        return rounded(code.astype(jnp.float32) * (1 / self.levels))

    def log_step(self, code: jax.Array, d: jax.Array) -> jax.Array:
        """``code * expm1(sign(code) * d)``; ``d`` at zero."""
        c = code.astype(jnp.float32)
        # A step beyond all codes must be finite, and one that is not finite stay so.
        moved = c * expm1(jnp.clip(jnp.where(c < 0, -d, d), -70, 70))
        return jnp.where((c != 0) & jnp.isfinite(d), moved, d)

    def relative_step(self, code: jax.Array) -> jax.Array:
        """``sign(code)``: a log-step multiplies the code."""
        return jnp.sign(code).astype(jnp.float32)

    def curvature(self, code: jax.Array) -> jax.Array:
        """Zero: all codes are equally far apart."""
        return jnp.zeros(code.shape, jnp.float32)

    def add_step(self, code: jax.Array, u: jax.Array) -> jax.Array:
        """``u * levels`` for any code."""
        del code
        return u * self.levels
