"""Leaves of parameter trees, and their scalars.

A leaf is one parameter: a floating-point array, or a :class:`QuantizedArray`.
Scalars of float leaves are kept in one vector in flatten order, float32 or the dtype of
the widest leaf, and not in a tree of scalars: wrappers that copy the sharding of
parameters to all trees of the same structure (``flax.nnx.Optimizer``) cannot shard a
scalar.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from madax._core.checks import check_float_leaf, leaf_name
from madax._core.names import Tree, flatten_named
from madax._core.vectors import shape_per_leaf, split_per_leaf
from madax.codes._array import Leaf, is_quantized

_State = TypeVar("_State")


def compute_dtype(leaf: Leaf | ArrayLike) -> jnp.dtype:
    """Returns the dtype of arithmetic on a leaf: float32 or wider."""
    if is_quantized(leaf):
        return jnp.dtype(jnp.float32)
    # promote_types would refuse float8.
    wide = jnp.result_type(leaf) == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(x: ArrayLike) -> jax.Array:
    """Casts to the dtype of the arithmetic."""
    return jnp.asarray(x).astype(compute_dtype(x))


def widened_for_codes(ws: Sequence[Leaf], gs: Sequence[jax.Array]) -> list[jax.Array]:
    """Casts the gradients of codes to the dtype of the arithmetic.

    Codes of any dtype are trained in float32, and the square of a gradient in float16
    may be no float16.
    """
    pairs = zip(ws, gs, strict=True)
    return [widen(g) if is_quantized(w) else g for w, g in pairs]


def max_weight(dtype: DTypeLike) -> float:
    """Returns the float just below the max, so that a rounded ``w + u`` is finite."""
    info = jnp.finfo(dtype)
    _, exponent = math.frexp(info.max)
    return float(info.max) - float(info.eps) * 2.0 ** (exponent - 1)


def zeros_like(leaf: Leaf, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns zeros of a leaf's shape and sharding, by default in its compute dtype."""
    array = leaf.codes if is_quantized(leaf) else leaf
    return jnp.zeros_like(array, compute_dtype(leaf) if dtype is None else dtype)


def flatten(
    params: optax.Params, name: str = "params"
) -> tuple[list[str], list[Tree], jax.tree_util.PyTreeDef]:
    """Returns paths, leaves, treedef; raises unless leaves are floats or codes."""
    paths, leaves, treedef = flatten_named(params, is_leaf=is_quantized)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_quantized(leaf):
            leaf.check_has_codes()
        else:
            check_float_leaf(name, path, leaf)
    return paths, leaves, treedef


def flatten_like(
    updates: optax.Updates,
    treedef: jax.tree_util.PyTreeDef,
    like: str,
    paths: Sequence[str],
    leaves: Sequence[Leaf],
) -> list[jax.Array]:
    """Flattens float ``updates``, which must match the tree called ``like``."""
    try:
        us = treedef.flatten_up_to(updates)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"updates and {like} must have the same tree structure, got updates "
            f"{jax.tree.structure(updates)} and {like} {treedef}; take the "
            "gradients with respect to these params."
        ) from error
    for path, u, leaf in zip(paths, us, leaves, strict=True):
        if isinstance(u, optax.MaskedNode):
            raise ValueError(
                f"{leaf_name('updates', path)} is masked, but {leaf_name(like, path)} "
                "is not; mask by path, or with a tree of booleans or labels: gradients "
                "are arrays even where params are a QuantizedArray."
            )
        check_float_leaf("updates", path, u)
        if np.shape(u) != np.shape(leaf):
            raise ValueError(
                f"{leaf_name('updates', path)} has shape {np.shape(u)}, but "
                f"{leaf_name(like, path)} has shape {np.shape(leaf)}; take the "
                "gradients with respect to these params."
            )
    return us


def flatten_both(
    params: optax.Params | None, updates: optax.Updates
) -> tuple[list[str], list[Tree], list[jax.Array], jax.tree_util.PyTreeDef]:
    """Returns paths and leaves of ``params``, leaves of ``updates``, treedef."""
    if params is None:
        raise ValueError(
            "params is None, but the update depends on the weights; call "
            "update(grads, state, params)."
        )
    paths, ws, treedef = flatten(params)
    return paths, ws, flatten_like(updates, treedef, "params", paths, ws), treedef


def nodes_of(state: optax.OptState, kinds: type[_State] | tuple) -> list[_State]:
    """Returns the states of given types within the state of an optimizer."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


def places_of_floats(vector: jax.Array, leaves: Sequence[Leaf]) -> list[int]:
    """Returns positions of float leaves; raises unless ``vector`` has that size."""
    floats = [i for i, leaf in enumerate(leaves) if not is_quantized(leaf)]
    if vector.shape != shape_per_leaf(len(floats)):
        raise ValueError(
            f"the optimizer state was made for {sum(vector.shape)} float leaves, but "
            f"params has {len(floats)}; call init again with these params."
        )
    return floats


def per_leaf(vector: jax.Array, leaves: Sequence[Leaf]) -> list[Tree]:
    """A scalar per leaf, from a vector over float leaves; None for quantised ones."""
    floats = places_of_floats(vector, leaves)
    scalars: list[Tree] = [None] * len(leaves)
    for i, scalar in zip(floats, split_per_leaf(vector, len(floats)), strict=True):
        scalars[i] = scalar
    return scalars
