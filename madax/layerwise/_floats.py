"""Leaves that have derivatives: floating or complex arrays."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from madax._core.names import Tree
from madax._core.shards import over_shards


def is_inexact(x: jax.typing.ArrayLike) -> bool:
    """Returns whether an array or a number has a floating or complex dtype."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def norm(tree: Tree) -> jax.Array:
    """Returns the square root of the sum of squares of a tree, float32."""
    squares = [jnp.sum(jnp.float32(jnp.abs(x)) ** 2) for x in jax.tree.leaves(tree)]
    squares = [over_shards(jax.lax.psum, x) for x in squares]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


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
