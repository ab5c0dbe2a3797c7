"""A photograph that ships with scikit-learn, as pixels and where they are."""

import numpy as np
from sklearn.datasets import load_sample_image


def photo(name: str, size: int, *, shrink: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the square in the middle of a photograph.

    Args:
      name: "china.jpg" or "flower.jpg".
      size: pixels on a side.
      shrink: factor by which the photograph is made smaller first.

    Returns:
      Coordinates in [-1, 1] of shape (size, size, 2), and colours in [0, 1] of shape
      (size, size, 3).
    """
    pixels = load_sample_image(name) / 255
    height, width = (n // shrink * shrink for n in pixels.shape[:2])
    squares = (height // shrink, shrink, width // shrink, shrink, 3)
    pixels = pixels[:height, :width].reshape(squares).mean((1, 3))
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    if min(top, left) < 0:
        raise ValueError(f"{name} has only {pixels.shape[:2]} pixels, got size {size}")
    line = np.linspace(-1, 1, size)
    places = np.stack(np.meshgrid(line, line, indexing="ij"), -1)
    return places, pixels[top : top + size, left : left + size]
