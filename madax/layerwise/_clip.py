"""Clipping of gradients by a norm, where layers are updated one after another."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from madax._core.checks import Number, check_choice, check_positive
from madax._core.names import Tree

ClipBy = Literal["last", "exact", "layer"]


class Clip(NamedTuple):
    """The clip of gradients, if there is one."""

    max_norm: Number | None
    by: ClipBy

    @property
    def has_memory(self) -> bool:
        """Whether the norm of a step is kept for the next one."""
        return self.max_norm is not None and self.by == "last"

    @property
    def is_exact(self) -> bool:
        """Whether the norm of all gradients is needed before the first update."""
        return self.max_norm is not None and self.by == "exact"

    def __call__(
        self, grads: Tree, own: jax.Array, seen: jax.Array, so_far: jax.Array
    ) -> Tree:
        """Scales the gradients of a part by ``max_norm / norm`` if that is below 1.

        The operations are as in ``optax.clip_by_global_norm``.

        Args:
          grads: of the part.
          own: the norm of the part.
          seen: the global norm: of this step for ``"exact"``, else of the last step.
          so_far: the norm of the gradients that this step has computed so far.
        """
        if self.max_norm is None:
            return grads
        most = self.max_norm
        norms = {"layer": own, "exact": seen, "last": jnp.maximum(seen, so_far)}
        norm = norms[self.by]

        def scaled(g):
            limit = jnp.asarray(most).astype(g.dtype)
            return jnp.where(norm < most, g, g / norm.astype(g.dtype) * limit)

        return jax.tree.map(scaled, grads)


def checked_clip(max_norm: Number | None, clip_by: ClipBy) -> Clip:
    """Returns the clip of these arguments, after a check."""
    if max_norm is not None:
        check_positive("max_norm", max_norm, None)
    why = '"exact" takes a second backward pass, and the others none.'
    check_choice("clip_by", clip_by, get_args(ClipBy), why)
    return Clip(max_norm, clip_by)
