"""Fashion-MNIST, from files in the IDX form of MNIST or from Hugging Face."""

import gzip
import math
from pathlib import Path

import numpy as np

from benchmarks.data import hub

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(folder: Path | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns 60 000 images of 28 by 28 to train on, 10 000 held out, as bytes.

    Args:
      folder: where the four IDX files are, as such or gzipped; None for Debian's
        folder if it is there, else Hugging Face.
    """
    if folder is None and not DEBIAN.is_dir():
        return _hugging_face()
    folder = DEBIAN if folder is None else folder

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
            read_idx(find(f"{prefix}-images-idx3-ubyte"))[..., None],
            read_idx(find(f"{prefix}-labels-idx1-ubyte")),
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


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


def _hugging_face() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    loaded = hub.load(
        "zalando-datasets/fashion_mnist",
        what=f"Fashion-MNIST ({DEBIAN})",
        otherwise="run `apt install dataset-fashion-mnist`, pass the folder of its IDX "
        "files",
    )
    return {
        split: (np.asarray(rows["image"])[..., None], np.asarray(rows["label"]))
        for split, rows in loaded.with_format("numpy").items()
    }
