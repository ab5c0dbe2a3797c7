"""A clip of gradients by a norm, where layers are updated one after the other."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from madax._core.checks import Number, check_choice, check_positive
from madax._core.names import Tree

ClipBy = Literal["last", "exact", "layer"]


def check_clip(max_norm: Number | None, clip_by: object) -> None:
    """Raises unless these are None or a positive number, and a :data:`ClipBy`."""
    if max_norm is not None:
        check_positive("max_norm", max_norm, None)
    why = '"exact" takes a second backward pass, and the others none.'
    check_choice("clip_by", clip_by, get_args(ClipBy), why)


def clipped(grads: Tree, norm: jax.Array, max_norm: Number | None) -> Tree:
    """The gradients, scaled by ``max_norm / norm`` where that is below 1.

    The operations are as in ``optax.clip_by_global_norm``.
    """
    if max_norm is None:
        return grads

    def scaled(g):
        limit = jnp.asarray(max_norm).astype(g.dtype)
        return jnp.where(norm < max_norm, g, g / norm.astype(g.dtype) * limit)

    return jax.tree.map(scaled, grads)


def reference(
    clip_by: ClipBy, own: jax.Array, seen: jax.Array, so_far: jax.Array
) -> jax.Array:
    """The norm by which a part is clipped.

    Args:
      clip_by: what :func:`madax.layerwise` is given.
      own: the norm of the part.
      seen: the global norm of this step if that is exact, or of the last step.
      so_far: the norm of all that this step has found.
    """
    if clip_by == "layer":
        return own
    return seen if clip_by == "exact" else jnp.maximum(seen, so_far)


def total(norms: Sequence[jax.Array]) -> jax.Array:
    """The norm of parts that have these norms, in arrays of any shape."""
    return jnp.sqrt(sum((jnp.sum(norm**2) for norm in norms), jnp.float32(0)))
