"""Dense layers, for the workloads whose model is an MLP."""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import jax
from flax import nnx


class Layers(nnx.Module):
    """Hidden layers that are bent, and a head that is not.

    Attributes:
      hidden: the layers, each followed by what bends it.
      head: the last layer.
    """

    def __init__(
        self,
        widths: Sequence[int],
        rngs: nnx.Rngs,
        *,
        bend: Callable[[jax.Array], jax.Array] = nnx.relu,
    ):
        *hidden, outputs = widths
        pairs = pairwise(hidden)
        linear = [nnx.Linear(before, after, rngs=rngs) for before, after in pairs]
        self.hidden = nnx.Sequential(*chain.from_iterable((x, bend) for x in linear))
        self.head = nnx.Linear(hidden[-1], outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns outputs of shape (batch, outputs) for inputs (batch, inputs)."""
        return self.head(self.hidden(x))
