"""Text and a recurrent network that predicts the next token."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.data.text import text
from benchmarks.workloads import Workload, functional
from benchmarks.workloads.language import language, next_token_loss


class GRU(nnx.Module):
    """A layer of gated recurrent units.

    Attributes:
      width: number of units.
    """

    def __init__(self, vocabulary: int, rngs: nnx.Rngs, *, width: int):
        self.width = width
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.input = nnx.Linear(width, 3 * width, rngs=rngs)
        self.recurrent = nnx.Linear(
            width,
            3 * width,
            kernel_init=nnx.initializers.orthogonal(),
            rngs=rngs,
        )
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits of shape (batch, tokens, vocabulary)."""
        inputs = self.input(self.embed(tokens)).swapaxes(0, 1)

        def step(state, x):
            xr, xz, xn = jnp.split(x, 3, axis=-1)
            hr, hz, hn = jnp.split(self.recurrent(state), 3, axis=-1)
            keep = nnx.sigmoid(xz + hz)
            new = jnp.tanh(xn + nnx.sigmoid(xr + hr) * hn)
            state = keep * state + (1 - keep) * new
            return state, state

        start = jnp.zeros((len(tokens), self.width))
        _, states = jax.lax.scan(step, start, inputs)
        return self.head(states.swapaxes(0, 1))


def gru(
    folder: Path | None = None,
    *,
    source: str = "pydoc",
    context: int,
    width: int,
    held_out: int,
) -> Workload:
    """Returns the workload.

    Args:
      folder: where the text is, see ``benchmarks.data.text``.
      source: name of the text.
      context: tokens that the network sees.
      width: number of units.
      held_out: windows of the held-out text to score on.
    """
    data = text(source, folder)
    init, apply = functional(lambda rngs: GRU(data.vocabulary, rngs, width=width))
    return language(
        "gru",
        init,
        partial(next_token_loss, apply),
        data,
        context=context,
        held_out=held_out,
    )
