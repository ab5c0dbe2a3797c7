"""Trees of codes as flat dictionaries of arrays, for files of any kind, and back."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madax._format import parse_format
from madax._leaves import flatten_named
from madax._quantized_array import QuantizedArray, is_quantized

_CODES = re.compile(r"(?P<path>(?:.*/)?)codes:(?P<format>\w+\(.*\))")


def to_flat_dict(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name, with the codes and scales of quantised leaves.

    They are for ``numpy.savez``, safetensors, or any other file that keeps arrays under
    names. The names contain the format of codes, so the file is complete.

    Args:
      tree: parameters, statistics, or any other tree of arrays, an ``nnx.State``, too.

    Returns:
      The arrays, named by their paths: ``"Dense_0/bias"``; for codes
      ``"Dense_0/kernel/codes:UniformFormat(bits=8)"`` and ``"Dense_0/kernel/scale"``.

    Raises:
      ValueError: if two arrays would have one name.

    Example:
      >>> import io, jax.numpy as jnp, numpy as np, madax
      >>> params = {"layer": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}
      >>> params = madax.quantize_params(params, madax.UniformFormat(bits=8))
      >>> file = io.BytesIO()
      >>> np.savez(file, **madax.to_flat_dict(params))
      >>> _ = file.seek(0)
      >>> with np.load(file) as arrays:
      ...     restored = madax.from_flat_dict(arrays)
      >>> print(restored["layer"]["kernel"])
      QuantizedArray(shape=(4, 4), scale=3, UniformFormat(bits=8))
    """
    flat: dict[str, Any] = {}
    for name, leaf in _named_leaves(tree):
        for part, array in _parts(leaf).items():
            full = "/".join(filter(None, (name, part)))
            if full in flat:
                raise ValueError(
                    f"two arrays of the tree are called {full!r}; use keys without "
                    "slashes."
                )
            flat[full] = array
    return flat


def from_flat_dict(arrays: Mapping[str, Any], target: Any = None) -> Any:
    """The tree that :func:`to_flat_dict` made a dictionary of.

    It also takes a tree of dictionaries that has lost its :class:`QuantizedArray`
    nodes, as Orbax restores without a target, or flax's ``msgpack_restore``.

    Args:
      arrays: the arrays by name, or trees of dictionaries of them.
      target: a tree with the structure and the shapes that are wanted, of arrays or
        ``jax.ShapeDtypeStruct``, before or after ``quantize_params``; None for nested
        dictionaries. Its formats do not matter: the arrays say what they are.

    Returns:
      The tree, with a :class:`QuantizedArray` wherever there are codes.

    Raises:
      ValueError: if codes come without a scale or in a format that is none, or the
        names or shapes are not those of ``target``.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> w = madax.quantize_params(jnp.ones((4, 4)), madax.UniformFormat(bits=8))
      >>> arrays = madax.to_flat_dict([w, jnp.zeros(3)])
      >>> print(list(arrays))
      ['0/codes:UniformFormat(bits=8)', '0/scale', '1']
      >>> print(madax.from_flat_dict(arrays, target=[jnp.ones((4, 4)), jnp.ones(3)])[0])
      QuantizedArray(shape=(4, 4), scale=3, UniformFormat(bits=8))
    """
    leaves = _joined(_unnested(arrays))
    if target is None:
        return _nested(leaves)
    wanted = _named_leaves(target)
    _check_fits(leaves, wanted)
    treedef = jax.tree.structure(target, is_leaf=is_quantized)
    return treedef.unflatten([leaves[name] for name, _ in wanted])


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    names, leaves, _ = flatten_named(tree, is_leaf=is_quantized)
    return list(zip(names, leaves, strict=True))


def _parts(leaf: Any) -> dict[str, Any]:
    """The arrays of a leaf by the names they have in it: none for an array itself."""
    return leaf.parts() if is_quantized(leaf) else {"": leaf}


def _unnested(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in arrays.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_unnested(value, f"{name}/"))
        else:
            flat[name] = jnp.asarray(value) if isinstance(value, np.ndarray) else value
    return flat


def _joined(arrays: dict[str, Any]) -> dict[str, Any]:
    """The leaves by name, codes and their scale as one."""
    leaves = {}
    codes = {name: match for name in arrays if (match := _CODES.fullmatch(name))}
    scales = {f"{match['path']}scale" for match in codes.values()}
    for name, array in arrays.items():
        if name in codes:
            path, format = codes[name]["path"], parse_format(codes[name]["format"])
            if f"{path}scale" not in arrays:
                raise ValueError(
                    f"there is {name!r}, but no '{path}scale'; pass all arrays that "
                    "to_flat_dict made."
                )
            scale = arrays[f"{path}scale"]
            leaves[path.removesuffix("/")] = QuantizedArray(array, scale, format)
        elif name not in scales:
            leaves[name] = array
    return leaves


def _nested(leaves: dict[str, Any]) -> Any:
    """Dictionaries in dictionaries, along the slashes in names."""
    if "" in leaves:  # the tree is a leaf
        return leaves[""]
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _check_fits(leaves: dict[str, Any], target: list[tuple[str, Any]]) -> None:
    wanted = dict(target)
    if wanted.keys() != leaves.keys():
        missing, unwanted = wanted.keys() - leaves.keys(), leaves.keys() - wanted.keys()
        raise ValueError(
            f"the arrays are not those of target: {sorted(missing) or 'none'} are "
            f"missing, {sorted(unwanted) or 'none'} are not wanted; pass a target made "
            "as the tree that was saved."
        )
    for name, leaf in leaves.items():
        if np.shape(leaf) != np.shape(wanted[name]):
            raise ValueError(
                f"{name!r} has shape {np.shape(leaf)}, but {np.shape(wanted[name])} in "
                "target; pass a target made as the tree that was saved."
            )
