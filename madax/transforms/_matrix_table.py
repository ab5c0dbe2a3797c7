"""How a tree is read by :func:`madax.muon_madam`, as a dict that prints as a table."""

import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from madax._core.names import Tree
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten
from madax.transforms._orthogonal import Matrices, check_matrices, in_order, read_axes


class MatrixTable(dict[str, tuple[int, int, int] | None]):
    """For each path None, or (matrices in the stack, rows, columns)."""

    def __init__(self, readings: Iterable, storage: list[tuple[Tree, str]]):
        super().__init__(readings)
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


def matrix_table(params: Tree, matrices: Matrices | None) -> MatrixTable:
    """What :func:`madax.diagnostics.matrices` returns."""
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
