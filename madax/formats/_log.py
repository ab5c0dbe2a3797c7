"""The logarithmic number system: codes equally spaced in log|w|."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from madax._core.checks import check_format_field
from madax._core.numerics import exp, log, log_change, plus_product
from madax.formats._base import Format, check_format_bits, levels_of

# Codes decode to float32, which resolves _MIN_SPACING nats of log|w|, and spans
# _MAX_SPAN nats below 1.
_MIN_SPACING = 1e-6
_MAX_SPAN = 80.0

# The default ratios of the max to the min magnitude of log codes, for codes of one byte
# and of two. A wider range makes a coarser grid, which only many codes can afford.
_RANGE, _WIDE_RANGE = 100, 10_000


@dataclasses.dataclass(frozen=True)
class LogFormat(Format):
    r"""Logarithmic number system (LNS): codes are equally spaced in log|w|.

    .. math::

      |w| = \text{scale} \cdot e^{-\mathrm{base\_step}\,(\text{levels} - |c|)},
      \qquad c = 0 \Leftrightarrow w = 0

    A log-step is an addition of codes: with the sign in the code,
    :math:`c' = c + d / \mathrm{base\_step}` is
    :math:`w' = w\, e^{\mathrm{sign}(w)\, d}`. A non-zero value never rounds to
    zero; Madam never moves a zero, and never changes a sign.

    Attributes:
      bits: width of a code, sign included, 2 to 16.
      base_step: spacing of the codes, in nats, 1e-6 or more. The default has a dynamic
        range of 100 for 3 to 8 bits, and of 10 000 for more bits.

    Raises:
      ValueError: if ``bits`` or ``base_step`` is out of range.
      TypeError: if ``bits`` is not an int, or ``base_step`` not a float.

    Example:
      >>> import madax
      >>> print(f"{madax.LogFormat(bits=8).dynamic_range:.0f}")
      100
      >>> fmt = madax.LogFormat.from_dynamic_range(bits=8, ratio=1000)
      >>> print(fmt.levels, fmt.storage_dtype, f"{fmt.base_step:.4f}")
      127 int8 0.0548

    References:
      Zhao et al., `LNS-Madam: low-precision training in logarithmic number system
      using multiplicative weight update <https://arxiv.org/abs/2106.13914>`_, 2022,
      the multi-base LNS, with base factor ``gamma``.
    """

    moves_zeros = False
    base_step: float = None  # pyrefly: ignore[bad-assignment]  a float from here on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_step is None:
            ratio = _RANGE if self.bits <= 8 else _WIDE_RANGE
            default = self.from_dynamic_range(self.bits, ratio).base_step
            object.__setattr__(self, "base_step", default)
        max = _MAX_SPAN / self.levels
        check_format_field("base_step", self.base_step, _MIN_SPACING, max, "nats")
        object.__setattr__(self, "base_step", float(self.base_step))

    @classmethod
    def from_gamma(cls, bits: int, gamma: float) -> "LogFormat":
        """The base-2 format with ``gamma`` codes per octave, :math:`2^{1/γ}` apart.

        Args:
          bits: width of a code, sign included.
          gamma: codes per octave, the base factor of the multi-base LNS.

        Returns:
          The format, with ``base_step = ln(2) / gamma``.

        Raises:
          ValueError: if an argument is out of range.

        Example:
          >>> import madax
          >>> print(f"{madax.LogFormat.from_gamma(bits=8, gamma=8).base_step:.5f}")
          0.08664
        """
        check_format_bits(bits)
        min, max = math.log(2) * levels_of(bits) / _MAX_SPAN, math.log(2) / _MIN_SPACING
        check_format_field("gamma", gamma, min, max, "codes per octave")
        return cls(bits, math.log(2) / gamma)

    @classmethod
    def from_dynamic_range(cls, bits: int, ratio: float) -> "LogFormat":
        """The format whose max magnitude is ``ratio`` times its min.

        Args:
          bits: width of a code, sign included, 3 to 16.
          ratio: max over min non-zero magnitude.

        Returns:
          The format, with ``base_step = ln(ratio) / (levels - 1)``.

        Raises:
          ValueError: if an argument is out of range.

        Example:
          >>> import madax
          >>> fmt = madax.LogFormat.from_dynamic_range(bits=16, ratio=1e4)
          >>> print(f"{fmt.dynamic_range:.1f}")
          10000.0
        """
        check_format_bits(bits, min=3)
        steps = levels_of(bits) - 1
        min = math.exp(_MIN_SPACING * steps)
        max = math.exp(_MAX_SPAN * steps / (steps + 1))
        check_format_field("ratio", ratio, min, max, "max over min magnitude")
        return cls(bits, math.log(ratio) / steps)

    @property
    def dynamic_range(self) -> float:
        """Ratio of the max to the min non-zero magnitude."""
        return math.exp(self.base_step * (self.levels - 1))

    def encode(self, x: jax.Array) -> jax.Array:
        """The real-valued code, in [-levels, levels]; in [-1, 1] only for 0."""
        magnitude = plus_product(self.levels, log(jnp.abs(x)), 1 / self.base_step)
        return jnp.sign(x) * jnp.clip(magnitude, 1, self.levels)

    def decode(self, code: jax.Array) -> jax.Array:
        """The value of a code, relative to the scale."""
        c = code.astype(jnp.float32)
        value = exp(self.base_step * (jnp.abs(c) - self.levels))
        return jnp.where(c < 0, -value, jnp.where(c > 0, value, 0))

    def log_step(self, code: jax.Array, d: jax.Array) -> jax.Array:
        """``d / base_step`` for any code."""
        del code
        return d * (1 / self.base_step)

    def relative_step(self, code: jax.Array) -> jax.Array:
        """``sign(code)``: any log-step is relative."""
        return jnp.sign(code).astype(jnp.float32)

    def curvature(self, code: jax.Array) -> jax.Array:
        """``base_step``, towards larger magnitudes."""
        return jnp.sign(code).astype(jnp.float32) * self.base_step

    def add_step(self, code: jax.Array, u: jax.Array) -> jax.Array:
        """``sign(x) * log|1 + u / x| / base_step`` unless the sign changes."""
        x = self.decode(code)
        change = log_change(x, u) * (1 / self.base_step)
        sign, new_sign = jnp.sign(code), jnp.sign(x + u)
        start = jnp.where(code == 0, self.levels, jnp.abs(code.astype(jnp.int32)))
        # may fuse: no compiler does, as the product has another use; a sign is exact.
        crossed = new_sign * jnp.clip(start + change, 1, self.levels) - code
        return jnp.where(new_sign == sign, sign * change, crossed)

    def saturate(self, code: jax.Array, sign: jax.Array) -> jax.Array:
        """The nearest code of that sign; 0 only for sign 0."""
        far = sign.astype(jnp.int32) << 16  # outside of all codes, or 0
        low, high = jnp.clip(far, -self.levels, 1), jnp.clip(far, -1, self.levels)
        return jnp.clip(code, low, high)
