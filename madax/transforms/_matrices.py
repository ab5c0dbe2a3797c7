"""Finds which leaves are matrices, and in which axes."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from madax._core.checks import leaf_name, type_error, warn_of_leaves
from madax._core.leaf_kinds import read_leaves
from madax._core.leaf_names import Axes
from madax._core.names import Tree, flatten_named, is_part
from madax._core.shards import in_auto_axes
from madax.codes._array import is_quantized

_AMISS = (
    "it is not clear which axes are rows and columns, so these leaves take the "
    "direction of Madam; pass matrices(path, leaf), which returns a "
    "madax.transforms.MatrixDimensionNumbers of the axes, or None."
)


class MatrixDimensionNumbers(NamedTuple):
    """The axes of a leaf that are rows and columns of a matrix; others count matrices.

    ``optax.contrib.MuonDimensionNumbers`` has the same fields, and works in its place.

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
    """Returns the axes of all leaves of a tree; None for leaves that are not matrices.

    By default, tables and last layers are matrices only if ``others``.
    """
    if matrices is not None:
        return [
            _checked(path, np.shape(leaf), matrices(path, leaf))
            for path, leaf in zip(paths, leaves, strict=True)
        ]
    readings = read_leaves(paths, map(np.shape, leaves))
    return [r.axes if others or r.kind == "matrix" else None for r in readings]


def all_axes(matrices: Matrices | None) -> Callable[..., Sequence[Tree]]:
    """The function that finds the axes of leaves, all of which must be matrices."""
    check_matrices(matrices)

    def axes_of(paths, leaves):
        axes = read_axes(paths, leaves, matrices, others=True)
        if None in axes:
            i = axes.index(None)
            raise ValueError(
                f"{leaf_name('params', paths[i])} of shape {np.shape(leaves[i])} is "
                "not a matrix; use muon, leave it out with optax.partition, or "
                "pass matrices(path, leaf) that returns its axes."
            )
        return axes

    return axes_of


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
        remedy = (
            "it tells how leaves are matrices: use for example lambda path, leaf: "
            "madax.transforms.MatrixDimensionNumbers(0, 1) if leaf.ndim == 2 else None"
        )
        raise type_error("matrices", "a function of (path, leaf)", matrices, remedy)


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


def as_matrices(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, axes: Axes
) -> jax.Array:
    """Applies a function of (stacks of) matrices to a leaf."""
    # Explicit types tell no layout for the product of a matrix with itself.
    return in_auto_axes(lambda x: _as_matrices(fn, x, axes), x)


def _as_matrices(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, axes: Axes
) -> jax.Array:
    stack, rows, columns = in_order(x.shape, axes)
    order = (*stack, *rows, *columns)
    # An axis of size 1 is in order anywhere.
    long = [i for i in order if x.shape[i] > 1]
    moves = long != sorted(long)
    moved = x.transpose(order) if moves else x
    sizes = (math.prod(x.shape[i] for i in axes) for axes in (rows, columns))
    out = fn(moved.reshape(*(x.shape[i] for i in stack), *sizes)).reshape(moved.shape)
    return out.transpose(np.argsort(order)) if moves else out
