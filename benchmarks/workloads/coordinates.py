"""A photograph, and a deep MLP from coordinates to colours, by Fourier features."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.data import Batch
from benchmarks.data.photo import photo
from benchmarks.workloads import PSNR, Workload, functional

FREQUENCIES = 64  # And their spread, in half periods over the picture.
SPREAD = 2.0


class CoordinateMLP(nnx.Module):
    """A deep MLP, its hidden layers stacked in one leaf so that it compiles fast."""

    def __init__(self, inputs: int, rngs: nnx.Rngs, *, depth: int, width: int):
        he = nnx.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.first = nnx.Linear(
            inputs, width, kernel_init=nnx.initializers.he_normal(), rngs=rngs
        )
        self.kernels = nnx.Param(he(rngs.params(), (depth - 2, width, width)))
        self.biases = nnx.Param(jnp.zeros((depth - 2, width)))
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns colours of shape (places, 3)."""

        def layer(x, weights):
            kernel, bias = weights
            return nnx.relu(x @ kernel + bias), None

        x = nnx.relu(self.first(features))
        x, _ = jax.lax.scan(layer, x, (self.kernels[...], self.biases[...]))
        return self.head(x)


def fourier_features(places: np.ndarray) -> np.ndarray:
    """Returns sines and cosines of random projections of coordinates."""
    rng = np.random.default_rng(0)
    angles = np.pi * places @ rng.normal(0, SPREAD, (2, FREQUENCIES))
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def coordinates(
    folder: Path | None = None,
    *,
    depth: int,
    width: int,
    size: int,
    shrink: int = 1,
    picture: str = "china.jpg",
    name: str = "coordinates",
) -> Workload:
    """Returns the workload: every second pixel to train on, the others held out.

    Args:
      folder: not used; the photographs ship with scikit-learn.
      depth: layers, 3 at least.
      width: of a hidden layer.
      size: pixels on a side of the picture.
      shrink: factor by which the photograph is made smaller first.
      picture: "china.jpg" or "flower.jpg".
      name: as written in the records.
    """
    del folder
    places, colours = photo(picture, size, shrink=shrink)
    features = fourier_features(places)
    black = np.indices((size, size)).sum(0) % 2 == 0  # As on a chessboard.

    def split(mask: np.ndarray) -> Batch:
        return jnp.asarray(features[mask], jnp.float32), jnp.asarray(
            colours[mask], jnp.float32
        )

    train, test = split(black), split(~black)
    init, apply = functional(
        lambda rngs: CoordinateMLP(2 * FREQUENCIES, rngs, depth=depth, width=width)
    )

    def loss(params: optax.Params, batch: Batch) -> jax.Array:
        features, colours = batch
        return jnp.mean((apply(params, features) - colours) ** 2)

    def decibels(params: optax.Params, batch: Batch) -> jax.Array:
        return -10 * jnp.log10(loss(params, batch))

    def metric(params, test: tuple[Batch, Batch]) -> dict[str, jax.Array]:
        held_out, trained = test
        return {
            "PSNR": decibels(params, held_out),
            "PSNR, trained pixels": decibels(params, trained),
        }

    return Workload(
        name,
        train,
        (test, train),
        init,
        loss,
        metric,
        PSNR,
        batch=lambda train, indices, key: train,
        examples=1,
        settings={"data": f"{picture} {size}x{size}", "depth": depth},
    )
