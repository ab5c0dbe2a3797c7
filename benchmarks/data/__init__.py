"""Data sets, as arrays: embedded in packages, in local files, or from Hugging Face."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.data import cifar, idx

Batch = tuple[jax.Array, jax.Array]
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images and their labels, standardised by the pixels to train on.

    Attributes:
      train: images of shape (examples, size, size, channels), and integer labels.
      test: the same, held out.
      name: the data set, with the size of the images.
      classes: number of labels.
    """

    train: Batch
    test: Batch
    name: str
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image: (size, size, channels)."""
        return self.train[0].shape[1:]


def images(
    source: str,
    folder: Path | None = None,
    *,
    shrink: int = 1,
    held_out: int | None = None,
) -> Images:
    """Returns a data set of images.

    Args:
      source: "digits", which ships with scikit-learn, "fashion-mnist", "cifar-10" or
        "cifar-100".
      folder: where its files are, or a folder of that name with its files; None for
        Debian's files if installed, else Hugging Face.
      shrink: factor by which images are made smaller, by the mean of squares.
      held_out: how many of the test images to take, the first ones; None for all.

    Raises:
      FileNotFoundError: if the data is nowhere to be had.
      ValueError: if a file is not what it should be.
    """
    if folder is not None and (folder / source).is_dir():
        folder = folder / source
    if source == "digits":
        arrays = _digits()
    elif source == "fashion-mnist":
        arrays = idx.fashion_mnist(folder)
    else:
        arrays = cifar.cifar(source, folder)
    small = {
        split: (_shrink(pixels.astype(np.float32), shrink), labels)
        for split, (pixels, labels) in arrays.items()
    }
    train = small["train"][0]
    mean, std = train.mean(), train.std()

    def batch(pixels: np.ndarray, labels: np.ndarray) -> Batch:
        pixels = (pixels - mean) / std
        return jnp.asarray(pixels, jnp.float32), jnp.asarray(labels, jnp.int32)

    test = batch(*(array[:held_out] for array in small["test"]))
    classes = int(small["train"][1].max()) + 1
    name = f"{source} {train.shape[1]}x{train.shape[2]}"
    return Images(batch(*small["train"]), test, name, classes)


def _digits() -> Arrays:
    """Returns 1347 images of 8 by 8 to train on, 450 held out, split by class."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=0
    )
    shape = (-1, 8, 8, 1)
    return {
        "train": (train_x.reshape(shape), train_y),
        "test": (test_x.reshape(shape), test_y),
    }


def _shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    n, height, width, channels = pixels.shape
    if height % factor or width % factor:
        raise ValueError(
            f"shrink must divide the size of the images, {height}x{width}, got {factor}"
        )
    squares = (n, height // factor, factor, width // factor, factor, channels)
    return pixels.reshape(squares).mean((2, 4))
