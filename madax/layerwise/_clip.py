"""Clipping of gradients by a norm, where layers are updated one after another."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from madax._core.checks import Number, check_choice, check_positive
from madax._core.names import Tree
from madax._core.numerics import plus_product, rounded
from madax.codes._leaves import widen
from madax.layerwise._floats import total

DECAY = 0.9  # of the mean over steps, which starts as zeros: only quotients count
ClipBy = Literal["last", "exact", "layer"]


class Clip(NamedTuple):
    """The clip of gradients, if there is one."""

    max_norm: Number | None
    by: ClipBy

    @property
    def has_memory(self) -> bool:
        """Whether fractions of the norm are kept from step to step."""
        return self.max_norm is not None and self.by == "last"

    @property
    def is_exact(self) -> bool:
        """Whether the norm of all gradients is needed before the first update."""
        return self.max_norm is not None and self.by == "exact"

    def __call__(
        self, grads: Tree, own: jax.Array, seen: jax.Array, so_far: jax.Array
    ) -> Tree:
        """Scales the gradients of a part by ``max_norm / norm`` if that is below 1.

        The operations are as in ``optax.clip_by_global_norm``, but in float32 where
        gradients are narrower, whose range a norm exceeds.

        Args:
          grads: of the part.
          own: the norm of the part.
          seen: the global norm of this step for ``"exact"``; for ``"last"`` how many
            times ``so_far`` it was in the last steps.
          so_far: the norm of the gradients that this step has computed so far.
        """
        if self.max_norm is None:
            return grads
        most = self.max_norm
        norms = {"layer": own, "exact": seen, "last": so_far * seen}
        norm = norms[self.by]

        def scaled(g):
            wide = widen(g)
            limit = jnp.asarray(most).astype(wide.dtype)
            clipped = wide / norm.astype(wide.dtype) * limit
            return jnp.where(norm < most, g, clipped.astype(g.dtype))

        return jax.tree.map(scaled, grads)


def averaged(whole: jax.Array, norm: jax.Array, fraction: jax.Array) -> jax.Array:
    """The moving root mean square of the fraction that a norm is of the whole.

    Where the whole is not finite the step tells nothing, and would stop the next ones.
    """
    now = norm / whole
    new = jnp.sqrt(plus_product(rounded(DECAY * fraction**2), (1 - DECAY) * now, now))
    return jnp.where((whole > 0) & jnp.isfinite(whole), new, fraction)


def times_so_far(ends: jax.Array, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """How many times the norm of a layer and of all above it the global norm is.

    From norms, or numbers in proportion, of the ends and of the layers of each stack,
    the last stack first; so is what is returned.
    """
    whole, times = total([ends, *stacks]), []
    for i, norms in enumerate(stacks):
        each = jnp.arange(len(norms))
        known = jnp.where(each >= each[:, None], norms, 0)
        so_far = jax.vmap(lambda known, i=i: total([known, *stacks[:i]]))(known)
        times.append(jnp.where(so_far > 0, whole / so_far, 1))
    return times


def checked_clip(max_norm: Number | None, clip_by: ClipBy) -> Clip:
    """Returns the clip of these arguments, after a check."""
    if max_norm is not None:
        max_norm = check_positive("max_norm", max_norm, None)
    why = '"exact" takes a second backward pass, and the others none.'
    check_choice("clip_by", clip_by, get_args(ClipBy), why)
    return Clip(max_norm, clip_by)
