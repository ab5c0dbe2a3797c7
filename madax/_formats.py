"""Storage: the number formats that there are."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from madax._checks import check_format_field
from madax._format import Format, check_format_bits, levels_of
from madax._numerics import (
    arcsinh,
    exp,
    expm1,
    expm1_arcsinh,
    log,
    log1p,
    log_change,
    rounded,
    sinh,
    sinh_and_decay,
)

# Codes are decoded to float32. It tells apart values of log|w| that are _FINEST nats
# apart, and spans _WIDEST nats below 1.
_FINEST = 1e-6
_WIDEST = 80.0

# The default ratios of the largest to the smallest magnitude of log codes, for codes of
# one byte and of two. A wider range makes a coarser grid, which only many codes can
# afford.
_RANGE, _WIDE_RANGE = 100, 10_000


def _root(x: jax.Array) -> jax.Array:
    """The root of 1 + x**2."""
    return jnp.sqrt(1 + rounded(x * x))


def base_step_range(bits: int) -> tuple[float, float]:
    """The least and greatest spacing of log codes of that width, in nats."""
    return _FINEST, _WIDEST / levels_of(bits)


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
      base_step: spacing of the codes, in nats, 1e-6 or more. By default that of a
        dynamic range of 100 in codes of 3 to 8 bits, which are few and are needed near
        the scale, and of 10 000 in wider ones.

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

    base_step: float = None  # pyrefly: ignore[bad-assignment]  a float from here on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_step is None:
            ratio = _RANGE if self.bits <= 8 else _WIDE_RANGE
            default = self.from_dynamic_range(self.bits, ratio).base_step
            object.__setattr__(self, "base_step", default)
        lowest, highest = base_step_range(self.bits)
        check_format_field("base_step", self.base_step, lowest, highest, "nats")
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
        lowest, highest = math.log(2) * levels_of(bits) / _WIDEST, math.log(2) / _FINEST
        check_format_field("gamma", gamma, lowest, highest, "codes an octave")
        return cls(bits, math.log(2) / gamma)

    @classmethod
    def from_dynamic_range(cls, bits: int, ratio: float) -> "LogFormat":
        """The format whose largest magnitude is ``ratio`` times its smallest.

        Args:
          bits: width of a code, sign included, 3 to 16.
          ratio: largest over smallest non-zero magnitude.

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
        check_format_bits(bits, lowest=3)
        steps = levels_of(bits) - 1
        lowest = math.exp(_FINEST * steps)
        highest = math.exp(_WIDEST * steps / (steps + 1))
        check_format_field("ratio", ratio, lowest, highest, "largest over smallest")
        return cls(bits, math.log(ratio) / steps)

    @property
    def dynamic_range(self) -> float:
        """Ratio of the largest to the smallest non-zero magnitude."""
        return math.exp(self.base_step * (self.levels - 1))

    def encode(self, x: jax.Array) -> jax.Array:
        """The real-valued code, in [-levels, levels]; in [-1, 1] only for 0."""
        magnitude = self.levels + rounded(log(jnp.abs(x)) * (1 / self.base_step))
        return jnp.sign(x) * jnp.clip(magnitude, 1, self.levels)

    def decode(self, code: jax.Array) -> jax.Array:
        """The value of a code, relative to the scale."""
        c = code.astype(jnp.float32)
        value = exp(self.base_step * (jnp.abs(c) - self.levels))
        return jnp.where(c < 0, -value, jnp.where(c > 0, value, 0))

    def log_step(self, code: jax.Array, d: jax.Array) -> jax.Array:
        """``d / base_step``, whatever the code."""
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
        crossed = new_sign * jnp.clip(start + change, 1, self.levels) - code
        return jnp.where(new_sign == sign, sign * change, crossed)

    def saturate(self, code: jax.Array, sign: jax.Array) -> jax.Array:
        """The nearest code of that sign; 0 only for sign 0."""
        beyond = sign.astype(jnp.int32) << 16  # of all codes, or 0
        least = jnp.clip(beyond, -self.levels, 1)
        return jnp.clip(code, least, jnp.clip(beyond, -1, self.levels))


