"""Leaves of Tunix's models are the matrices that its programs multiply by."""

import json
import pathlib

import pytest

from madax._core.leaf_kinds import read_leaves

LISTED = json.loads((pathlib.Path(__file__).parents[2] / "lib/others.json").read_text())
MODELS = {name: leaves for name, leaves in LISTED.items() if isinstance(leaves, dict)}
# The direction of Madam, as docs say of last layers and routers.
OWN = {"lm_head/w", "mlp/router/kernel"}


def is_right(path, reading, found):
    """Whether rows are summed over, and columns are among the axes that are kept."""
    if not found or "lookup" in found or path.endswith(tuple(OWN)):
        return reading.kind not in ("matrix", "unknown")
    (summed, kept), (rows, columns) = found[0].split(">"), reading.axes or ((), ())
    return (
        reading.kind == "matrix"
        and set(rows) == set(map(int, summed))
        and bool(columns)
        and set(columns) <= set(map(int, kept))
    )


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_what_a_program_sums_over(name):
    leaves = MODELS[name]
    shapes = [shape for shape, _ in leaves.values()]
    readings = read_leaves(list(leaves), shapes)
    wrong = {
        path: (found, reading.kind, reading.axes)
        for (path, (_, found)), reading in zip(leaves.items(), readings, strict=True)
        if not is_right(path, reading, found)
    }
    assert not wrong


def test_the_list_has_leaves_that_are_multiplied_by():
    products = [found for x in MODELS.values() for _, found in x.values() if found]
    assert len(MODELS) == 6 and len(products) > 80
