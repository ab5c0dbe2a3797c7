"""The list of what programs of others do with their leaves."""

import json
import pathlib

import jax
import numpy as np
from contractions import contractions

from zoo import MODELS
from zoo.other import apart

LISTED = pathlib.Path(__file__).parents[1] / "others.json"


def leaves_of(other):
    """For each path its shape, and what the program does with the leaf."""
    params, together = apart(other.model)
    used = contractions(lambda params: other.output(together(params)), params)
    shapes = map(np.shape, jax.tree.leaves(params))
    return {
        path: [list(shape), found]
        for (path, found), shape in zip(used.items(), shapes, strict=True)
    }


def write():
    """Renews the models whose packages are here; the rest of the list stays."""
    entries = json.loads(LISTED.read_text())
    for name, build in MODELS.items():
        try:
            entries[name] = leaves_of(build())
        except ImportError:
            continue
    text = ",\n".join(
        f' "{name}": {{\n'
        + ",\n".join(f'  "{path}": {json.dumps(x)}' for path, x in leaves.items())
        + "\n }"
        for name, leaves in (
            (name, entries[name]) for name in MODELS if name in entries
        )
    )
    LISTED.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    write()
