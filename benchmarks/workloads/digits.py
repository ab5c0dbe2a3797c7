"""Handwritten digits, 8 by 8 pixels, and a small convolutional network.

The images ship with scikit-learn, so nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.workloads import Batch, Workload


def digits() -> Workload:
    """Returns the workload: 1347 images to train on, 450 held out."""
    train, test = _split()
    graph = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(nnx.Rngs(0))))

    @jax.jit
    def init(key: jax.Array) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(ConvNet(nnx.Rngs(key)), nnx.Param))

    def loss(params: optax.Params, batch: Batch) -> jax.Array:
        images, labels = batch
        logits = nnx.merge(graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def accuracy(params: optax.Params) -> jax.Array:
        images, labels = test
        return jnp.mean(nnx.merge(graph, params)(images).argmax(-1) == labels)

    return Workload("digits", train, init, loss, accuracy)


class ConvNet(nnx.Module):
    """Two strided convolutions and a linear layer, Flax's default initialisers."""

    def __init__(self, rngs: nnx.Rngs):
        options = {"strides": 2, "conv_general_dilated": conv_as_matmul, "rngs": rngs}
        self.conv1 = nnx.Conv(1, 24, (3, 3), **options)
        self.conv2 = nnx.Conv(24, 48, (3, 3), **options)
        self.linear = nnx.Linear(2 * 2 * 48, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits of images of shape (batch, 8, 8, 1)."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        return self.linear(x.reshape(len(x), -1))


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


def _split() -> tuple[Batch, Batch]:
    """Splits the images by class, and standardises by the training pixels."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    mean, std = train_x.mean(), train_x.std()

    def batch(x, y) -> Batch:
        pixels = ((x - mean) / std).reshape(-1, 8, 8, 1)
        return jnp.asarray(pixels, jnp.float32), jnp.asarray(y, jnp.int32)

    return batch(train_x, train_y), batch(test_x, test_y)
