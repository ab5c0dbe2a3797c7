"""Directions of a whole tree: of its matrices, and of all leaves that are none."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_decay
from madax._core.leaf_kinds import Axes
from madax._core.names import Tree, flatten_named
from madax.codes._array import is_quantized
from madax.formats._moment_codec import MomentCodec
from madax.formats._moment_format import MomentFormat
from madax.transforms._factored import factored_second_moment
from madax.transforms._matrices import (
    Matrices,
    check_matrices,
    read_axes,
    warn_of_unknown,
)
from madax.transforms._matrix_direction import (
    MatrixDirection,
    check_direction,
    matrix_direction,
)
from madax.transforms._second_moment import Direction, second_moment
from madax.wrappers._quantized_state import quantized_state


def matrices_and_others(
    b1: ArrayLike | None,
    b2: ArrayLike,
    direction: MatrixDirection,
    *,
    matrices: Matrices | None,
    moment_format: MomentFormat | None,
    seed: ArrayLike,
) -> "Parts":
    """The directions of :func:`muon_madam`, whose arguments these are."""
    check_matrices(matrices)
    check_direction(direction)
    b1 = check_decay("b1", b1, 0.95, or_none=True)
    # Only a momentum has octaves to choose.
    second = moment_format and dataclasses.replace(moment_format, octaves=None)
    other = second_moment(b2, moment_format=second, seed=seed)
    of_matrices = functools.partial(
        _of_matrices,
        b1=b1,
        b2=b2,
        direction=direction,
        moment_format=moment_format,
        seed=seed,
    )
    return Parts(matrices, functools.cache(of_matrices), other)


def _of_matrices(
    axes: tuple[Axes, ...],
    *,
    b1: ArrayLike | None,
    b2: ArrayLike,
    direction: MatrixDirection,
    moment_format: MomentFormat | None,
    seed: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The direction of matrices, given the axes of all."""

    def axes_of(paths, leaves):
        return axes

    def everything(_, leaves):
        return range(len(leaves.paths))

    tx = matrix_direction(b1, axes_of, direction)
    if moment_format is not None and b1 is not None:
        # Small elements of a momentum hardly affect the direction of the whole matrix,
        # so 8 octaves are enough.
        codec = MomentCodec(moment_format.bits, moment_format.octaves or 8)
        tx = quantized_state(tx, codec, everything, seed=seed, known_as="m")
    if direction == "factored" or (direction == "orthogonal" and b1 is None):
        factored = factored_second_moment(b2, axes_of)
        tx = optax.chain(optax.GradientTransformationExtraArgs(*factored), tx)
    return tx


@dataclasses.dataclass(frozen=True)
class Parts:
    """The directions of matrices and of all other leaves, in one.

    Axes are read from the whole tree, because each part sees only its own leaves.
    """

    matrices: Matrices | None
    of_matrices: Callable[[tuple[Axes, ...]], optax.GradientTransformationExtraArgs]
    other: Direction

    def init(self, params: Tree) -> Tree:
        if self.matrices is None:
            warn_of_unknown(params, stacklevel=3)
        return self._partition(params).init(params)

    def update(
        self, updates: Tree, state: Tree, params: Tree = None, **extra_args: Tree
    ) -> tuple[Tree, Tree]:
        tx = self._partition(updates if params is None else params)
        return tx.update(updates, state, params, **extra_args)

    def are_others(self, params: Tree) -> list[bool]:
        """Which leaves are no matrices, and take the direction of Madam."""
        return [axes is None for axes in self._read(params)[0]]

    def _read(self, tree: Tree) -> tuple[list[Axes | None], jax.tree_util.PyTreeDef]:
        paths, leaves, treedef = flatten_named(tree, is_leaf=is_quantized)
        return read_axes(paths, leaves, self.matrices), treedef

    def _partition(self, tree: Tree) -> optax.GradientTransformationExtraArgs:
        axes, treedef = self._read(tree)
        labels = ["other" if found is None else "matrix" for found in axes]
        matrix = self.of_matrices(tuple(found for found in axes if found is not None))
        other = optax.GradientTransformationExtraArgs(*self.other)
        # A tree of labels may be a module of Equinox, which optax would call.
        return optax.partition(
            {"matrix": matrix, "other": other}, lambda _: treedef.unflatten(labels)
        )
