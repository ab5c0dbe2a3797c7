"""Handwritten digits, 8 by 8 pixels, and a small convolutional network.

The images ship with scikit-learn, so nothing is downloaded.
"""

from functools import partial

import jax.numpy as jnp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.workloads import Batch, Workload
from benchmarks.workloads.images import ConvNet, classification


def digits() -> Workload:
    """Returns the workload: 1347 images to train on, 450 held out."""
    return classification("digits", partial(ConvNet, 8), *split())


def split() -> tuple[Batch, Batch]:
    """Returns data to train on and data held out, split by class.

    Pixels are standardised by those to train on.
    """
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    mean, std = train_x.mean(), train_x.std()

    def batch(x, y) -> Batch:
        pixels = ((x - mean) / std).reshape(-1, 8, 8, 1)
        return jnp.asarray(pixels, jnp.float32), jnp.asarray(y, jnp.int32)

    return batch(train_x, train_y), batch(test_x, test_y)
