"""Shared code of train steps: the update, its bytes, and shapes for compiling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Arrays, or their shapes.
Tree = Any
Step = Callable[..., tuple]
# What makes a state, and what takes a step and returns its loss, too.
Functions = tuple[Callable[[Tree], Tree], Callable[..., tuple[Tree, Tree, jax.Array]]]


def apply(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    grads: optax.Updates,
) -> tuple[optax.Params, optax.OptState]:
    """Returns parameters and state after a step."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def nbytes(tree: Tree) -> int:
    """Returns the bytes of arrays, or of their shapes."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


class ShapedStep(NamedTuple):
    """A step, and the shapes of what it takes: it is compiled, and not run.

    Attributes:
      params: shapes of the parameters.
      state: shapes of the optimizer state.
      data: shapes of gradients or tokens.
      step: maps the three to parameters and state, and perhaps a loss.
    """

    params: Tree
    state: Tree
    data: Tree
    step: Step

    def lower(
        self, sharding: jax.sharding.Sharding | None = None
    ) -> jax.stages.Lowered:
        """Returns the step as it goes to the compiler; JAX caches nothing of it."""
        *args, step = self
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
        # The function is a new one each time, or JAX would know its result.
        return jax.jit(lambda *x: step(*x), donate_argnums=(0, 1)).lower(*shapes)
