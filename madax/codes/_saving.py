"""Trees of codes as flat dictionaries of arrays, for files of any kind, and back."""

import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.names import flatten_named
from madax.codes._array import QuantizedArray, is_quantized
from madax.formats._base import Format, parse_format

_CODES = re.compile(r"(?P<path>(?:.*/)?)codes:(?P<format>\w+\(.*\))")
# Dtypes that files of NumPy do not keep: they read bfloat16 as two bytes of no type.
_NO_NUMPY = re.compile(r"(?P<path>.*):(?P<dtype>bfloat16|float[468]_\w+|u?int[24])")


def to_flat_dict(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name, with the codes and scales of quantised leaves.

    They are for ``numpy.savez``, safetensors, or any other file that keeps arrays under
    names. The names contain the format of codes, so the file is complete. NumPy's files
    keep no bfloat16, float8 or int4. Such arrays become unsigned integers of the same
    bits, and their names tell the dtype.

    Args:
      tree: parameters, statistics, or any other tree of arrays, an ``nnx.State``, too.

    Returns:
      The arrays, named by their paths: ``"Dense_0/bias"``, or
      ``"Dense_0/bias:bfloat16"``; for codes
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
            if not part and _NO_NUMPY.fullmatch(full):
                raise ValueError(
                    f"an array of the tree is called {full!r}, which would be read as "
                    "one of that dtype; use another key."
                )
            full, array = _in_numpy(full, array)
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
    wanted = _named_leaves(target)
    _check_fits(leaves, wanted)
    treedef = jax.tree.structure(target, is_leaf=is_quantized)
    return treedef.unflatten([leaves[name] for name, _ in wanted])


def restored(name: str, codes: Any, scale: Any, format: Format) -> QuantizedArray:
    """Codes and their scale as they come from a file, checked.

    Args:
      name: what to call them in an error.
      codes: the codes.
      scale: the scale.
      format: the format that the file tells.
    """
    if codes.dtype != format.storage_dtype or scale.dtype != jnp.float32:
        raise ValueError(
            f"{name} has codes of {codes.dtype} and a scale of {scale.dtype}, but for "
            f"{format!r} they must be {format.storage_dtype} and float32; pass the "
            "arrays that were saved."
        )
    axes = zip(scale.shape[::-1], codes.shape[::-1], strict=False)
    if len(scale.shape) > len(codes.shape) or any(
        n not in (1, size) for n, size in axes
    ):
        raise ValueError(
            f"{name} has codes of shape {codes.shape}, but a scale of shape "
            f"{scale.shape}, whose axes must be 1 or as long as the codes'; pass the "
            "arrays that were saved."
        )
    if _is_here(codes) and _is_here(scale):
        # The magnitude of -128 is no int8.
        if np.any((codes > format.levels) | (codes < -format.levels)):
            raise ValueError(
                f"{name} has codes beyond {format.levels}, the largest of {format!r}; "
                "pass the arrays that were saved."
            )
        if not np.all((scale > 0) & (scale < np.inf)):
            raise ValueError(
                f"{name} has a scale that is not positive and finite; pass the arrays "
                "that were saved."
            )
    return QuantizedArray(codes, scale, format)


def _is_here(x: Any) -> bool:
    """Whether this process has all values of an array."""
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return False
    return getattr(x, "is_fully_addressable", True)


@cache
def register_with_flax() -> None:
    """Lets ``flax.serialization`` take QuantizedArrays apart, and put them together."""
    sys.modules["flax.serialization"].register_serialization_state(
        QuantizedArray, QuantizedArray.parts, _from_parts
    )


def _from_parts(target: QuantizedArray, parts: Any) -> QuantizedArray:
    if parts.keys() != target.parts().keys():
        raise ValueError(
            f"codes were saved as {sorted(parts)}, but the target has "
            f"{sorted(target.parts())}; pass a target of that format."
        )
    codes, scale = (jnp.asarray(parts[name]) for name in target.parts())
    return restored("a QuantizedArray", codes, scale, target.format)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    names, leaves, _ = flatten_named(tree, is_leaf=is_quantized)
    return list(zip(names, leaves, strict=True))


def _parts(leaf: Any) -> dict[str, Any]:
    """The arrays of a leaf by the names they have in it: none for an array itself."""
    return leaf.parts() if is_quantized(leaf) else {"": leaf}


def _in_numpy(name: str, array: Any) -> tuple[str, Any]:
    """The array as NumPy's files keep it, under a name that tells its dtype."""
    dtype = getattr(array, "dtype", None)
    if not _NO_NUMPY.fullmatch(f":{dtype}") or isinstance(array, jax.ShapeDtypeStruct):
        return name, array
    return f"{name}:{dtype}", np.asarray(array).view(f"u{jnp.dtype(dtype).itemsize}")


def _from_numpy(name: str, array: Any) -> tuple[str, Any]:
    """Undoes :func:`_in_numpy`; arrays that JAX would round stay NumPy's."""
    told = _NO_NUMPY.fullmatch(name)
    if told and np.issubdtype(array.dtype, np.unsignedinteger):
        name, array = told["path"], array.view(jnp.dtype(told["dtype"]))
    elif array.dtype == np.dtype("V2"):
        array = array.view(jnp.bfloat16)  # as numpy.savez of a bfloat16 array reads
    elif array.dtype.kind == "V" and not hasattr(jnp, array.dtype.name):
        raise ValueError(
            f"{name!r} has the dtype {array.dtype}, bytes of no type; pass arrays as "
            "to_flat_dict names them, or view them in their dtype before."
        )
    same = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return name, jnp.asarray(array) if same else array


def _unnested(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
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
    """The leaves by name, codes and their scale as one."""
    leaves = {}
    codes = {name: match for name in arrays if (match := _CODES.fullmatch(name))}
    scales = {f"{match['path']}scale" for match in codes.values()}
    for name, array in arrays.items():
        if name in scales:
            continue
        if name in codes:
            path, format = codes[name]["path"], parse_format(codes[name]["format"])
            if f"{path}scale" not in arrays:
                raise ValueError(
                    f"there is {name!r}, but no '{path}scale'; pass all arrays that "
                    "to_flat_dict made."
                )
            name = path.removesuffix("/")
            array = restored(repr(name), array, arrays[f"{path}scale"], format)
        if name in leaves:
            raise ValueError(
                f"there are two leaves {name!r}, of which one is codes; pass one."
            )
        leaves[name] = array
    return leaves


def _nested(leaves: dict[str, Any]) -> Any:
    """Dictionaries in dictionaries, along the slashes in names."""
    if leaves.keys() == {""}:  # the tree is a leaf
        return leaves[""]
    tree: dict[str, Any] = {}
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
