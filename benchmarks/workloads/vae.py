"""Images and a variational autoencoder (Kingma and Welling, arXiv:1312.6114)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.data import Batch, images
from benchmarks.workloads import Measure, Workload, functional
from benchmarks.workloads.layers import Layers

# Without the constant of the normalisation, so that it is 0 at best.
ELBO = Measure("nats/image", "lower", lambda nats: nats)
VARIANCE = 0.25  # Of pixels, given the code, in units of all pixels' variance.


class VAE(nnx.Module):
    """Two MLPs: to means and log-variances of a code, and from a code to pixels."""

    def __init__(self, widths: tuple[int, ...], code: int, rngs: nnx.Rngs):
        self.encoder = Layers((*widths, 2 * code), rngs)
        self.decoder = Layers((code, *reversed(widths)), rngs)

    def __call__(self, pixels: jax.Array, noises: jax.Array) -> jax.Array:
        """Returns the negative evidence lower bound of each image, in nats."""
        mean, log_variance = jnp.split(self.encoder(pixels), 2, axis=-1)
        decoded = self.decoder(mean + jnp.exp(log_variance / 2) * noises)
        return negative_elbo(pixels, decoded, mean, log_variance)


def negative_elbo(
    pixels: jax.Array, decoded: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
    """Returns the negative evidence lower bound from one draw of the code, in nats.

    A Gaussian around the decoded pixels, less its constant, and the Kullback-Leibler
    divergence of the code's Gaussian from a standard one.

    Args:
      pixels: of shape (batch, pixels).
      decoded: the same, from the code drawn.
      mean: of the codes, of shape (batch, code).
      log_variance: of the codes.
    """
    apart = jnp.sum((pixels - decoded) ** 2, -1) / (2 * VARIANCE)
    divergence = jnp.exp(log_variance) + mean**2 - 1 - log_variance
    return apart + divergence.sum(-1) / 2


def vae(
    folder: Path | None = None,
    *,
    source: str,
    widths: tuple[int, ...],
    code: int,
    **options: int,
) -> Workload:
    """Returns the workload; the noises of held-out images are the same in all runs.

    Args:
      folder: where the data is, see ``benchmarks.data.images``.
      source: name of the data set.
      widths: of the layers from the pixels, not counted here, to the code.
      code: numbers in a code.
      **options: more options of ``benchmarks.data.images``.
    """
    data = images(source, folder, **options)
    pixels = data.train[0][0].size
    init, apply = functional(lambda rngs: VAE((pixels, *widths), code, rngs))

    def drawn(images: jax.Array, key: jax.Array) -> Batch:
        noises = jax.random.normal(key, (len(images), code))
        return images.reshape(len(images), -1), noises

    def metric(params: optax.Params, test: Batch) -> dict[str, jax.Array]:
        # In parts, for the memory that a vmap over many runs would take.
        nats = jax.lax.map(
            lambda x: apply(params, x[0][None], x[1][None])[0], test, batch_size=250
        )
        return {ELBO.name: nats.mean()}

    return Workload(
        "vae",
        data.train,
        drawn(data.test[0], jax.random.key(0)),
        init,
        lambda params, batch: apply(params, *batch).mean(),
        metric,
        ELBO,
        lambda train, indices, key: drawn(train[0][indices], key),
        settings={"data": data.name, "held_out": len(data.test[0])},
    )
