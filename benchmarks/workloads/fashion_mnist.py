"""Fashion-MNIST, 28 by 28 pixels, and two networks: an MLP and a small CNN.

The four files are those of the Debian package ``dataset-fashion-mnist``, or of any
folder in the IDX form of MNIST; without them, Hugging Face's copy is loaded.
"""

import gzip
import math
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import Batch, Workload
from benchmarks.workloads.images import MLP, ConvNet, classification

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
NETWORKS = {"mlp": partial(MLP, 28), "cnn": partial(ConvNet, 28, width=16)}


def fashion_mnist(network: str, folder: Path | None = None) -> Workload:
    """Returns the workload: 60 000 images to train on, 10 000 held out.

    Args:
      network: "mlp" or "cnn".
      folder: where the four IDX files are, as such or gzipped; None for Debian's
        folder if it is there, else Hugging Face.

    Raises:
      FileNotFoundError: if the data is nowhere to be had.
      ValueError: if a file is not what it should be.
    """
    train, test = _load(folder)
    return classification(f"fashion-mnist {network}", NETWORKS[network], train, test)


def read_idx(path: Path) -> np.ndarray:
    """Reads an array of bytes in the IDX form, gzipped if its name says so.

    Args:
      path: the file.

    Returns:
      The array, uint8.

    Raises:
      ValueError: if the file is not IDX, not of bytes, or of the wrong length.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again.") from error
    # Two zeros, 8 for unsigned bytes, the rank; the shape, big-endian; the bytes.
    rank = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * rank:
        raise ValueError(
            f"{path} is not an IDX file of bytes: it starts with {data[:4].hex()!r}, "
            "not 000008 and the rank."
        )
    shape = tuple(np.frombuffer(data, ">u4", rank, offset=4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if len(values) != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(values)} values, but its header says {shape}; it is "
            "cut short or damaged, download it again."
        )
    return values.reshape(shape)


def _load(folder: Path | None) -> tuple[Batch, Batch]:
    if folder is None and not DEBIAN.is_dir():
        arrays = _hugging_face()
    else:
        arrays = _idx_folder(DEBIAN if folder is None else folder)
    mean, std = arrays["train"][0].mean() / 255, arrays["train"][0].std() / 255

    def batch(split: str) -> Batch:
        images, labels = arrays[split]
        pixels = (images[..., None].astype(np.float32) / 255 - mean) / std
        return jnp.asarray(pixels, jnp.float32), jnp.asarray(labels, jnp.int32)

    return batch("train"), batch("test")


def _idx_folder(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    def find(name: str) -> Path:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
        raise FileNotFoundError(
            f"{folder} has neither {name} nor {name}.gz; point to the folder with the "
            "four IDX files of Fashion-MNIST (Debian: apt install "
            "dataset-fashion-mnist)."
        )

    return {
        split: (
            read_idx(find(f"{prefix}-images-idx3-ubyte")),
            read_idx(find(f"{prefix}-labels-idx1-ubyte")),
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def _hugging_face() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        import datasets  # pyrefly: ignore[missing-import]

        loaded = datasets.load_dataset("zalando-datasets/fashion_mnist")
    except Exception as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is not at {DEBIAN} and could not be loaded from Hugging "
            f"Face ({type(error).__name__}: {error}); run `apt install "
            "dataset-fashion-mnist`, or `pip install datasets` where the internet is "
            "in reach, or pass the folder of its IDX files."
        ) from error
    return {
        split: (np.asarray(rows["image"]), np.asarray(rows["label"]))
        for split, rows in loaded.with_format("numpy").items()
    }
