"""Images and a denoising diffusion model: an MLP that tells the noise from the image.

The continuous form of denoising diffusion (Ho et al., arXiv:2006.11239) on the cosine
schedule (Nichol and Dhariwal, arXiv:2102.09672): at time t in [0, 1] an image x and
unit noise e are mixed to cos(πt/2) x + sin(πt/2) e.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.data import Batch, images
from benchmarks.workloads import MSE, Workload, functional
from benchmarks.workloads.layers import Layers

# Of the embedding of times, in radians over the whole time.
FREQUENCIES = np.geomspace(1, 100, 8, dtype=np.float32)

Noised = tuple[jax.Array, jax.Array, jax.Array]  # Mixtures, times and noises.


class Denoiser(nnx.Module):
    """An MLP of mixtures beside sines and cosines of their times."""

    def __init__(self, pixels: int, widths: tuple[int, ...], rngs: nnx.Rngs):
        inputs = pixels + 2 * len(FREQUENCIES)
        self.layers = Layers((inputs, *widths, pixels), rngs, bend=nnx.silu)

    def __call__(self, mixed: jax.Array, times: jax.Array) -> jax.Array:
        """Returns the noise in mixtures of shape (batch, pixels)."""
        angles = times[:, None] * FREQUENCIES
        return self.layers(
            jnp.concatenate([mixed, jnp.sin(angles), jnp.cos(angles)], -1)
        )


def mix(images: jax.Array, key: jax.Array) -> Noised:
    """Draws a time and a noise for each image, and mixes them.

    Args:
      images: of shape (batch, ...).
      key: random key.

    Returns:
      Mixtures of shape (batch, pixels), times of shape (batch,) and noises.
    """
    flat = images.reshape(len(images), -1)
    of_times, of_noises = jax.random.split(key)
    times = jax.random.uniform(of_times, (len(flat),))
    noises = jax.random.normal(of_noises, flat.shape)
    angles = jnp.pi / 2 * times[:, None]
    return jnp.cos(angles) * flat + jnp.sin(angles) * noises, times, noises


def diffusion(
    folder: Path | None = None, *, source: str, widths: tuple[int, ...], **options: int
) -> Workload:
    """Returns the workload: the error of the noise, in units of its variance.

    Held-out images have their times and noises once and for all.

    Args:
      folder: where the data is, see ``benchmarks.data.images``.
      source: name of the data set.
      widths: of the hidden layers; below the number of pixels, they lose noise.
      **options: more options of ``benchmarks.data.images``.
    """
    data = images(source, folder, **options)
    pixels = data.train[0][0].size
    init, apply = functional(lambda rngs: Denoiser(pixels, widths, rngs))

    def batch(train: Batch, indices: jax.Array, key: jax.Array) -> Noised:
        return mix(train[0][indices], key)

    def loss(params: optax.Params, batch: Noised) -> jax.Array:
        mixed, times, noises = batch
        return jnp.mean((apply(params, mixed, times) - noises) ** 2)

    def metric(params: optax.Params, test: Noised) -> dict[str, jax.Array]:
        # In parts, for the memory that a vmap over many runs would take.
        errors = jax.lax.map(
            lambda one: loss(params, jax.tree.map(lambda x: x[None], one)),
            test,
            batch_size=250,
        )
        return {"MSE": errors.mean()}

    return Workload(
        "diffusion",
        data.train,
        mix(data.test[0], jax.random.key(0)),
        init,
        loss,
        metric,
        MSE,
        batch,
        settings={"data": data.name, "held_out": len(data.test[0])},
    )
