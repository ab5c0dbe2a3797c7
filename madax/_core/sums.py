"""Sums of integers over leaves of any size: in parts, each of which cannot overflow."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def part_axes(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """The axes of a part of a leaf: all, or the last ones of ``most`` elements.

    A single axis is a part, however long.
    """
    first = 0
    while first < len(shape) - 1 and math.prod(shape[first:]) > most:
        first += 1
    return tuple(range(first, len(shape)))


def fraction(condition: jax.Array) -> jax.Array:
    """The fraction of elements at which a condition holds, float32; 0 of none."""
    axes = part_axes(condition.shape, 2**32 - 1)
    size = math.prod(condition.shape[axis] for axis in axes)
    counts = jnp.sum(condition, axes, jnp.uint32)
    return jnp.mean(counts / jnp.float32(max(size, 1)))
