"""The nearest orthogonal matrix, by Newton-Schulz steps."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from madax._core.numerics import divided_or_same
from madax._core.shards import barrier
from madax.codes._leaves import compute_dtype, widen
from madax.codes._scales import root_mean_square

# The coefficients of the quintic, from the reference. Its slope at 0 is steep.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


# Matrices of the same shape are traced once.
@jax.jit
def orthogonalized(x: jax.Array) -> jax.Array:
    """Returns the nearest matrices with orthogonal rows or columns.

    They have a root mean square of 1, but zeros stay zeros. Five Newton-Schulz steps
    approximate them, in bfloat16 on chips that multiply bfloat16 matrices. The shape is
    (..., rows, columns), and the dtype of the result float32 or wider.
    """
    wide = partial(newton_schulz, dtype=compute_dtype(x))
    if compute_dtype(x) == jnp.float64:
        return wide(x)
    narrow = partial(newton_schulz, dtype=jnp.bfloat16)
    return jax.lax.platform_dependent(
        x, tpu=narrow, cuda=narrow, rocm=narrow, default=wide
    )


def newton_schulz(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Like :func:`orthogonalized`, with matrix products in ``dtype``."""
    rows, columns = x.shape[-2:]
    stack = tuple(range(x.ndim - 2))
    longer = x.ndim - (1 if rows <= columns else 2)

    def stored(x):
        # XLA would keep the sums that a narrow matrix was rounded from.
        return barrier(x.astype(dtype))

    x = divided_or_same(widen(x), root_mean_square(x, (-2, -1), keepdims=True))
    x = stored(x * (1 / math.sqrt(max(rows * columns, 1))))
    for _ in range(_ITERATIONS):
        # The smaller of both products with itself. Nothing is transposed: XLA would
        # give the parameters another layout, and copy a whole stack of them.
        gram = jax.lax.dot_general(x, x, (((longer,), (longer,)), (stack, stack)))
        # may fuse: the sums of a matrix product are in any order, too.
        change = (_B * widen(gram) + _C * widen(gram @ gram)).astype(dtype)
        product = change @ x if rows <= columns else x @ change
        # may fuse: for the same reason
        x = stored(_A * widen(x) + widen(product))
    x = widen(x)
    # Nothing in it can overflow, so this root mean square needs no scale of its own.
    return divided_or_same(x, jnp.sqrt(jnp.mean(x * x, (-2, -1), keepdims=True)))
