"""Leaves that have derivatives: floating or complex arrays."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from madax._core.names import Tree
from madax._core.shards import over_shards
from madax.codes._scales import root_mean_square


def is_inexact(x: jax.typing.ArrayLike) -> bool:
    """Returns whether an array or a number has a floating or complex dtype."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def norm(tree: Tree) -> jax.Array:
    """Returns the root of the sum of squares of a tree, with equal bits on any mesh."""
    return total([over_shards(_root_of_sum, _norm(x)) for x in jax.tree.leaves(tree)])


def total(norms: Sequence[jax.Array]) -> jax.Array:
    """Returns the norm of a whole, given the norms of its parts in any arrays."""
    return _norm(jnp.concatenate([jnp.ravel(x) for x in norms] or [jnp.zeros(1)]))


def _norm(x: jax.Array) -> jax.Array:
    """Returns the norm of an array; it is infinite for infinities, as in optax."""
    x = jnp.float32(jnp.abs(x))
    most = jnp.max(x, initial=0)
    return jnp.where(jnp.isfinite(most), root_mean_square(x) * math.sqrt(x.size), most)


def _root_of_sum(norm: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the norm of a whole, given the norms of its shards."""
    return jnp.sqrt(jax.lax.psum(norm**2, axes))


def floats_of(
    tree: Tree, only: Sequence[bool] | None = None
) -> tuple[list[jax.Array], Callable[..., Tree]]:
    """Returns the leaves that have a derivative, and a function that replaces them.

    That function can also apply another one to all other leaves, such as integers.
    ``only`` selects among the leaves.
    """
    leaves, treedef = jax.tree.flatten(tree)
    wanted = [True] * len(leaves) if only is None else only
    pairs = zip(leaves, wanted, strict=True)
    where = [i for i, (leaf, this) in enumerate(pairs) if this and is_inexact(leaf)]

    def merge(floats: Sequence[jax.Array], rest: Callable = lambda x: x) -> Tree:
        new = dict(zip(where, floats, strict=True))
        out = [new[i] if i in new else rest(old) for i, old in enumerate(leaves)]
        return treedef.unflatten(out)

    return [leaves[i] for i in where], merge