@dataclasses.dataclass(frozen=True)
class SymlogFormat(Format):
    r"""Uniform near zero, logarithmic far out: the codes of a hyperbolic sine.

    .. math::

      w &= \text{scale} \cdot \mathrm{linear\_range} \cdot \sinh(c \cdot \text{step})
      \\ \text{step} &= \mathrm{asinh}(1 / \mathrm{linear\_range}) / \text{levels}

    Steps are multiplicative where that matters, and can cross zero: this is the native
    counterpart of ``floor``. A log-step is again an addition of codes,
    :math:`c' = c + d / \text{step}`: far out it multiplies by :math:`e^{\pm d}`,
    near zero it adds ``scale * linear_range * d``.

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
      >>> print(f"{fmt.step:.4f} {fmt.dynamic_range:.0f}")
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
    def step(self) -> float:
        """Spacing of the codes, in nats where the grid is logarithmic."""
        return math.asinh(1 / self.linear_range) / self.levels

    @property
    def dynamic_range(self) -> float:
        """Ratio of the largest to the smallest non-zero magnitude."""
        return 1 / (self.linear_range * math.sinh(self.step))

    def encode(self, x: jax.Array) -> jax.Array:
        """The real-valued code, in [-levels, levels]."""
        code = arcsinh(x * (1 / self.linear_range)) * (1 / self.step)
        return jnp.clip(code, -self.levels, self.levels)

    def decode(self, code: jax.Array) -> jax.Array:
        """The value of a code, relative to the scale."""
        theta = code.astype(jnp.float32) * self.step
        return rounded(self.linear_range * sinh(theta))

    def log_step(self, code: jax.Array, d: jax.Array) -> jax.Array:
        """``d / step``, whatever the code."""
        del code
        return d * (1 / self.step)

    def relative_step(self, code: jax.Array) -> jax.Array:
        """``tanh(code * step)``, the hyperbolic sine over its derivative."""
        x = sinh(code.astype(jnp.float32) * self.step)
        return x / _root(x)

    def curvature(self, code: jax.Array) -> jax.Array:
        """``step * tanh(code * step)``."""
        # add_step has the same operations, so compilers do them once for both.
        x, _ = sinh_and_decay(rounded(jnp.abs(code.astype(jnp.float32)) * self.step))
        return jnp.where(code < 0, -self.step, self.step) * (x / _root(x))

    def add_step(self, code: jax.Array, u: jax.Array) -> jax.Array:
        """The difference of two inverse hyperbolic sines, as one log1p if small.

        With y = x + u, both relative to the linear range, x >= 0 and s(x) the root
        of 1 + x**2: asinh(y) - asinh(x) = log1p((u + s(y) - s(x)) / (x + s(x))), and
        s(y) - s(x) = u * (x + y) / (s(x) + s(y)).
        """
        theta = rounded(jnp.abs(code.astype(jnp.float32)) * self.step)
        sign = jnp.where(code < 0, -1, 1)
        x, decay = sinh_and_decay(theta)
        u = rounded(sign * u * (1 / self.linear_range))
        y = x + u
        slope = 1 + (x + y) / (_root(x) + _root(y))
        ratio = u * slope * decay
        small = jnp.abs(ratio) < 0.5
        # Both cases share one logarithm.
        moved = log1p(jnp.where(small, ratio, expm1_arcsinh(jnp.abs(y))))
        whole = jnp.where(y < 0, -moved, moved) - theta
        return sign * jnp.where(small, moved, whole) * (1 / self.step)


@dataclasses.dataclass(frozen=True)
class UniformFormat(Format):
    r"""Equally spaced values: integer quantisation, the baseline to compare with.

    .. math:: w = \text{scale} \cdot c / \text{levels}

    A log-step is a multiplication of the code, :math:`c\,e^{\pm d}`; up to one
    code from zero it is an addition, so that zero is not a trap.

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
        """Ratio of the largest to the smallest non-zero magnitude."""
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
        # The exponential saturates, but what is not finite is to stay so.
        moved = c * expm1(jnp.where(c < 0, -d, d))
        return jnp.where((c != 0) & jnp.isfinite(d), moved, d)

    def relative_step(self, code: jax.Array) -> jax.Array:
        """``sign(code)``: a log-step multiplies the code."""
        return jnp.sign(code).astype(jnp.float32)

    def curvature(self, code: jax.Array) -> jax.Array:
        """Zero: all codes are equally far apart."""
        return jnp.zeros(code.shape, jnp.float32)

    def add_step(self, code: jax.Array, u: jax.Array) -> jax.Array:
        """``u`` in codes, whatever the code."""
        del code
        return u * self.levels
