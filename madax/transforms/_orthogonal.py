"""Direction: the orthogonal matrix next to a momentum."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_decay, check_state, leaf_name, warn_of_leaves
from madax._core.leaf_kinds import Axes, read_leaves
from madax._core.names import Tree, flatten_named, is_part
from madax._core.numerics import decay_rate, moving_average, relative_to
from madax._core.shards import barrier
from madax.codes._array import is_quantized
from madax.codes._leaves import (
    compute_dtype,
    flatten,
    flatten_like,
    widen,
    zeros_like,
)
from madax.codes._scales import root_mean_square

# The coefficients of the quintic, from the reference. Its slope at 0 is steep.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_AMISS = (
    "it is not clear which axes are rows and columns, so these leaves take the "
    "direction of Madam; pass matrices(path, leaf), which returns a "
    "madax.transforms.MatrixDimensionNumbers of the axes, or None."
)


class MatrixDimensionNumbers(NamedTuple):
    """Which axes of a leaf are the rows and columns of a matrix; others count matrices.

    ``optax.contrib.MuonDimensionNumbers`` has the same fields, and may stand for it.

    Attributes:
      reduction_axis: the axis, or axes, that a product with the matrix sums over.
      output_axis: the axis, or axes, of the result.

    Example:
      >>> import madax
      >>> # A stack of layers on axis 1: width, layers, heads, features of a head.
      >>> query = madax.transforms.MatrixDimensionNumbers(0, output_axis=(2, 3))
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


# The axes of a leaf, given its path and an object with its shape and dtype; None if it
# is not a matrix.
Matrices = Callable[[str, Tree], MatrixDimensionNumbers | None]


class ScaleByOrthogonalMomentumState(NamedTuple):
    """State of :func:`scale_by_orthogonal_momentum`.

    Attributes:
      mu: momentum, a tree like the parameters, float32 or wider.
    """

    mu: Tree


