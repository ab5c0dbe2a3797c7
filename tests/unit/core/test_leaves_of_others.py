"""Leaves of others' models are the matrices that their programs multiply by."""

import json
import pathlib
import re

import pytest

from madax._core.leaf_kinds import read_leaves

MODELS = json.loads((pathlib.Path(__file__).parents[2] / "lib/others.json").read_text())
# Products with the direction of Madam, as docs say of last layers, routers and what
# embeds the input.
OWN = re.compile(
    r"lm_head/w|lm_head/kernel|^(head|classifier)/|logits/w|router/kernel|reverse_embed"
    r"|patch_embed|embedding_layer|expert_feedforward_gate_dense"
)


def is_right(path, shape, found, reading):
    """Whether rows are summed over, and columns are among the axes that are kept."""
    products = [x for x in found if ">" in x]
    if not products or "lookup" in found:
        return reading.kind not in ("matrix", "unknown")
    of_size = lambda axes: {int(i) for i in axes if shape[int(i)] > 1}
    summed, kept = map(of_size, products[0].split(">"))
    rows, columns = map(of_size, reading.axes or ((), ()))
    # A square matrix has one shape from both sides.
    square = len(shape) == 2 and shape[0] == shape[1] and bool(rows)
    own = reading.kind in ("head", "router", "table") and OWN.search(path)
    return (reading.kind == "matrix" or bool(own)) and (
        square or (rows == summed and bool(columns) and columns <= kept)
    )


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_what_a_program_sums_over(name):
    leaves = MODELS[name]
    shapes = [shape for shape, _ in leaves.values()]
    readings = read_leaves(list(leaves), shapes)
    wrong = {
        path: (shape, found, reading.kind, reading.axes)
        for (path, (shape, found)), reading in zip(
            leaves.items(), readings, strict=True
        )
        if not is_right(path, shape, found, reading)
    }
    assert not wrong


def test_the_list_has_leaves_that_are_multiplied_by():
    products = [found for x in MODELS.values() for _, found in x.values() if found]
    assert len(MODELS) == 22 and len(products) > 300
