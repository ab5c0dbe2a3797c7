"""Elementary functions in few vector operations, with the same bits in each program.

A compiler may fuse a product with the sum that it goes into, and round once, not twice.
Whether XLA does so depends on the shape of an array, so a shard would get other bits
than the whole array. In all of madax, a product therefore enters a sum only by
:func:`plus_product`, :func:`minus_product` or :func:`rounded`. Each exception has a
comment, ``# may fuse:`` and the reason, which a test looks for.

XLA's own library functions for these cost several times as much as the rest of an
optimizer step on CPU.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from madax._core.derivatives import with_derivative

# r / expm1(r) = 1 - r/2 + z (a - z) b, z = r**2, to 2e-9 on |r| <= ln(2) / 2.
_EXPM1_A, _EXPM1_B = 60.239117276130735, 0.0013833723359935775
# expm1(r) = r + r**2 (a polynomial of these, the highest power first), to 2e-8.
_EXPM1_SERIES = (0.00138825213, 0.00836652052, 0.0416672006, 0.166665435, 0.49999997)
# log1p(f) = f - s (f - z c ((z + a)**2 + b)), s = f / (2 + f), z = s**2, to 1e-9 for
# 1 + f in [sqrt(1/2), sqrt(2)]. All are minimax, found by iterated least squares.
_LOG_A, _LOG_B, _LOG_C = 0.6691226031125902, 1.783942858941192, 0.29873072158667374
# ln 2 in two parts of 16 bits. An exponent has 8, so its products with them are exact.
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.4286197256296873e-06
_Function = Callable[[jax.Array], jax.Array]
# float32: a sign, 8 bits of exponent with this bias, 23 bits of fraction.
MANTISSA, BIAS = 23, 127
_SQRT_HALF = 0x3F3504F3  # sqrt(1/2) as a float32 pattern


def to_pattern(x: jax.Array) -> jax.Array:
    """The bits of a float32 as an int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_pattern(pattern: jax.Array) -> jax.Array:
    """The float32 that has the bits of an int32."""
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)


@with_derivative(lambda tangents, ans, x: tangents[0])
def rounded(x: jax.Array) -> jax.Array:
    """Returns its argument; a product passed here is not fused with a sum.

    The minimum of a pattern and the second largest integer is the pattern itself,
    except for one NaN, which becomes another. Compilers do not know that.

    Args:
      x: float32 or float64.
    """
    bits_dtype = np.dtype(np.int32 if x.dtype == np.float32 else np.int64)
    bits = jax.lax.bitcast_convert_type(x, bits_dtype)
    bits = jnp.minimum(bits, np.iinfo(bits_dtype).max - 1)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def plus_product(c: jax.Array | float, a: ArrayLike, b: ArrayLike) -> jax.Array:
    """``c + a * b``, rounded twice in every program; float32 or float64."""
    return c + rounded(jnp.asarray(a * b))


def minus_product(c: jax.Array | float, a: ArrayLike, b: ArrayLike) -> jax.Array:
    """``c - a * b``, rounded twice in every program; float32 or float64."""
    return c - rounded(jnp.asarray(a * b))


@with_derivative(lambda tangents, ans, value, stored: tangents[0])
def straight_through(value: jax.Array, stored: jax.Array) -> jax.Array:
    """Returns ``stored``, a rounding of ``value``, with the derivative of ``value``."""
    del value
    return stored


def _elementary(wide: _Function, derivative: Callable[..., jax.Array]):
    """Decorates a function of float32 arrays; ``wide`` is the function for others.

    The derivative is a function of the value and the argument. JAX would get it wrong,
    because integer operations on patterns have no derivative.
    """

    def rule(tangents, ans, x):
        return tangents[0] * derivative(ans, x)

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def elementary(x):
            return function(x) if x.dtype == jnp.float32 else wide(x)

        return with_derivative(rule)(elementary)

    return decorate


def _over_root_rule(tangents, ans, x, v):
    del x
    dx, dv = tangents
    root = jnp.sqrt(jnp.maximum(v, jnp.finfo(v.dtype).tiny))
    return dx / root - 0.5 * (ans / root) * (dv / root)  # may fuse: a derivative


