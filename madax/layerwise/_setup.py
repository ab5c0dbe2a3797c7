"""Decoding, updates and means over microbatches in :func:`madax.layerwise`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from madax._core.names import Tree
from madax._core.shards import axes_returned, spread
from madax.codes._quantize import dequantize_params
from madax.layerwise._checks import check_updates
from madax.layerwise._clip import Clip
from madax.layerwise._plan import Index
from madax.layerwise._stacks import Optimizer, read


@dataclasses.dataclass(frozen=True)
class Setup:
    """The arguments of :func:`madax.layerwise` that all stacks share."""

    tx: Optimizer
    dtype: jax.typing.DTypeLike | None
    microbatches: int
    has_aux: bool
    gather: Callable[[Tree], Tree]
    clip: Clip

    @property
    def has_norms(self) -> bool:
        """Whether norms of the layers' gradients are needed."""
        return self.has_aux or self.clip.max_norm is not None

    def decode(self, stored: Tree) -> Tree:
        """Decodes stored parameters for the user's functions."""
        return dequantize_params(self.gather(stored), self.dtype)

    def update(self, params: Tree, grads: Tree, state: Tree, **extra: Index) -> Tree:
        """Updates a part of the parameters and its state by a step of the optimizer.

        ``params`` has one entry, so that paths start as in the whole tree.
        """
        ((name, _),) = params.items()
        updates, state = self.tx.update({name: grads}, state, params, **extra)
        check_updates(params, updates)
        new: Tree = optax.apply_updates(params, updates)
        return new[name], state

    def part(self, xs: Tree) -> Tree:
        """Returns the first microbatch, for its shapes and types."""
        return xs if self.microbatches == 1 else read(xs, 0)

    def over_parts(self, fn: Callable[[Index, Tree], Tree], xs: Tree) -> Tree:
        """Returns ``fn(part, x)`` of every microbatch."""
        if self.microbatches == 1:
            return fn(0, xs)
        parts = jnp.arange(self.microbatches)
        return jax.lax.map(lambda now: fn(*now), (parts, xs))

    def mean_over_parts(self, fn: Callable[..., Tree], xs: Tree) -> tuple[Tree, Tree]:
        """Like :meth:`over_parts`, but takes the mean of the first result of ``fn``."""
        if self.microbatches == 1:
            return fn(0, xs)

        def add(total, now):
            x, out = fn(*now)
            return jax.tree.map(lambda t, x: t + jnp.asarray(x, t.dtype), total, x), out

        def zeros(x, axes):
            return spread(jnp.zeros(x.shape, summed_in(x)), axes)

        first, axes = axes_returned(lambda *now: fn(*now)[0], 0, read(xs, 0))
        parts = jnp.arange(self.microbatches)
        total, out = jax.lax.scan(add, jax.tree.map(zeros, first, axes), (parts, xs))
        return jax.tree.map(lambda x: x / self.microbatches, total), out


def summed_in(x: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> jax.typing.DTypeLike:
    """Returns the dtype in which gradients like ``x`` are summed: float32 or wider."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)
