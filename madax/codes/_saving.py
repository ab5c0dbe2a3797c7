"""Conversion of trees of codes to flat dictionaries of arrays, for files, and back."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.names import Tree, flatten_named
from madax.codes._array import (
    AFTER_IMPORT,
    Leaf,
    QuantizedArray,
    is_quantized,
    lowered,
)
from madax.codes._kind import Kind

_CODES = re.compile(r"(?P<path>(?:.*/)?)codes:(?P<kind>(\w+:)?\w+\(.*\))")
# NumPy's files lose these dtypes: bfloat16 is read as two bytes without a type.
_NO_NUMPY = re.compile(r"(?P<path>.*):(?P<dtype>bfloat16|float[468]_\w+|u?int[24])")


def to_flat_dict(tree: Tree) -> dict[str, Any]:
    """Returns the arrays of a tree by name, codes and scales of quantised leaves apart.

    Save them with ``numpy.savez``, safetensors, or any other format that keeps arrays
    by name. The names contain the format of codes, so the file is complete. NumPy's
    files do not support bfloat16, float8 or int4. Such arrays become unsigned integers
    with the same bits, and their names contain the dtype.

    Args:
      tree: parameters, statistics, an ``nnx.State`` or any other tree of arrays.

    Returns:
      The arrays, named by their paths: ``"Dense_0/bias"``, or
      ``"Dense_0/bias:bfloat16"``; for codes
      ``"Dense_0/kernel/codes:UniformFormat(bits=8)"`` and ``"Dense_0/kernel/scale"``,
      or ``"Dense_0/kernel/codes:bfloat16:UniformFormat(bits=8)"`` if they decode to
      bfloat16.

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
    flat = {}
    names, leaves, _ = flatten_named(tree, is_leaf=is_quantized)
    for name, leaf in zip(names, map(lowered, leaves), strict=True):
        for part, array in (leaf.parts() if is_quantized(leaf) else {"": leaf}).items():
            full = "/".join(filter(None, (name, part)))
            if not part and _NO_NUMPY.fullmatch(full):
                raise ValueError(
                    f"an array of the tree is called {full!r}, which would be read as "
                    "an array of that dtype; use another key."
                )
            full, array = _in_numpy(full, array)
            if full in flat:
                raise ValueError(
                    f"two arrays of the tree are called {full!r}; use keys without "
                    "slashes."
                )
            flat[full] = array
    return flat


def from_flat_dict(arrays: Mapping[str, Any], target: Tree = None) -> Tree:
    """Returns the tree from which :func:`to_flat_dict` made a dictionary.

    It also takes a tree of dictionaries that has lost its :class:`QuantizedArray`
    nodes, as Orbax restores without a target, or flax's ``msgpack_restore``.

    Args:
      arrays: the arrays by name, or nested dictionaries of arrays.
      target: a tree of the wanted structure and shapes, of arrays or
        ``jax.ShapeDtypeStruct``, before or after ``quantize_params``; None for nested
        dictionaries. Its formats do not matter: the names of arrays contain theirs.

    Returns:
      The tree, with a :class:`QuantizedArray` wherever there are codes.

    Raises:
      ValueError: if codes have no scale, an unknown format, a dtype or values that
        their format does not have, or an invalid scale; names contradict each other; or
        names or shapes differ from ``target``.

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
    names, wanted, treedef = flatten_named(target, is_leaf=is_quantized)
    _check_fits(leaves, dict(zip(names, wanted, strict=True)))
    return treedef.unflatten([leaves[name] for name in names])


def _restored(
    name: str, codes: jax.Array, scale: jax.Array, kind: Kind
) -> QuantizedArray:
    """Returns codes and their scale from a file, checked; errors call them ``name``."""
    format = kind.format
    axes = zip(scale.shape[::-1], codes.shape[::-1], strict=False)
    is_here = _is_here(codes) and _is_here(scale)
    if codes.dtype != format.storage_dtype or scale.dtype != jnp.float32:
        wrong = (
            f"codes of {codes.dtype} and a scale of {scale.dtype}, but for {format!r} "
            f"they must be {format.storage_dtype} and float32"
        )
    elif len(scale.shape) > len(codes.shape) or any(n not in (1, m) for n, m in axes):
        wrong = (
            f"codes of shape {codes.shape}, but a scale of shape {scale.shape}, whose "
            "axes must be 1 or as long as the axes of the codes"
        )
    # The magnitude of -128 does not fit int8.
    elif is_here and np.any((codes > format.levels) | (codes < -format.levels)):
        wrong = f"codes beyond {format.levels}, the max of {format!r}"
    elif is_here and not np.all((scale > 0) & (scale < np.inf)):
        wrong = "a scale that is not positive and finite"
    else:
        return QuantizedArray(codes, scale, *kind)
    raise ValueError(f"{name} has {wrong}; pass the arrays that were saved.")


def _is_here(x: Any) -> bool:
    """Returns whether this process has all values of an array."""
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return False
    return getattr(x, "is_fully_addressable", True)


# Lets flax.serialization save and restore QuantizedArrays.
AFTER_IMPORT["flax.serialization", "register_serialization_state"] = lambda register: (
    register(QuantizedArray, QuantizedArray.parts, _from_parts)
)


def _from_parts(target: QuantizedArray, parts: dict[str, Any]) -> QuantizedArray:
    if parts.keys() != target.parts().keys():
        raise ValueError(
            f"codes were saved as {sorted(parts)}, but the target has "
            f"{sorted(target.parts())}; pass a target of that format."
        )
    codes, scale = (jnp.asarray(parts[name]) for name in target.parts())
    return _restored("a QuantizedArray", codes, scale, target.kind)


def _in_numpy(name: str, array: Any) -> tuple[str, Any]:
    """Returns the array in a dtype of NumPy's files, and a name with its own dtype."""
    dtype = getattr(array, "dtype", None)
    if not _NO_NUMPY.fullmatch(f":{dtype}") or isinstance(array, jax.ShapeDtypeStruct):
        return name, array
    return f"{name}:{dtype}", np.asarray(array).view(f"u{jnp.dtype(dtype).itemsize}")


