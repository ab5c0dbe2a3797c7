"""How :func:`madax.muon_madam` reads a tree, as a dict that prints as a table.

Public as :func:`madax.diagnostics.matrices`.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from madax._core.names import Tree
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten
from madax.transforms._orthogonal import Matrices, check_matrices, in_order, read_axes


class MatrixTable(dict[str, tuple[int, int, int] | None]):
    """For each path None, or (matrices in the stack, rows, columns)."""

    def __init__(self, found: dict, storage: Sequence[tuple[tuple[int, ...], str]]):
        super().__init__(found)
        self._storage = storage

    def __repr__(self) -> str:
        rows = [("leaf", "shape", "storage", "direction")]
        cells = zip(self.items(), self._storage, strict=True)
        for (path, found), (shape, stored) in cells:
            direction = "Madam" if found is None else "{} of {} x {}".format(*found)
            rows.append((path, str(shape), stored, direction))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def matrices(params: Tree, matrices: Matrices | None = None) -> MatrixTable:
    """How :func:`madax.muon_madam` reads a tree: which leaves are which matrices.

    Args:
      params: tree of floating-point or quantised arrays, or of their shapes.
      matrices: the optimizer's ``matrices``.

    Returns:
      For each path None, for a leaf that takes the direction of Madam, or (matrices in
      the stack, rows, columns), in the order of the leaf's own axes. The dict prints as
      a table.

    Raises:
      ValueError: if ``matrices`` gives axes that a leaf does not have.
      TypeError: if a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> query = {"kernel": jnp.ones((64, 4, 16)), "bias": jnp.ones((4, 16))}
      >>> madax.diagnostics.matrices({"query": query})
      leaf          shape        storage  direction
      query/bias    (4, 16)      float32  Madam
      query/kernel  (64, 4, 16)  float32  1 of 64 x 64
    """
    check_matrices(matrices)
    paths, leaves, _ = flatten(params)
    found, storage = {}, []
    for path, leaf, axes in zip(
        paths, leaves, read_axes(paths, leaves, matrices), strict=True
    ):
        shape = np.shape(leaf)
        found[path] = None
        if axes is not None:
            groups = in_order(shape, axes)
            found[path] = tuple(math.prod(shape[i] for i in x) for x in groups)
        stored = leaf.format if is_quantized(leaf) else jnp.result_type(leaf)
        storage.append((shape, str(stored)))
    return MatrixTable(found, storage)
