"""The names of the leaves of a tree: their paths, with slashes."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

# A pytree of arrays or shapes, or a state. Public signatures use it for parameters,
# too, because typing.get_type_hints cannot resolve optax.Params.
Tree: TypeAlias = Any

# The two parts of the parameters that :func:`madax.layerwise` trains.
ENDS, LAYERS = "ends", "layers"


def path_names(paths: Sequence[jax.tree_util.KeyPath]) -> list[str]:
    """Returns the paths of all leaves of a tree, with slashes: ``Dense_0/kernel``.

    Flax puts arrays in boxes: variables of nnx, and partitioned ones of linen. Each box
    is a node with a single child, ``value``, which is left out of the path.
    """
    below = Counter(path[:i] for path in paths for i in range(len(path)))
    value = jax.tree_util.GetAttrKey("value")
    return [
        jax.tree_util.keystr(
            path[:-1] if path[-1:] == (value,) and below[path[:-1]] == 1 else path,
            simple=True,
            separator="/",
        )
        for path in paths
    ]


def flatten_named(
    tree: Tree, is_leaf: Callable[[Tree], bool] | None = None
) -> tuple[list[str], list[Tree], jax.tree_util.PyTreeDef]:
    """Flattens any tree into the names of its paths, leaves and treedef."""
    with_path, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = path_names([path for path, _ in with_path])
    return paths, [leaf for _, leaf in with_path], treedef


def is_part(paths: Sequence[str]) -> bool:
    """Returns whether ``layerwise`` passes a tree of these paths as a part.

    ``layerwise`` calls ``init`` with the ends, with one layer, and once with the whole
    tree. Only the last call may warn about the tree.
    """
    parts = rf"{ENDS}(/|$)", rf"{LAYERS}(/\D|$)"
    return any(all(re.match(part, path) for path in paths) for part in parts)