@with_derivative(_over_root_rule)
def over_root(x: jax.Array, v: jax.Array) -> jax.Array:
    """``x / sqrt(v)`` for v >= 0, float32 or wider; clamps ``v`` to normal numbers."""
    tiny = float(jnp.finfo(v.dtype).tiny)
    return jax.lax.platform_dependent(
        x,
        v,
        # CPUs have no reciprocal root: XLA would divide and then multiply. It does not
        # recognise a reciprocal root in this form.
        cpu=lambda x, v: x / jnp.maximum(jnp.sqrt(v), math.sqrt(tiny)),
        default=lambda x, v: x * jax.lax.rsqrt(jnp.maximum(v, tiny)),
    )


def within(x: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """``jnp.clip(x, low, high)`` for bounds that are not NaN."""

    # XLA on CPU takes three instructions for a minimum, to keep NaN of either operand.
    def by_choice(x, low, high):
        x = jnp.where(x < low, low, x)
        return jnp.where(x > high, high, x)

    low, high = (jnp.asarray(bound, x.dtype) for bound in (low, high))
    return jax.lax.platform_dependent(
        x, low, high, cpu=by_choice, default=lambda x, low, high: jnp.clip(x, low, high)
    )


@_elementary(jnp.expm1, lambda ans, x: ans + 1)
def expm1(x: jax.Array) -> jax.Array:
    """``exp(x) - 1``, float32 to a relative error of 3e-7; saturates at x = 88."""
    power, e = _reduced_expm1(x)
    return power * e + (power - 1)  # may fuse: exact, power is a power of two


@_elementary(jnp.expm1, lambda ans, x: ans + 1)
def fast_expm1(x: jax.Array) -> jax.Array:
    """:func:`expm1` for x in [-80, 80], whose last bits may differ between programs.

    Leaves that are floats use it. It takes half the time of :func:`expm1` on CPU,
    because products may be fused with sums, and nothing is divided.
    """
    exponent = round_to_int(x * (1 / math.log(2)))
    # may fuse: for speed; then r is exact, but for the rounding of log(2) by 2e-9.
    r = x - exponent.astype(jnp.float32) * math.log(2)
    # may fuse: for speed
    series = functools.reduce(lambda total, a: total * r + a, _EXPM1_SERIES)
    power = _power_of_two(exponent)
    return power * (r + r * r * series) + (power - 1)  # may fuse: for speed


@_elementary(jnp.exp, lambda ans, x: ans)
def exp(x: jax.Array) -> jax.Array:
    """``exp(x)``, float32 to a relative error of 3e-7; clamps ``x`` to [-87, 88]."""
    power, e = _reduced_expm1(x)
    return power * (1 + e)


@_elementary(jnp.log, lambda ans, x: 1 / x)
def log(x: jax.Array) -> jax.Array:
    """``log(x)``, float32 to 3e-7, relative or absolute; -88 for 0 <= x < 2**-126."""
    exponent, mantissa = _exponent_and_mantissa(x)
    return _log(exponent, mantissa - 1)


@_elementary(jnp.log1p, lambda ans, x: 1 / (1 + x))
def log1p(x: jax.Array) -> jax.Array:
    """``log(1 + x)``, float32 to a relative error of 3e-7; -88 for ``x = -1``."""
    x = rounded(x)
    exponent, mantissa = _exponent_and_mantissa(1 + x)
    return _log(exponent, jnp.where(exponent == 0, x, mantissa - 1))


def log_change(x: jax.Array, u: jax.Array) -> jax.Array:
    """``log|x + u| - log|x|``, or ``log|u|`` where x is 0, as exact as :func:`log`."""
    ratio = rounded(u / jnp.where(x == 0, 1, x))
    moved = jnp.where(x == 0, ratio, 1 + ratio)
    if moved.dtype != jnp.float32:
        small = (jnp.abs(ratio) < 0.5) & (x != 0)
        size = jnp.maximum(jnp.abs(moved), jnp.finfo(moved.dtype).tiny)
        return jnp.where(small, jnp.log1p(ratio), jnp.log(size))
    exponent, mantissa = _exponent_and_mantissa(jnp.abs(moved))
    # A small ratio keeps the digits that the sum has lost.
    small = (exponent == 0) & (moved > 0) & (x != 0)
    return _log(exponent, jnp.where(small, ratio, mantissa - 1))


# may fuse: a derivative
@_elementary(jnp.sinh, lambda ans, x: jnp.sqrt(1 + ans * ans))
def sinh(x: jax.Array) -> jax.Array:
    """The hyperbolic sine, float32 to a relative error of 3e-7 for |x| < 88."""
    magnitude, _ = sinh_and_decay(jnp.abs(x))
    return jnp.where(x < 0, -magnitude, magnitude)


def sinh_and_decay(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``sinh(x)`` and ``exp(-x)`` for x in [0, 88), to a relative error of 3e-7."""
    e = expm1(x)
    decay = rounded(1 / (1 + e))
    return 0.5 * plus_product(e, e, decay), decay


# may fuse: a derivative
@_elementary(jnp.arcsinh, lambda ans, x: 1 / jnp.sqrt(1 + x * x))
def arcsinh(x: jax.Array) -> jax.Array:
    """The inverse of sinh, to a relative error of 3e-7; saturates at |x| = 1e18."""
    magnitude = log1p(expm1_arcsinh(jnp.abs(x)))
    return jnp.where(x < 0, -magnitude, magnitude)


def expm1_arcsinh(x: jax.Array) -> jax.Array:
    """``expm1(arcsinh(x))`` for ``x >= 0``; saturates at ``x = 1e18``."""
    x = jnp.minimum(x, 1e18)
    square = rounded(x * x)
    return x + square / (1 + jnp.sqrt(1 + square))


def decay_rate(decay: ArrayLike) -> jax.Array:
    """``1 - decay``, in the dtype of JAX's floats."""
    return jnp.asarray(1 - decay, jnp.result_type(float))


def moving_average(moment: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """``moment`` with a fraction ``rate`` of it replaced by ``x``."""
    # In float32, decay and 1 - decay do not add up to 1; these coefficients do.
    rate = rate.astype(moment.dtype)
    return plus_product(minus_product(moment, rate, moment), rate, x)


def round_to_int(x: jax.Array) -> jax.Array:
    """The integer nearest to a float32 below 2**22 in size, halves to even; int32.

    A float32 near 1.5 * 2**23 has no bits for a fraction. So adding that number rounds,
    and the lowest bits are the integer. A conversion would check each element for NaN
    and overflow, too.
    """
    rounder = jnp.float32(1.5 * 2**23)
    bits = to_pattern(x + rounder)
    return bits - to_pattern(rounder)


def incremented(count: jax.Array) -> jax.Array:
    """``count + 1``, which saturates; ``optax.safe_increment`` as an array."""
    return jnp.asarray(optax.safe_increment(count))


def divided(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale``, as the product with a reciprocal.

    Otherwise it depends on the sharding whether XLA makes such a product of a quotient.
    """
    x, scale = normal_reciprocal(x, scale)
    return rounded(x * rounded(1 / scale))


def divided_or_same(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale`` as :func:`divided`, or ``x`` where the scale is 0."""
    return divided(x, jnp.where(scale > 0, scale, 1))


def normal_reciprocal(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` and ``scale`` with the same quotient, where 1 / scale does not underflow.

    XLA flushes subnormal numbers to zero, such as the reciprocal of 8.5e37.
    """
    down = jnp.where(scale > 1, 0.125, 1.0).astype(scale.dtype)
    return x * down, scale * down


def _reduced_expm1(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two and ``expm1(r)``, with exp(x) = power * exp(r), |r| <= ln(2)/2."""
    x = jnp.clip(x, -87.0, 88.0)
    n = jnp.round(x * (1 / math.log(2)))
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW  # may fuse: both products are exact
    z = rounded(r * r)
    h = minus_product(0.5 * r, z * (_EXPM1_A - z), _EXPM1_B)
    return _power_of_two(round_to_int(n)), r / (1 - h)


def _power_of_two(n: jax.Array) -> jax.Array:
    return from_pattern((n + BIAS) << MANTISSA)


def _exponent_and_mantissa(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The integer k and m in [sqrt(1/2), sqrt(2)), x = 2**k m; -127 and 1 for 0."""
    bits = to_pattern(x)
    exponent = (bits - _SQRT_HALF) >> MANTISSA
    return exponent, from_pattern(bits - (exponent << MANTISSA))


def _log(exponent: jax.Array, f: jax.Array) -> jax.Array:
    """``exponent * log(2) + log1p(f)``, for 1 + f in [sqrt(1/2), sqrt(2)]."""
    s = f / (2 + f)
    # This is not s * s, as XLA on CPU ends a kernel at a quotient that is used twice.
    z = rounded(f * f / ((2 + f) * (2 + f)))
    square = rounded((z + _LOG_A) * (z + _LOG_A))
    log1p_f = minus_product(f, s, minus_product(f, z * _LOG_C, square + _LOG_B))
    k = exponent.astype(jnp.float32)
    return k * _LN2_HIGH + (k * _LN2_LOW + log1p_f)  # may fuse: the products are exact
