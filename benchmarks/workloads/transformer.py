"""Text and a Transformer that predicts the next token."""

from functools import partial
from pathlib import Path

import jax
from flax import nnx

from benchmarks.data.text import text
from benchmarks.workloads import Workload, functional
from benchmarks.workloads.attention import Block
from benchmarks.workloads.language import language, next_token_loss


class Transformer(nnx.Module):
    """A decoder: tokens and places embedded, causal blocks, logits of the next."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        rngs: nnx.Rngs,
        *,
        width: int,
        layers: int,
        heads: int,
        layer_scale: float | None,
    ):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        places = jax.random.normal(rngs.params(), (context, width))
        self.places_embed = nnx.Param(0.02 * places)
        self.blocks = nnx.Sequential(
            *(
                Block(width, rngs, heads=heads, causal=True, layer_scale=layer_scale)
                for _ in range(layers)
            )
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits of shape (batch, tokens, vocabulary)."""
        x = self.blocks(self.embed(tokens) + self.places_embed[...])
        return self.head(self.norm(x))


def transformer(
    folder: Path | None = None,
    *,
    source: str = "pydoc",
    context: int,
    width: int,
    layers: int,
    heads: int,
    held_out: int,
    layer_scale: float | None = None,
    name: str = "transformer",
) -> Workload:
    """Returns the workload.

    Args:
      folder: where the text is, see ``benchmarks.data.text``.
      source: name of the text.
      context: tokens that the network sees.
      width: of a token.
      layers: number of blocks.
      heads: of the attention.
      held_out: windows of the held-out text to score on.
      layer_scale: gains of the branches of blocks at init; None for no gains.
      name: as written in the records.
    """
    data = text(source, folder)

    def make(rngs: nnx.Rngs) -> Transformer:
        return Transformer(
            data.vocabulary,
            context,
            rngs,
            width=width,
            layers=layers,
            heads=heads,
            layer_scale=layer_scale,
        )

    init, apply = functional(make)
    loss = partial(next_token_loss, apply)
    return language(name, init, loss, data, context=context, held_out=held_out)
