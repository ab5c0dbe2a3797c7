"""Rounding of real-valued code steps: nearest, or stochastic from a counter hash.

The random bits of an element are a hash of (seed, step, leaf, its index in the
whole array). So they are the same numbers on one device or a mesh, under jit or
eager; they take no key, no state and no memory traffic, only a few integer
operations inside the kernel that rounds.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from madax._numerics import round_to_int

Rounding = Literal["stochastic", "nearest"]


def check_rounding(rounding: Any) -> None:
    """Raises unless ``rounding`` is one of the modes there are."""
    if not isinstance(rounding, str) or rounding not in get_args(Rounding):
        raise ValueError(
            f"rounding must be one of {get_args(Rounding)}, got {rounding!r}; "
            "stochastic rounding is what lets narrow codes take small steps."
        )


def leaf_keys(seed: Any, count: jax.Array, leaves: int) -> jax.Array:
    """Two 32-bit keys a leaf, from (seed, step, leaf): uint32, shape (leaves, 2)."""
    seed = np.uint32(seed % 2**32) if isinstance(seed, int) else seed
    keys = jnp.arange(2 * leaves, dtype=jnp.uint32)
    for counter in (count, seed):
        keys = _mix(keys) + jnp.asarray(counter).astype(jnp.uint32)
    return _mix(keys).reshape(leaves, 2)


def random_bits(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """32 random bits for each element of a leaf: uint32 of ``shape``.

    Args:
      key: the leaf's two keys, uint32 of shape (2,).
      shape: the leaf's whole (global) shape.

    Returns:
      The bits; the high and the low half may be used as independent numbers.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        if size > 1:
            index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return _mix((index ^ key[0]) + key[1])


def round_steps(
    steps: jax.Array, rounding: Rounding, bits: jax.Array | None
) -> jax.Array:
    """Rounds real-valued code steps to integers.

    Args:
      steps: real-valued steps, in codes, float32, less than 2**22.
      rounding: "nearest" (halves to even) or "stochastic" (up with a probability
        of the fractional part, to within 2**-17).
      bits: the elements' random bits, whose high half is used; None for nearest.

    Returns:
      The steps, int32.
    """
    steps = steps.astype(jnp.float32)
    nearest = round_to_int(steps)
    if bits is None or rounding == "nearest":
        return nearest
    # 16 random bits as the top of a mantissa: a float in [1, 2), centred on 0.
    pattern = (bits >> 16 << 7) | jnp.uint32(0x3F800000)
    uniform = jax.lax.bitcast_convert_type(pattern, jnp.float32) - (1.5 - 2.0**-17)
    # Fractions apart: added to a large whole step, they would lose their digits.
    return nearest + round_to_int(steps - nearest.astype(jnp.float32) + uniform)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every input bit flips half of the output's.

    Two rounds of xor-shift and multiply, by constants whose bias Wellons found to
    be lowest in a search (`Prospecting for hash functions
    <https://nullprogram.com/blog/2018/07/31/>`_, "lowbias32").
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
