"""Saves lifted codes in Orbax checkpoints, as three arrays for each leaf.

This module is imported only after Orbax.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import wraps

import jax
import numpy as np
from orbax.checkpoint import type_handlers
from orbax.checkpoint.metadata import SingleDeviceShardingMetadata

from madax._core.names import Tree
from madax.codes._array import QuantizedArray
from madax.formats._base import parse_format
from madax.hijax._shardings import replicated
from madax.hijax._values import LiftedArray, lifted

_PARTS = "codes", "scale", "format"


class _Handler(type_handlers.TypeHandler):
    """Saves the codes, the scale, and the name of the format as bytes."""

    def __init__(self):
        # Two handlers would overwrite each other's sharding file.
        self._arrays = type_handlers.ArrayHandler(enable_write_sharding_file=False)

    def typestr(self) -> str:
        return "madax.hijax"

    async def metadata(self, infos):
        codes = [_of_part(info, "codes") for info in infos]
        found = await type_handlers.NumpyHandler().metadata(codes)
        # Without a sharding, a restore without a target would ask for a NumPy array.
        first = SingleDeviceShardingMetadata.from_jax_sharding(_placed(None))
        return [dataclasses.replace(metadata, sharding=first) for metadata in found]

    async def serialize(self, values: Sequence[LiftedArray], infos, args=None):
        parts = [
            (part, _of_part(info, name))
            for value, info in zip(values, infos, strict=True)
            for name, part in zip(_PARTS, _arrays_of(value), strict=True)
        ]
        return await self._arrays.serialize(*map(list, zip(*parts, strict=True)))

    async def deserialize(self, infos, args=None):
        args = args or [None] * len(infos)
        placed = [_placed(arg) for arg in args]
        found = []
        for name in _PARTS:
            parts = [
                type_handlers.ArrayRestoreArgs(
                    sharding=on if name == "codes" else replicated(on)
                )
                for on in placed
            ]
            of_part = [_of_part(info, name) for info in infos]
            found.append(await self._arrays.deserialize(of_part, parts))
        return [_value(*parts) for parts in zip(*found, strict=True)]


def _arrays_of(value: LiftedArray) -> list[jax.Array]:
    text = f"{value.aval.number_format!r} {value.dtype.name}".encode()
    text = jax.device_put(np.frombuffer(text, np.uint8), replicated(value.sharding))
    return [value.codes, value.scale, text]


def _value(codes: jax.Array, scale: jax.Array, text: jax.Array) -> LiftedArray:
    format, _, dtype = bytes(np.asarray(text)).decode().rpartition(" ")
    return lifted(QuantizedArray(codes, scale, parse_format(format)), np.dtype(dtype))


def _of_part(info: Tree, name: str) -> Tree:
    """Returns the name and path of one of the three arrays of a leaf."""
    part = copy.copy(info)
    part.name = f"{info.name}.{name}"
    part.path = info._path.parent / part.name
    # Other arrays are saved by another thread, and a limiter belongs to one thread.
    part.byte_limiter = None
    return part


def _placed(arg: Tree) -> Tree:
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = getattr(arg, "abstract_leaf", arg)  # Orbax v1 has it inside.
    return getattr(wanted, "sharding", None) or first


def _saved_as(kind: str, directory: Tree) -> set[str]:
    """Returns the names of the leaves that a checkpoint lists with a type string."""
    path = directory / "_METADATA"
    if not path.exists():
        return set()
    entries = json.loads(path.read_text())["tree_metadata"].values()
    return {
        ".".join(str(key["key"]) for key in entry["key_metadata"])
        for entry in entries
        if entry["value_metadata"]["value_type"] == kind
    }


def _is_other(kind: type) -> bool:
    return issubclass(kind, jax.Array) and kind is not LiftedArray


def register(get: Callable, add: Callable, codes: _Handler | None = None) -> None:
    """Registers a handler of lifted codes with Orbax; other arrays keep theirs.

    Args:
      get: returns the handler of a type.
      add: sets it.
      codes: the handler of lifted codes.
    """
    arrays, codes = get(jax.Array), codes or _Handler()

    class Arrays(type(arrays)):  # pyrefly: ignore[invalid-inheritance]
        """Restores codes where they were saved, even if a jax.Array is asked for."""

        async def deserialize(self, infos, args=None):
            args = args or [None] * len(infos)
            found: list[Tree] = [None] * len(infos)
            names = _saved_as(codes.typestr(), infos[0].parent_dir)
            for handler in (codes, arrays):
                chosen = [
                    i
                    for i, info in enumerate(infos)
                    if (info.name in names) is (handler is codes)
                ]
                some = [infos[i] for i in chosen], [args[i] for i in chosen]
                if chosen:
                    values = await handler.deserialize(*some)
                    for i, value in zip(chosen, values, strict=True):
                        found[i] = value
            return found

    both = copy.copy(arrays)
    both.__class__ = Arrays
    add(jax.Array, both, _is_other, override=True)
    add(LiftedArray, codes)


def register_v1(compatibility: Tree) -> None:
    """The same for ``orbax.checkpoint.v1``, which makes a list of handlers each time.

    Args:
      compatibility: the module that makes it, of handlers as in the version before.
    """
    make = compatibility.get_v0_type_handler_registry
    metadata_of_arrays = compatibility.array_leaf_handler.ArrayMetadata

    class Handler(_Handler):
        async def metadata(self, infos):
            return [
                compatibility.V0Metadata(
                    name=m.name,
                    directory=m.directory,
                    v1_metadata=metadata_of_arrays(
                        shape=m.shape,
                        dtype=m.dtype,
                        sharding_metadata=m.sharding,
                        storage_metadata=m.storage,
                    ),
                )
                for m in await super().metadata(infos)
            ]

    @wraps(make)
    def with_codes(*args, **kwargs):
        registry = make(*args, **kwargs)
        register(registry.get, registry.add, Handler())
        return registry

    compatibility.get_v0_type_handler_registry = with_codes
