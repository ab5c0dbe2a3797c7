"""Directions of a whole tree: of its matrices, and of all other leaves."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Literal

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_decay, check_format
from madax._core.leaf_kinds import read_leaves
from madax._core.leaf_names import Axes, Kind
from madax._core.names import Tree, flatten_named
from madax._core.tracing import Shapes, shapes_of
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten_both
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

Part = Literal["matrix", "head", "vector", "other"]
# What has a first moment beside matrices. A step uses few rows of a table, and a first
# moment would move the others as well.
_PART_OF: Mapping[Kind, Part] = {
    "head": "head",
    "router": "head",
    "vector": "vector",
    "filter": "vector",
}


def directions(
    b1: ArrayLike | None,
    b2: ArrayLike,
    direction: MatrixDirection,
    *,
    other_b1: ArrayLike | None = None,
    matrices: Matrices | None,
    moment_format: MomentFormat | None,
    seed: ArrayLike,
) -> "Parts":
    """The directions of :func:`muon`, whose arguments these are.

    Without ``other_b1`` they are the directions of :func:`muon_madam`.
    """
    check_format("moment_format", moment_format, MomentFormat)
    check_matrices(matrices)
    check_direction(direction)
    b1 = check_decay("b1", b1, 0.95, or_none=True)
    other_b1 = check_decay("other_b1", other_b1, 0.9, or_none=True)
    of_matrices = functools.partial(
        _of_matrices, b2=b2, moment_format=moment_format, seed=seed
    )
    # Only a momentum has octaves to choose.
    second = moment_format and dataclasses.replace(moment_format, octaves=None)
    elementwise = functools.partial(second_moment, b2, moment_format=second, seed=seed)
    transforms: dict[Part, Callable[..., optax.GradientTransformationExtraArgs]] = {
        "matrix": functools.partial(of_matrices, b1=b1, direction=direction),
        "other": functools.partial(_of_any, elementwise()),
    }
    if other_b1 is not None:
        transforms |= {
            "head": functools.partial(of_matrices, b1=other_b1, direction="factored"),
            "vector": functools.partial(_of_any, elementwise(b1=other_b1)),
        }
    cached = {part: functools.cache(make) for part, make in transforms.items()}
    return Parts(matrices, cached)


def _of_any(
    direction: Direction, _: tuple[Axes, ...]
) -> optax.GradientTransformationExtraArgs:
    """A direction of each element, whatever the axes."""
    return optax.GradientTransformationExtraArgs(*direction)


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
    """The directions of all parts of a tree, in one.

    Leaves are read from the whole tree, because each part sees only its own.
    """

    matrices: Matrices | None
    transforms: Mapping[Part, Callable[..., optax.GradientTransformationExtraArgs]]

    def init(self, params: Tree) -> Tree:
        if self.matrices is None:
            warn_of_unknown(params, stacklevel=3)
        return self._partition(params).init(params)

    def update(
        self, updates: Tree, state: Tree, params: Tree = None, **extra_args: Tree
    ) -> tuple[Tree, Tree]:
        tree = updates if params is None else params
        if params is not None:
            flatten_both(params, updates)  # refuses trees that differ
        if jax.tree.structure(state) != self._structure(shapes_of(tree)):
            raise ValueError(
                "the optimizer state was made for other params, or with other b1, "
                "other_b1, direction, matrices or moment_format; call init again, or "
                "pass what it was made with."
            )
        return self._partition(tree).update(updates, state, params, **extra_args)

    def are_others(self, params: Tree) -> list[bool]:
        """Which leaves are not matrices."""
        return [part != "matrix" for part, _ in self._read(params)[0]]

    def _read(
        self, tree: Tree
    ) -> tuple[list[tuple[Part, Axes | None]], jax.tree_util.PyTreeDef]:
        """The part that each leaf belongs to, and its axes."""
        paths, leaves, treedef = flatten_named(tree, is_leaf=is_quantized)
        found = read_axes(paths, leaves, self.matrices)
        readings = read_leaves(paths, map(np.shape, leaves))
        parts: list[tuple[Part, Axes | None]] = []
        for axes, reading in zip(found, readings, strict=True):
            part = "matrix" if axes else _PART_OF.get(reading.kind, "other")
            # The axes of a last layer with three or more may be unknown.
            if part not in self.transforms or (part == "head" and not reading.axes):
                part = "other"
            parts.append((part, axes or reading.axes))
        return parts, treedef

    @functools.cached_property
    def _structure(self) -> Callable[[Shapes], jax.tree_util.PyTreeDef]:
        """Returns the structure of the state for parameters of some shapes, cached."""

        @functools.lru_cache(maxsize=16)
        def structure(shapes: Shapes) -> jax.tree_util.PyTreeDef:
            tree = shapes.tree()
            return jax.tree.structure(jax.eval_shape(self._partition(tree).init, tree))

        return structure

    def _partition(self, tree: Tree) -> optax.GradientTransformationExtraArgs:
        parts, treedef = self._read(tree)
        labels = treedef.unflatten([part for part, _ in parts])
        transforms: dict[Hashable, optax.GradientTransformation] = {
            name: make(tuple(axes for part, axes in parts if part == name))
            for name, make in self.transforms.items()
        }
        # A tree of labels may be a module of Equinox, which optax would call.
        return optax.partition(transforms, lambda _: labels)