def _from_numpy(name: str, array: Any) -> tuple[str, Any]:
    """Undoes :func:`_in_numpy`; arrays that JAX would round stay NumPy arrays."""
    told = _NO_NUMPY.fullmatch(name)
    if told and np.issubdtype(array.dtype, np.unsignedinteger):
        name, array = told["path"], array.view(jnp.dtype(told["dtype"]))
    elif array.dtype == np.dtype("V2"):
        array = array.view(jnp.bfloat16)  # numpy.savez got a bfloat16 array
    elif array.dtype.kind == "V" and not hasattr(jnp, array.dtype.name):
        raise ValueError(
            f"{name!r} has the dtype {array.dtype}, bytes of no type; pass the arrays "
            "of to_flat_dict, or view them in their dtype before."
        )
    same = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return name, jnp.asarray(array) if same else array


def _unnested(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in arrays.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            new = _unnested(value, f"{name}/")
        elif isinstance(value, np.ndarray) or _NO_NUMPY.fullmatch(name):
            new = dict([_from_numpy(name, np.asarray(value))])
        else:
            new = {name: value}
        for name in new.keys() & flat.keys():
            raise ValueError(f"two arrays are called {name!r}; pass one of them.")
        flat.update(new)
    return flat


def _joined(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves by name; codes and their scale become one leaf."""
    leaves = {}
    codes = {name: match for name in arrays if (match := _CODES.fullmatch(name))}
    scales = {f"{match['path']}scale" for match in codes.values()}
    for name, array in arrays.items():
        if name in scales:
            continue
        if name in codes:
            path, kind = codes[name]["path"], Kind.parse(codes[name]["kind"])
            if f"{path}scale" not in arrays:
                raise ValueError(
                    f"there is {name!r}, but no '{path}scale'; pass all arrays of "
                    "to_flat_dict."
                )
            name = path.removesuffix("/")
            array = _restored(repr(name), array, arrays[f"{path}scale"], kind)
        if name in leaves:
            raise ValueError(
                f"there are two leaves {name!r}, of which one is codes; pass one."
            )
        leaves[name] = array
    return leaves


def _nested(leaves: dict[str, Any]) -> Tree:
    """Returns nested dictionaries, by the slashes in names."""
    if leaves.keys() == {""}:  # the tree is a leaf
        return leaves[""]
    tree: Tree = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        for i in range(len(parents) + 1):
            above = "/".join(parents[:i])
            if above in leaves and above != name:
                raise ValueError(
                    f"{above!r} is an array, and so is {name!r} below it; pass the "
                    "target, or use keys that are not empty and have no slashes."
                )
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _check_fits(leaves: dict[str, Any], wanted: dict[str, Leaf]) -> None:
    if wanted.keys() != leaves.keys():
        missing, unwanted = wanted.keys() - leaves.keys(), leaves.keys() - wanted.keys()
        raise ValueError(
            f"the arrays do not match target: {sorted(missing) or 'none'} are missing, "
            f"{sorted(unwanted) or 'none'} are not wanted; pass a target of the "
            "structure of the tree that was saved."
        )
    for name, leaf in leaves.items():
        if np.shape(leaf) != np.shape(wanted[name]):
            raise ValueError(
                f"{name!r} has shape {np.shape(leaf)}, but {np.shape(wanted[name])} in "
                "target; pass a target of the shapes of the tree that was saved."
            )
