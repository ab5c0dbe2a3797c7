"""Images and an autoencoder, scored by how it reconstructs images held out."""

from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.data import Batch, images
from benchmarks.workloads import MSE, Workload, functional


class Autoencoder(nnx.Module):
    """Layers down to a narrow code, and the same up again."""

    def __init__(self, widths: Sequence[int], rngs: nnx.Rngs):
        widths = [*widths, *reversed(widths[:-1])]
        linear = [
            nnx.Linear(before, after, rngs=rngs) for before, after in pairwise(widths)
        ]
        # Neither the code nor the last layer is bent.
        straight = len(linear) // 2, len(linear)
        bent = (
            [x] if i in straight else [x, nnx.relu] for i, x in enumerate(linear, 1)
        )
        self.layers = nnx.Sequential(*chain.from_iterable(bent))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the reconstruction of images."""
        return self.layers(images.reshape(len(images), -1)).reshape(images.shape)


def autoencoder(
    folder: Path | None = None, *, source: str, widths: tuple[int, ...], **options: int
) -> Workload:
    """Returns the workload; errors are in units of the pixels' variance.

    Args:
      folder: where the data is, see ``benchmarks.data.images``.
      source: name of the data set.
      widths: of the layers from the pixels, not counted here, to the code.
      **options: more options of ``benchmarks.data.images``.
    """
    data = images(source, folder, **options)
    pixels = data.train[0][0].size
    init, apply = functional(lambda rngs: Autoencoder((pixels, *widths), rngs))

    def loss(params: optax.Params, batch: Batch) -> jax.Array:
        return jnp.mean((apply(params, batch[0]) - batch[0]) ** 2)

    def metric(params: optax.Params, test: Batch) -> dict[str, jax.Array]:
        errors = jax.lax.map(
            lambda x: jnp.mean((apply(params, x[None])[0] - x) ** 2),
            test[0],
            batch_size=250,
        )
        return {"MSE": errors.mean()}

    settings = {"data": data.name, "held_out": len(data.test[0])}
    return Workload(
        "autoencoder", data.train, data.test, init, loss, metric, MSE, settings=settings
    )
