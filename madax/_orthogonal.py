"""Direction: the orthogonal matrix next to a momentum."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._checks import check_decay, check_state, leaf_name
from madax._leaves import (
    flatten,
    flatten_like,
    flatten_named,
    zeros_like,
)
from madax._numerics import decay_rate, moving_average, relative_to
from madax._quantize_params import NO_WEIGHT
from madax._quantized_array import is_quantized
from madax._scales import root_mean_square

# The coefficients of the quintic, from the reference. Its slope at 0 is steep.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
# Tables, of which a step sees some rows, and last layers take Madam's direction.
_TABLE = re.compile(
    r"embed|(^|[/_])(emb|wte|wpe)([/_]|$)"  # token_embedding/embedding, wte/weight
    r"|(^|/)((lm|mlm|cls|output)_)?(head|logits|classifier)(_?\d+)?(/|$)",
    re.IGNORECASE,
)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
# Flax's kernels of attention map features to (heads, features) and back.
_TO_HEADS = re.compile(r"(^|/)(query|key|value)(/|$)")
_FROM_HEADS = re.compile(r"(^|/)out(/|$)")


class MatrixAxes(NamedTuple):
    """How a leaf is a matrix, or a stack of them; what axes are left are columns.

    Attributes:
      stacked: how many axes, the first, count matrices.
      rows: how many axes after those are the rows of each.
    """

    stacked: int = 0
    rows: int = 1


# The axes of a leaf, given its path and shape; None if it is no matrix.
Matrices = Callable[[str, tuple[int, ...]], "MatrixAxes | tuple[int, int] | None"]


class ScaleByOrthogonalMomentumState(NamedTuple):
    """State of :func:`scale_by_orthogonal_momentum`.

    Attributes:
      m: momentum, a tree like the parameters, float32 or wider.
    """

    m: Any


def scale_by_orthogonal_momentum(
    b1: jax.typing.ArrayLike = 0.95,
    *,
    matrices: Matrices | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of Muon: a momentum, made orthogonal.

    .. math::

      m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad
        X_0 = \frac{b_1 m_t + (1 - b_1) g_t}{\lVert \cdot \rVert_F} \\
      A_k &= X_k X_k^\top, \qquad
        X_{k+1} = 3.4445 X_k + (-4.7750 A_k + 2.0315 A_k^2) X_k, \qquad
        k = 0, \dots, 4 \\
      \hat g_t &= X_5 / \mathrm{rms}(X_5), \qquad 0/0 := 0

    Five Newton-Schulz steps bring those singular values of a matrix that are above a
    hundredth of its norm to between 0.7 and 1.2, and keep its singular vectors. Like
    that of :func:`scale_by_second_moment`, this direction has a root mean square of 1
    and does not depend on the gradient's scale, so that rates carry over.

    It may stand before :func:`scale_by_sign_log`, or before the learning rate of an
    additive optimizer; on leaves that are floats or codes.

    By default a leaf of rank 2 is a matrix. One of rank 3 is a stack of matrices, but
    for kernels of a convolution, by name, and of Flax's attention. One of rank 4 or
    more is the kernel of a convolution, whose last axis is the columns, with stacks
    before. A gradient element that is not finite does not enter the momentum.

    Args:
      b1: decay rate of the momentum, in [0, 1).
      matrices: ``matrices(path, shape)`` is a :class:`MatrixAxes`, for paths like
        ``"Dense_0/kernel"``; None for that default.

    Returns:
      A gradient transformation from gradients to directions, float32 or wider. All
      leaves must be matrices; :func:`muon_madam` has others, too.

    Raises:
      ValueError: if ``b1`` is out of range, a leaf is no matrix, or gradients do not
        match.
      TypeError: if an argument is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.scale_by_orthogonal_momentum()
      >>> w = jnp.ones((2, 2))
      >>> g = jnp.array([[1e-6, 0.0], [0.0, -3e-6]])
      >>> direction, _ = tx.update(g, tx.init(w))
      >>> print(jnp.sign(direction), f"{jnp.mean(direction**2):.2f}")
      [[ 1.  0.]
       [ 0. -1.]] 1.00

    References:
      Jordan et al., `Muon: an optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    check_decay("b1", b1, 0.95)
    check_matrices(matrices)
    axes_of = matrices or default_matrix_axes

    def init_fn(params):
        paths, leaves, treedef = flatten(params)
        for path, leaf in zip(paths, leaves, strict=True):
            _check_axes(path, leaf.shape, axes_of(path, leaf.shape))
        m = treedef.unflatten([zeros_like(leaf) for leaf in leaves])
        return ScaleByOrthogonalMomentumState(m)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state(state, ScaleByOrthogonalMomentumState)
        paths, ms, treedef = flatten_named(state.m)
        gs = flatten_like(updates, treedef, "state.m", paths, ms)
        directions, rate = [], decay_rate(b1)
        for i, (path, g) in enumerate(zip(paths, gs, strict=True)):
            g = jnp.asarray(g).astype(ms[i].dtype)
            g = jnp.where(jnp.isfinite(g), g, ms[i])
            ms[i] = moving_average(ms[i], g, rate)
            axes = _check_axes(path, g.shape, axes_of(path, g.shape))
            ahead = moving_average(ms[i], g, rate)
            directions.append(_as_matrices(orthogonalized, ahead, axes))
        m = ScaleByOrthogonalMomentumState(treedef.unflatten(ms))
        return treedef.unflatten(directions), m

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def orthogonalized(x: jax.Array) -> jax.Array:
    """Matrices of orthogonal rows or columns, of a root mean square of 1.

    Args:
      x: matrices, shape (..., rows, columns), float32 or wider, of any scale.

    Returns:
      Those next to them, to within five Newton-Schulz steps; of zeros, zeros.
    """
    rows, columns = x.shape[-2:]
    wide = x if rows <= columns else x.mT
    wide = _over(root_mean_square(wide, (-2, -1), keepdims=True), wide)
    wide = wide * (1 / math.sqrt(rows * columns))
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = _A * wide + (_B * gram + _C * gram @ gram) @ wide
    x = wide if rows <= columns else wide.mT
    return _over(root_mean_square(x, (-2, -1), keepdims=True), x)


def _over(scale: jax.Array, x: jax.Array) -> jax.Array:
    return relative_to(jnp.where(scale > 0, scale, 1), x)


def _as_matrices(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, axes: MatrixAxes
) -> jax.Array:
    """Applies a function of (stacks of) matrices to a leaf."""
    matrices = x.reshape(*x.shape[: axes.stacked], *_sizes(x.shape, axes))
    return fn(matrices).reshape(x.shape)


# --- which leaves, and how ------------------------------------------------------------


def default_matrix_axes(path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
    """How a leaf is a matrix; None for vectors, norms, embeddings and last layers."""
    rank = len(shape)
    if rank < 2 or NO_WEIGHT.search(path) or _TABLE.search(path):
        return None
    if rank > 2 and _TO_HEADS.search(path):
        axes = MatrixAxes(rank - 3, 1)
    elif rank > 2 and _FROM_HEADS.search(path):
        axes = MatrixAxes(rank - 3, 2)
    elif rank > 3 or _CONVOLUTION.search(path):
        axes = MatrixAxes(max(rank - 4, 0), min(rank - 1, 3))
    else:
        axes = MatrixAxes(rank - 2, 1)
    # A single row or column would lose all but its length.
    return axes if min(_sizes(shape, axes)) > 1 else None


def matrix_labels(matrices: Matrices | None) -> Callable[[Any], Any]:
    """A function that labels leaves "matrix" or "other", for ``optax.partition``."""
    axes_of = matrices or default_matrix_axes

    def labels(tree: Any) -> Any:
        paths, leaves, treedef = flatten_named(tree, is_leaf=is_quantized)
        shapes = map(np.shape, leaves)
        found = [axes_of(*leaf) for leaf in zip(paths, shapes, strict=True)]
        return treedef.unflatten(["other" if x is None else "matrix" for x in found])

    return labels


def check_matrices(matrices: Any) -> None:
    """Raises unless ``matrices`` is None or a function."""
    if matrices is not None and not callable(matrices):
        raise TypeError(
            f"matrices must be a function of (path, shape), got {matrices!r} of type "
            f"{type(matrices).__name__}; it tells how leaves are matrices: use for "
            "example lambda path, shape: (0, 1) if len(shape) == 2 else None."
        )


def _check_axes(path: str, shape: tuple[int, ...], axes: Any) -> MatrixAxes:
    """The axes, if the leaf has them."""
    name = leaf_name("params", path)
    if axes is None:
        raise ValueError(
            f"{name} of shape {shape} is no matrix; use muon_madam, leave it out with "
            "optax.partition, or pass matrices(path, shape) that tells its axes."
        )
    if len(axes) != 2 or axes[0] < 0 or not 0 < axes[1] < len(shape) - axes[0]:
        raise ValueError(
            f"{name} has shape {shape}, but matrices says (stacked, rows) = "
            f"{tuple(axes)}; it must be two numbers of axes that leave one or more for "
            "columns."
        )
    return MatrixAxes(*axes)


def _sizes(shape: tuple[int, ...], axes: MatrixAxes) -> tuple[int, int]:
    """The rows and columns of the matrices of a leaf."""
    first = axes.stacked + axes.rows
    return math.prod(shape[axes.stacked : first]), math.prod(shape[first:])