def scale_by_orthogonal_momentum(
    b1: ArrayLike = 0.95, *, matrices: Matrices | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of Muon: a momentum, made orthogonal.

    .. math::

      \mu_t &= b_1 \mu_{t-1} + (1 - b_1) g_t, \qquad
        X_0 = \frac{b_1 \mu_t + (1 - b_1) g_t}{\lVert \cdot \rVert_F} \\
      A_k &= X_k X_k^\top, \qquad
        X_{k+1} = 3.4445 X_k + (-4.7750 A_k + 2.0315 A_k^2) X_k, \qquad
        k = 0, \dots, 4 \\
      \hat g_t &= X_5 / \mathrm{rms}(X_5), \qquad 0/0 := 0

    Five Newton-Schulz steps bring those singular values of a matrix that are above a
    hundredth of its norm to between 0.7 and 1.2, and keep its singular vectors. Like
    the direction of :func:`scale_by_second_moment`, this one has a root mean square of
    1 and does not depend on the gradient's scale, so that rates carry over.

    It may stand before :func:`scale_by_sign_log`, or before the learning rate of an
    additive optimizer; on leaves that are floats or codes.

    By default names and shapes tell which axes of a leaf are the rows and columns, as
    :func:`madax.diagnostics.matrices` shows. A gradient element that is not finite does
    not enter the momentum.

    Args:
      b1: decay rate of the momentum, in [0, 1).
      matrices: ``matrices(path, leaf)`` is a :class:`MatrixDimensionNumbers`, for paths
        like ``"Dense_0/kernel"`` and leaves with a shape and a dtype; None for that
        default.

    Returns:
      A gradient transformation from gradients to directions, float32 or wider. All
      leaves must be matrices; :func:`muon_madam` has others, too.

    Raises:
      ValueError: if ``b1`` is out of range, a leaf is no matrix, or gradients do not
        match.
      TypeError: if an argument is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.transforms.scale_by_orthogonal_momentum()
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
    b1 = check_decay("b1", b1, 0.95)
    check_matrices(matrices)

    def axes_of(paths, leaves):
        axes = read_axes(paths, leaves, matrices, others=True)
        if None in axes:
            i = axes.index(None)
            raise ValueError(
                f"{leaf_name('params', paths[i])} of shape {np.shape(leaves[i])} is no "
                "matrix; use muon_madam, leave it out with optax.partition, or pass "
                "matrices(path, leaf) that tells its axes."
            )
        return axes

    return orthogonal_momentum(b1, axes_of)


def orthogonal_momentum(
    b1: ArrayLike, axes_of: Callable[..., Sequence[Tree]]
) -> optax.GradientTransformationExtraArgs:
    """As :func:`scale_by_orthogonal_momentum`, checked, with the axes of all leaves."""

    def init_fn(params):
        paths, leaves, treedef = flatten(params)
        axes_of(paths, leaves)
        mu = treedef.unflatten([zeros_like(leaf) for leaf in leaves])
        return ScaleByOrthogonalMomentumState(mu)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state(state, ScaleByOrthogonalMomentumState)
        paths, ms, treedef = flatten_named(state.mu)
        gs = flatten_like(updates, treedef, "state.mu", paths, ms)
        directions, rate = [], decay_rate(b1)
        for i, (axes, g) in enumerate(zip(axes_of(paths, ms), gs, strict=True)):
            g = jnp.asarray(g).astype(ms[i].dtype)
            g = jnp.where(jnp.isfinite(g), g, ms[i])
            ms[i] = moving_average(ms[i], g, rate)
            ahead = moving_average(ms[i], g, rate)
            directions.append(_as_matrices(orthogonalized, ahead, axes))
        new_state = ScaleByOrthogonalMomentumState(treedef.unflatten(ms))
        return treedef.unflatten(directions), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Matrices of the same shape are traced once.
@jax.jit
def orthogonalized(x: jax.Array) -> jax.Array:
    """The matrices of orthogonal rows or columns nearest to matrices of any scale.

    They have a root mean square of 1, but zeros stay zeros. Five Newton-Schulz steps
    approach them, in bfloat16 where a chip multiplies matrices of it. The shape is
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
    """As :func:`orthogonalized`, with products of matrices in ``dtype``."""
    rows, columns = x.shape[-2:]
    stack = tuple(range(x.ndim - 2))
    longer = x.ndim - (1 if rows <= columns else 2)

    def stored(x):
        # XLA would keep the sums that a narrow matrix was rounded from.
        return barrier(x.astype(dtype))

    x = _over(root_mean_square(x, (-2, -1), keepdims=True), widen(x))
    x = stored(x * (1 / math.sqrt(rows * columns)))
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
    return _over(jnp.sqrt(jnp.mean(x * x, (-2, -1), keepdims=True)), x)


def _over(scale: jax.Array, x: jax.Array) -> jax.Array:
    return relative_to(jnp.where(scale > 0, scale, 1), x)


def _as_matrices(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, axes: Axes
) -> jax.Array:
    """Applies a function of (stacks of) matrices to a leaf."""
    sharding = jax.typeof(x).sharding
    # JAX has it since 0.7.
    if sharding.mesh.explicit_axes and hasattr(jax.sharding, "auto_axes"):
        # Explicit types tell no layout for the product of a matrix with itself, so the
        # compiler chooses one, as on a mesh of Auto axes.
        run: Tree = jax.sharding.auto_axes(
            lambda x: _as_matrices(fn, x, axes), out_sharding=sharding
        )
        return run(x)
    stack, rows, columns = in_order(x.shape, axes)
    order = (*stack, *rows, *columns)
    # An axis of size 1 is in order anywhere.
    long = [i for i in order if x.shape[i] > 1]
    moves = long != sorted(long)
    moved = x.transpose(order) if moves else x
    sizes = (math.prod(x.shape[i] for i in axes) for axes in (rows, columns))
    out = fn(moved.reshape(*(x.shape[i] for i in stack), *sizes)).reshape(moved.shape)
    return out.transpose(np.argsort(order)) if moves else out


# --- which leaves, and how ------------------------------------------------------------


def in_order(
    shape: Sequence[int], axes: Axes
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The axes of the stack, of rows and of columns, in the order of the leaf."""
    rows, columns = sorted((tuple(x) for x in axes), key=lambda x: x[0])
    stack = [i for i in range(len(shape)) if i not in (*rows, *columns)]
    return stack, rows, columns


def read_axes(
    paths: Sequence[str],
    leaves: Sequence[Tree],
    matrices: Matrices | None,
    *,
    others: bool = False,
) -> list[Axes | None]:
    """The axes of all leaves of a tree; None for leaves that are no matrix.

    By default, tables and last layers are matrices only if ``others``.
    """
    if matrices is not None:
        return [
            _checked(path, np.shape(leaf), matrices(path, leaf))
            for path, leaf in zip(paths, leaves, strict=True)
        ]
    readings = read_leaves(paths, map(np.shape, leaves))
    return [r.axes if others or r.kind == "matrix" else None for r in readings]


def warn_of_unknown(params: Tree, *, stacklevel: int) -> None:
    """Warns of leaves that the default cannot read."""
    paths, leaves, _ = flatten_named(params, is_leaf=is_quantized)
    if is_part(paths):
        return
    shapes = [np.shape(leaf) for leaf in leaves]
    found: dict[tuple, str] = {}  # one of layers that are alike
    readings = read_leaves(paths, shapes)
    for path, shape, reading in zip(paths, shapes, readings, strict=True):
        if reading.kind == "unknown":
            name = f"{leaf_name('params', path)} of shape {shape}"
            found.setdefault((re.sub(r"\d+", "", path), shape), name)
    warn_of_leaves(list(found.values()), _AMISS, stacklevel=stacklevel + 1)


def check_matrices(matrices: object) -> None:
    """Raises unless ``matrices`` is None or a function."""
    if matrices is not None and not callable(matrices):
        raise TypeError(
            f"matrices must be a function of (path, leaf), got {matrices!r} of type "
            f"{type(matrices).__name__}; it tells how leaves are matrices: use for "
            "example lambda path, leaf: madax.transforms.MatrixDimensionNumbers(0, 1) "
            "if leaf.ndim == 2 else None."
        )


def _checked(path: str, shape: tuple[int, ...], axes: Tree) -> Axes | None:
    """The axes that a user gave, counted from 0, if the leaf has them."""
    if axes is None:
        return None
    name = leaf_name("params", path)
    try:
        fields = axes.reduction_axis, axes.output_axis
    except AttributeError as error:
        raise TypeError(
            f"matrices returned {axes!r} for {name}; it must be None or "
            "madax.transforms.MatrixDimensionNumbers(reduction_axis, output_axis), "
            "which names the axes themselves, not how many there are."
        ) from error
    rank, groups = len(shape), [np.atleast_1d(x).tolist() for x in fields]
    named = [i for group in groups for i in group]
    if (
        not all(groups)
        or not all(type(i) is int and -rank <= i < rank for i in named)
        or len({i % rank for i in named}) < len(named)
    ):
        raise ValueError(
            f"{name} has shape {shape}, but matrices says {axes}; reduction_axis and "
            "output_axis must be different axes of it, one or more each."
        )
    inputs, outputs = (tuple(i % rank for i in group) for group in groups)
    return inputs, outputs
