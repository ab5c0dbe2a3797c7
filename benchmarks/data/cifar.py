"""CIFAR-10 and CIFAR-100, from the files of their binary version or Hugging Face."""

from pathlib import Path

import numpy as np

from benchmarks.data import hub

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = 3 * 32 * 32
# The files, and the bytes of labels before the pixels; the last is the label.
FILES = {
    "cifar-10": ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "cifar-100": (["train.bin"], ["test.bin"], 2),
}


def cifar(name: str, folder: Path | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns 50 000 images of 32 by 32 to train on, 10 000 held out, as bytes.

    Args:
      name: "cifar-10" or "cifar-100".
      folder: where the files of the binary version are; None for Hugging Face.
    """
    if name not in FILES:
        raise ValueError(f"the data set must be one of {list(FILES)}, got {name!r}")
    if folder is None:
        return _hugging_face(name)
    train, test, labels = FILES[name]
    splits = {}
    for split, files in (("train", train), ("test", test)):
        parts = [read_cifar(folder / file, labels) for file in files]
        pixels, numbers = zip(*parts, strict=True)
        splits[split] = (np.concatenate(pixels), np.concatenate(numbers))
    return splits


def read_cifar(path: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads one file of the binary version.

    Args:
      path: the file.
      labels: bytes of labels before the pixels of an image: 1 in CIFAR-10, 2, the
        coarse and the fine one, in CIFAR-100.

    Returns:
      Images of shape (examples, 32, 32, 3) and the last label of each, uint8.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is not a whole number of images, or a label is too large.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; unpack the binary version of the data set there, from "
            f"{PAGE}."
        )
    data = np.fromfile(path, np.uint8)
    if not data.size or data.size % (labels + PIXELS):
        raise ValueError(
            f"{path} has {data.size} bytes, not a whole number of images of "
            f"{labels + PIXELS}; it is cut short or damaged, download it again."
        )
    rows = data.reshape(-1, labels + PIXELS)
    numbers, limit = rows[:, labels - 1], 10 if labels == 1 else 100
    if numbers.max() >= limit:
        raise ValueError(
            f"{path} has the label {numbers.max()}, but there are {limit} classes; it "
            "is damaged or not the binary version of CIFAR, download it again."
        )
    planes = rows[:, labels:].reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), numbers


def _hugging_face(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    label = "label" if name == "cifar-10" else "fine_label"
    loaded = hub.load(
        f"uoft-cs/{name.replace('-', '')}",
        what=name,
        otherwise=f"pass the folder of its binary version, from {PAGE}",
    )
    return {
        split: (np.asarray(rows["img"]), np.asarray(rows[label]))
        for split, rows in loaded.with_format("numpy").items()
    }
