"""A run that was cut short: its arrays and facts in one file, there whole or not."""

import io
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib.records import Record
from benchmarks.lib.steps import Tree


def save(path: Path, tree: Tree, facts: Record) -> None:
    """Writes arrays and facts, and replaces the file.

    Args:
      path: the file; a process that is killed meanwhile leaves it as it was.
      tree: of arrays.
      facts: of JSON types.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # NumPy's files know no bfloat16, so leaves are kept as their bytes.
    arrays = map(np.asarray, jax.tree.leaves(tree))
    leaves = [np.frombuffer(x.tobytes(), np.uint8) for x in arrays]
    file = io.BytesIO()
    named = {str(i): leaf for i, leaf in enumerate(leaves)}
    np.savez(file, allow_pickle=False, facts=np.array(json.dumps(facts)), **named)
    part = path.with_suffix(".part")
    part.write_bytes(file.getbuffer())
    os.replace(part, path)


def load(path: Path, like: Tree) -> tuple[Tree, Record] | None:
    """Returns what was saved; None if nothing was.

    Args:
      path: the file.
      like: a tree of the shapes and dtypes that were saved.
    """
    if not path.exists():
        return None
    with np.load(path) as file:
        facts = json.loads(str(file["facts"]))
        leaves, treedef = jax.tree.flatten(like)
        arrays = [
            jnp.asarray(np.frombuffer(file[str(i)].tobytes(), x.dtype).reshape(x.shape))
            for i, x in enumerate(leaves)
        ]
    return treedef.unflatten(arrays), facts
