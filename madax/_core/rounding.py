"""Rounding of real-valued code steps: nearest, or stochastic from a counter hash.

The random bits of an element are a hash of (seed, step, path of the leaf, index in the
whole array). So they are the same on one device and on a mesh, under jit and eagerly.
They take no key, no state and no memory traffic, only a few integer operations inside
the kernel that rounds.
"""

import hashlib
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from madax._core.checks import check_choice
from madax._core.numerics import round_to_int
from madax._core.vectors import split_per_leaf

Rounding = Literal["stochastic", "nearest"]


def check_rounding(rounding: object) -> None:
    """Raises unless ``rounding`` is a :data:`Rounding`."""
    why = "stochastic rounding is what lets narrow codes take small steps."
    check_choice("rounding", rounding, get_args(Rounding), why)


def leaf_keys(
    seed: ArrayLike,
    count: jax.Array,
    paths: Sequence[str],
    layer: ArrayLike | None = None,
) -> jax.Array:
    """Returns a key for each leaf, from (seed, step, path): uint32, shape (leaves,).

    A leaf has the same key in the whole tree and in any part of it. Indices in a path
    are numbers: layer 3 of a stack, ``layers/w`` with ``layer=3``, has the key of
    ``layers/3/w``. All integers are scalars.
    """
    seed = np.uint32(seed % 2**32) if isinstance(seed, int) else seed
    parts = [path.split("/") for path in paths]
    names = ["/".join(p for p in path if not p.isdecimal()) for path in parts]
    digests = [hashlib.blake2s(name.encode(), digest_size=8).digest() for name in names]
    keys = np.array([np.frombuffer(d, "<u4") for d in digests]).reshape(-1, 2)
    keys = keys.astype(np.uint32)
    keys = keys if layer is None else _mix(keys + jnp.asarray(layer).astype(jnp.uint32))
    # The loop takes the first indices of all leaves, then the second ones, and so on.
    indices = [[int(p) % 2**32 for p in path if p.isdecimal()] for path in parts]
    for level in zip_longest(*indices):
        there = np.array([[i is not None] for i in level])
        index = np.array([[i or 0] for i in level], np.uint32)
        xp = np if layer is None else jnp
        keys = xp.where(there, _mix(keys + index), keys)
    for counter in (count, seed):
        keys = _mix(keys) + jnp.asarray(counter).astype(jnp.uint32)
    # With half a key, two leaves could have the same bits in every step.
    keys = _mix(keys)
    return keys[:, 0] ^ keys[:, 1]


def keys_per_leaf(
    seed: ArrayLike,
    count: jax.Array,
    paths: Sequence[str],
    layer: ArrayLike | None = None,
    *,
    separate_kernels: bool = False,
) -> list[jax.Array]:
    """Returns the :func:`leaf_keys` as scalars, split by :func:`split_per_leaf`."""
    keys = leaf_keys(seed, count, paths, layer)
    return split_per_leaf(keys, len(paths), separate_kernels=separate_kernels)


def random_bits(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns 32 random bits per element of a leaf: uint32, of its global shape.

    The low 23 and the high 24 bits may be used as two numbers: the bits they share only
    affect events with a probability of 2**-9.
    """
    row = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        if size > 1:
            stride = np.uint32(math.prod(shape[axis + 1 : -1]) % 2**32)
            # may fuse: integers
            row += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    column = jnp.zeros(shape, jnp.uint32)
    if shape:
        column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    # Sum and difference depend on both. XLA would compute a term of the row or column
    # alone first, and a TPU would be slow to broadcast it.
    x = (row + column) * np.uint32(0x9E3779B9) ^ (row - column) * np.uint32(0x85EBCA6B)
    x += key
    x = (x ^ (x >> 14)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def rounding_bits(
    rounding: Rounding, key: jax.Array, shape: Sequence[int]
) -> jax.Array | None:
    """Returns the :func:`random_bits` to round a leaf; None for rounding to nearest."""
    return random_bits(key, shape) if rounding == "stochastic" else None


def round_steps(steps: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Rounds real-valued code steps, less than 2**22 in size, to int32.

    A step is rounded up with the probability of its fractional part, to within 2**-23,
    or the spacing of floats at the step, by the high 24 of its random ``bits``. Without
    bits it is rounded to nearest, halves to even.
    """
    steps = steps.astype(jnp.float32)
    if bits is not None:
        # The product is exact, and in [-1/2, 1/2].
        steps += bits.astype(jnp.int32).astype(jnp.float32) * 2.0**-32
    return round_to_int(steps)


def _mix(x):
    """A bijection of 32 bits in which every input bit flips half of the output bits.

    Two rounds of xor-shift and multiply, by constants whose bias Wellons found to
    be lowest in a search (`Prospecting for hash functions
    <https://nullprogram.com/blog/2018/07/31/>`_, "lowbias32").
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
