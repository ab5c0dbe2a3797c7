"""The JAX type of lifted codes, and its values.

JAX asks such a type which arrays represent a value in a compiled program (here codes
and a scale), and for the type of its tangents (here floats).
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from madax._core.names import Tree
from madax.codes._array import QuantizedArray
from madax.formats._base import Format
from madax.hijax._jax import Array, HiType, ShapedArray, register

# JAX and other libraries print the type or the class when they refuse a value.
REMEDY = (
    "codes of madax.hijax: pass madax.hijax.decode(w) to functions of jax.lax, place w "
    "by madax.hijax.put, and take madax.hijax.lower(w) for everything else"
)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class CodesType(HiType):
    """The type of an array of codes, with float tangents of the same shape.

    Attributes:
      codes: the type of the codes.
      scale: the type of the scale.
      number_format: the number format. A ``jax.Array`` has another ``format``.
      dtype: dtype of the decoded array, of tangents and of gradients.
    """

    codes: ShapedArray
    scale: ShapedArray
    number_format: Format
    dtype: jnp.dtype

    weak_type = False
    shape = property(lambda self: self.codes.shape)
    ndim = property(lambda self: self.codes.ndim)
    size = property(lambda self: self.codes.size)
    sharding = property(lambda self: self.codes.sharding)
    # JAX 0.10 reads this from the results of scan and cond; newer versions do not.
    mat = property(lambda self: self.codes.mat)

    @cached_property
    def _key(self) -> tuple:
        key = self.codes, self.scale, self.number_format, self.dtype
        return (hash(key), *key)

    def __hash__(self) -> int:
        return self._key[0]

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, CodesType) and self._key == other._key
        )

    def lo_ty(self) -> list[ShapedArray]:
        return [self.codes, self.scale]

    def lower_val(self, hi_val: "LiftedArray") -> list[jax.Array]:
        return [hi_val.codes, hi_val.scale]

    def raise_val(self, codes: jax.Array, scale: jax.Array) -> "LiftedArray":
        return LiftedArray(codes, scale, self)

    @cached_property
    def _tangent(self) -> ShapedArray:
        return self.codes.update(dtype=self.dtype)

    def to_tangent_aval(self) -> ShapedArray:
        return self._tangent

    def dec_rank(self, size: int | None, spec: int | None) -> "CodesType":
        """Returns the type of one slice in ``vmap`` or ``scan``."""
        if spec is None:
            return self
        if self.scale.shape[spec] != size:
            raise ValueError(
                f"codes of shape {self.shape} with a scale of shape "
                f"{self.scale.shape} are mapped or scanned along axis {spec}, which "
                f"takes a scale for each of the {size} slices; pass "
                f"channel_axis={spec} to madax.quantize_params."
            )
        parts = (_resized(part, spec, 1, ()) for part in self.lo_ty())
        return codes_type(*parts, self.number_format, self.dtype)

    def inc_rank(self, size: int | None, spec: int | None) -> "CodesType":
        """Returns the type of a stack of values of this type."""
        if spec is None:
            return self
        parts = (_resized(part, spec, 0, (size,)) for part in self.lo_ty())
        return codes_type(*parts, self.number_format, self.dtype)

    def leading_axis_spec(self) -> int:
        return 0

    def shard(self, *args: object) -> "CodesType":
        raise TypeError(
            "codes of madax.hijax cannot go into jax.shard_map; pass "
            "madax.hijax.lower(params), and take madax.value_and_grad inside."
        )

    unshard = nospec = shard

    def update(self, **kwargs: object) -> "CodesType":
        raise TypeError(f"a function of jax.lax got {self!r}.")

    def str_short(self, *args: object, **kwargs: object) -> str:
        shape = ",".join(map(str, self.shape))
        return f"codes{self.number_format.bits}[{shape}]"

    def __repr__(self) -> str:
        return f"{self.str_short()} ({REMEDY})"


# Interned, because JAX compares types at every call.
codes_type = lru_cache(maxsize=4096)(CodesType)


def _resized(
    part: ShapedArray, axis: int, drop: int, sizes: Sequence[int | None]
) -> ShapedArray:
    """Returns the type with ``sizes`` in place of ``drop`` axes."""
    shape = (*part.shape[:axis], *sizes, *part.shape[axis + drop :])
    on = part.sharding
    spec = [*on.spec, *[None] * (part.ndim - len(on.spec))]
    spec[axis : axis + drop] = [None] * len(sizes)
    on = NamedSharding(on.mesh, PartitionSpec(*spec))
    return part.update(shape=shape, sharding=on)


class _InErrors(type(jax.Array)):
    def __repr__(cls) -> str:
        return f"<class '{cls.__name__}'> ({REMEDY})"


class LiftedArray(Array, metaclass=_InErrors):
    """Codes and a scale outside of tracing.

    ``_operators`` adds the operators, methods and ``__jax_array__`` of the decoded
    array.
    """

    def __init__(self, codes: jax.Array, scale: jax.Array, kind: CodesType):
        self.codes, self.scale, self.aval = codes, scale, kind

    weak_type = False
    dtype = property(lambda self: self.aval.dtype)
    shape = property(lambda self: self.codes.shape)
    ndim = property(lambda self: self.codes.ndim)
    size = property(lambda self: self.codes.size)
    nbytes = property(lambda self: self.codes.nbytes + self.scale.nbytes)
    itemsize = property(lambda self: self.codes.itemsize)
    sharding = property(lambda self: self.codes.sharding)
    committed = property(lambda self: self.codes.committed)
    is_fully_addressable = property(lambda self: self.codes.is_fully_addressable)
    is_fully_replicated = property(lambda self: self.codes.is_fully_replicated)

    @property
    def val(self) -> jax.Array:
        """An error, as JAX reads it where a ``jax.lax`` function gets the codes."""
        raise TypeError(f"a function of jax.lax got {self.aval!r}.")

    def is_deleted(self) -> bool:
        return self.codes.is_deleted()

    def delete(self) -> None:
        self.codes.delete()
        self.scale.delete()

    def devices(self) -> set[jax.Device]:
        return self.codes.devices()

    def block_until_ready(self) -> "LiftedArray":
        jax.block_until_ready((self.codes, self.scale))
        return self

    def copy_to_host_async(self) -> None:
        self.codes.copy_to_host_async()
        self.scale.copy_to_host_async()

    def copy(self) -> "LiftedArray":
        return LiftedArray(self.codes.copy(), self.scale.copy(), self.aval)

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> "LiftedArray":
        return self.copy()

    def __reduce__(self) -> tuple:
        return lifted, (self.lowered(), self.dtype)

    def lowered(self) -> QuantizedArray:
        """Returns the same codes and scale as a :class:`QuantizedArray`."""
        kind = self.aval.number_format, self.dtype
        return QuantizedArray(self.codes, self.scale, *kind)

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return f"LiftedArray({self.aval.str_short()}, {self.aval.number_format!r})"


def type_of(
    codes: jax.Array, scale: jax.Array, format: Format, dtype: Tree
) -> CodesType:
    """Returns the lifted type of codes."""
    return codes_type(jax.typeof(codes), jax.typeof(scale), format, dtype)


def lifted(w: QuantizedArray, dtype: jnp.dtype | None = None) -> LiftedArray:
    """Lifts codes outside of tracing."""
    kind = type_of(w.codes, w.scale, w.format, dtype or w.value_dtype)
    return LiftedArray(w.codes, w.scale, kind)


register(LiftedArray, lambda x: x.aval)
