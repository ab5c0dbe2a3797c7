"""Shared code of the image workloads: two Flax networks, and classification."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.data import Batch, Images, images
from benchmarks.workloads import Workload, functional


class ConvNet(nnx.Module):
    """Two strided convolutions and a linear layer, Flax's default initialisers."""

    def __init__(self, size: int, rngs: nnx.Rngs, *, width: int = 24):
        options = {"strides": 2, "conv_general_dilated": conv_as_matmul, "rngs": rngs}
        self.conv1 = nnx.Conv(1, width, (3, 3), **options)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), **options)
        self.linear = nnx.Linear((size // 4) ** 2 * 2 * width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits of images of shape (batch, size, size, 1)."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        return self.linear(x.reshape(len(x), -1))


class MLP(nnx.Module):
    """Two hidden layers, Flax's default initialisers.

    Attributes:
      linear: the class of its layers.
    """

    linear: type[nnx.Linear] = nnx.Linear

    def __init__(self, size: int, rngs: nnx.Rngs, *, width: int = 256):
        self.linear1 = self.linear(size**2, width, rngs=rngs)
        self.linear2 = self.linear(width, width, rngs=rngs)
        self.linear3 = self.linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits of images of shape (batch, size, size, 1)."""
        x = nnx.relu(self.linear1(images.reshape(len(images), -1)))
        x = nnx.relu(self.linear2(x))
        return self.linear3(x)


def mlp(
    folder: Path | None = None, *, source: str, width: int, **options: int
) -> Workload:
    """Returns the workload of classifying images with an MLP.

    Args:
      folder: where the data is, see ``benchmarks.data.images``.
      source: name of the data set.
      width: of the two hidden layers.
      **options: more options of ``benchmarks.data.images``.
    """
    data = images(source, folder, **options)
    return classification(
        "mlp", lambda rngs: MLP(data.shape[0], rngs, width=width), data
    )


def classification(
    name: str, make: Callable[[nnx.Rngs], nnx.Module], data: Images
) -> Workload:
    """Returns the workload of classifying images, scored by accuracy.

    Args:
      name: as written in the records.
      make: builds the network, images to logits.
      data: images and integer labels.
    """
    init, apply = functional(make)

    def loss(params: optax.Params, batch: Batch) -> jax.Array:
        pixels, labels = batch
        logits = apply(params, pixels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def metric(params: optax.Params, test: Batch) -> dict[str, jax.Array]:
        def correct(example: Batch) -> jax.Array:
            pixels, label = example
            return apply(params, pixels[None])[0].argmax() == label

        # In parts, for the memory that a vmap over many runs would take.
        return {"accuracy": jax.lax.map(correct, test, batch_size=250).mean()}

    settings = {"data": data.name, "held_out": len(data.test[0])}
    return Workload(name, data.train, data.test, init, loss, metric, settings=settings)


def conv_as_matmul(images, kernel, strides, padding, **_) -> jax.Array:
    """A 2-D convolution by gathering patches: the plain case of lax's.

    Under ``vmap`` over kernels, lax's own convolution becomes a grouped one, which is
    many times slower on CPU than the batched matrix product that this becomes.
    """
    (rows, columns), (down, right) = kernel.shape[:2], strides
    pads = jax.lax.padtype_to_pads(images.shape[1:3], (rows, columns), strides, padding)
    images = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    height, width = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    patches = [
        images[:, i : i + height : down, j : j + width : right]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])
