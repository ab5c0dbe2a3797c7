"""The nearest orthogonal matrix, by Newton-Schulz steps."""

import math

import jax

from madax._core.numerics import over
from madax.codes._scales import root_mean_square

# The coefficients of the quintic, from the reference. Its slope at 0 is steep.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


# Matrices of the same shape are traced once.
@jax.jit
def orthogonalized(x: jax.Array) -> jax.Array:
    """The matrices of orthogonal rows or columns nearest to matrices of any scale.

    They have a root mean square of 1, but zeros stay zeros. Five Newton-Schulz steps
    approach them. The shape is (..., rows, columns).
    """
    rows, columns = x.shape[-2:]
    stack = tuple(range(x.ndim - 2))
    longer = x.ndim - (1 if rows <= columns else 2)
    x = over(root_mean_square(x, (-2, -1), keepdims=True), x)
    x = x * (1 / math.sqrt(rows * columns))
    for _ in range(_ITERATIONS):
        # The smaller of both products with itself. Nothing is transposed: XLA would
        # give the parameters another layout, and copy a whole stack of them.
        gram = jax.lax.dot_general(x, x, (((longer,), (longer,)), (stack, stack)))
        # may fuse: the sums of a matrix product are in any order, too.
        change = _B * gram + _C * gram @ gram
        # may fuse: for the same reason
        x = _A * x + (change @ x if rows <= columns else x @ change)
    return over(root_mean_square(x, (-2, -1), keepdims=True), x)
