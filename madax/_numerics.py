"""Elementary functions in few vector operations, exact to float32.

The library functions that XLA calls for these are several times the cost of the
rest of an optimizer step on CPU.
"""

import jax
import jax.numpy as jnp

# (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2, lowest power first: interpolated at
# Chebyshev nodes, which leaves expm1 a relative error of 2.5e-8.
_EXPM1 = (
    0.4999999999999999,
    0.16666576666120062,
    0.04166655421299759,
    0.00836323288367248,
    0.0013926250830164739,
)


def expm1(x: jax.Array) -> jax.Array:
    """``exp(x) - 1``, float32 to a relative error of 3e-7; saturates, not overflows.

    Wider arrays go to ``jnp.expm1``.

    Args:
      x: any finite values, float32 or wider.

    Returns:
      The values; above x = 88 that of 88.
    """
    if x.dtype != jnp.float32:
        return jnp.expm1(x)
    x = jnp.clip(x, -87.0, 88.0)
    # x = n ln 2 + r, with ln 2 in two parts so that r is exact to the last bits.
    n = jnp.round(x * 1.4426950408889634)
    r = (x - n * 0.693359375) + n * 2.1219444005469057e-4
    p = jnp.float32(_EXPM1[-1])
    for c in _EXPM1[-2::-1]:
        p = p * r + jnp.float32(c)
    p = r + r * r * p
    two_n = jax.lax.bitcast_convert_type((round_to_int(n) + 127) << 23, jnp.float32)
    return two_n * p + (two_n - 1)


def round_to_int(x: jax.Array) -> jax.Array:
    """The nearest integer of a float32 under 2**22 in size, halves to even, int32.

    Added to 1.5 * 2**23, a float32 has no room for a fraction, and its lowest bits are
    the integer. A conversion would check every element for NaN and overflow, too.
    """
    rounder = jnp.float32(1.5 * 2**23)
    bits = jax.lax.bitcast_convert_type(x + rounder, jnp.int32)
    return bits - jax.lax.bitcast_convert_type(rounder, jnp.int32)


def relative_to(scale: jax.Array, x: jax.Array) -> jax.Array:
    """``x / scale``, also where the reciprocal of ``scale`` would underflow.

    XLA multiplies by it, and flushes what is subnormal: to 0 above 8.5e37.
    """
    down = jnp.where(scale > 1, 0.125, 1.0).astype(scale.dtype)
    return (x * down) / (scale * down)
