"""Parameters stored as codes of a number format instead of floats."""

import dataclasses
import operator
import sys
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from madax._core.checks import check_copy
from madax._core.derivatives import with_derivative
from madax._core.numerics import rounded
from madax.codes._kind import Kind
from madax.formats._base import Format

_REMEDY = (
    "codes and scales must not be scaled, averaged or cast: use "
    "madax.dequantize_params(params), or put the transform inside "
    "madax.with_quantized_params(...). optax.apply_updates adds steps of codes, and "
    "madax.wrappers.multi_steps accumulates gradients for them."
)

_FLOAT32 = jnp.dtype(jnp.float32)

# Functions to call once Flax or Orbax is imported, which may be after madax or never. A
# key is a module and one of its attributes, which the function gets. Other modules of
# madax add entries.
AFTER_IMPORT: dict[tuple[str, str], Callable[[Any], object]] = {}


def notice_imports() -> None:
    """Calls the functions of ``AFTER_IMPORT`` whose library has been imported, once."""
    for module, attribute in list(AFTER_IMPORT):
        found = getattr(sys.modules.get(module), attribute, None)
        if found is not None:
            # A callback may make codes itself, and so come here again.
            callback = AFTER_IMPORT.pop((module, attribute), None)
            if callback is not None:
                callback(found)


# Attributes of arrays that a QuantizedArray has, too: read from its values, or from its
# codes if that needs no decoding. A formatted list would take a line for each.
_OF_VALUES = """
T all any argmax argmin argpartition argsort astype at clip compress conj conjugate
cumprod cumsum diagonal dot flat flatten imag item itemsize mT max mean min nonzero prod
ptp ravel real repeat reshape round searchsorted sort squeeze std sum swapaxes take
tobytes tolist trace transpose var view
""".split()  # noqa: SIM905
_OF_CODES = """
committed device devices is_deleted is_fully_addressable is_fully_replicated ndim
sharding size
""".split()  # noqa: SIM905


class _InErrors(type):
    """Puts the remedy into JAX's errors about trees that differ, which print types.

    An optimizer of floats fails in ``optax.apply_updates(codes, floats)``, where no
    other code of madax runs.
    """

    def __repr__(cls) -> str:
        return (
            f"<class 'madax.{cls.__name__}'> (codes, which an optimizer of floats "
            "trains inside madax.with_quantized_params)"
        )


def _by_value(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that applies a function of arrays to the decoded value."""
    return lambda self, *others: operation(self.dequantize(), *others)


def _both_ways(operation: Callable[..., Any]) -> tuple[Callable, Callable]:
    """Returns the methods of an operator with the codes on either side."""
    return _by_value(operation), lambda self, x: operation(x, self.dequantize())


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray(metaclass=_InErrors):
    """An array stored as integer codes of a number format.

    It replaces a weight. Operators, methods of arrays, ``jnp`` functions and layers of
    Flax decode it where they use it. Indexing decodes only the elements that it
    returns, so a look-up in a table of codes decodes a few rows. ``w[...]`` is an
    array, for functions that need one (functions of ``jax.lax``, and with JAX 0.6.0
    also sums). Use :func:`madax.value_and_grad` for derivatives: ``jax.grad`` has none
    for integers.

    It is a pytree node with two children, ``codes`` and ``scale``; the format and the
    dtype are static. Functions of trees see the two children. A change of their dtypes
    raises an error, and a scale that is not positive makes all values NaN, but a sum of
    two trees of codes goes unnoticed, and is not a sum of weights. Compute sums, norms
    and penalties on ``madax.dequantize_params(params)``.

    The update that an optimizer returns for it is another QuantizedArray, with steps
    instead of codes, False instead of the scale, and no value. ``optax.apply_updates``
    adds both. Steps have a wider dtype than codes, so a transform after the optimizer
    that changes them causes an error.

    Attributes:
      codes: signed codes, int8 or int16, any shape; steps are int32.
      scale: value of the max code, float32, of the rank of ``codes``: of size 1, or one
        per channel.
      format: the number format.
      value_dtype: floating dtype of the values.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> fmt = madax.LogFormat(bits=8, base_step=0.05)
      >>> w = madax.quantize_params(jnp.full((4, 4), -0.5), fmt)
      >>> print(w.codes.dtype, w.dtype, w.nbytes, "bytes")
      int8 float32 20 bytes
      >>> print(f"{w[0, 0]:.3f} {jnp.sum(w @ w):.2f}")
      -0.499 15.96
    """

    codes: jax.Array
    scale: jax.Array
    format: Format
    value_dtype: jnp.dtype = _FLOAT32

    # Makes NumPy's arrays defer to the operators of this class.
    __array_priority__ = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dtype", jnp.dtype(self.value_dtype))
        notice_imports()

    @classmethod
    def steps(
        cls,
        delta: jax.Array,
        format: Format,
        value_dtype: jnp.dtype = _FLOAT32,
    ) -> "QuantizedArray":
        """The update by which ``optax.apply_updates`` adds integers to codes."""
        no_scale: Any = False
        return cls(delta.astype(format.step_dtype), no_scale, format, value_dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values; for steps, an integer dtype."""
        steps = self.codes.dtype == self.format.step_dtype
        return self.format.step_dtype if steps else self.value_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scale together."""
        # Steps have the Python value False as their scale.
        return self.codes.nbytes + getattr(self.scale, "nbytes", 0)

    def dequantize(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """The values of the codes, an array of their shape.

        Args:
          dtype: floating dtype of the result; None for ``value_dtype``.

        Raises:
          TypeError: if these are steps, which have no value.
        """
        self.check_has_value()
        return self._value().astype(self.dtype if dtype is None else dtype)

    def check_has_codes(self) -> None:
        """Raises if the children are not arrays, as after a mask."""
        if not hasattr(self.codes, "dtype"):
            raise TypeError(
                f"a QuantizedArray holds {self.codes!r} instead of codes, and "
                f"{self.scale!r} instead of the scale; masks and labels are for "
                "whole QuantizedArrays: use a tree by path, or jax.tree.map(..., "
                "is_leaf=lambda x: isinstance(x, madax.QuantizedArray))."
            )

    def check_has_value(self) -> None:
        """Raises if these are steps of codes, or no arrays, and so have no value."""
        self.check_has_codes()
        if self.codes.dtype == self.format.step_dtype:
            raise TypeError(f"{self!r} was used as a number; {_REMEDY}")

    def copy(self) -> "QuantizedArray":
        """Returns the same codes and scale in new buffers."""
        return jax.tree.map(lambda x: x.copy(), self)

    def block_until_ready(self) -> "QuantizedArray":
        """Waits for the codes and the scale to be computed."""
        return jax.block_until_ready(self)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_VALUES:
            return getattr(self.dequantize(), name)
        if name in _OF_CODES:
            return getattr(self.codes, name)
        raise AttributeError(
            f"a {type(self).__name__} has no {name!r}; use its values, w[...], for "
            "attributes of arrays."
        )

    def __getitem__(self, index: Any) -> jax.Array:
        """The values at an index; decodes no other codes."""
        self.check_has_value()
        return self._at(index).dequantize()

    def __setitem__(self, index: object, value: object) -> None:
        raise TypeError(
            "a QuantizedArray cannot be written to; use w.at[...].set(x) for an array "
            "of changed values, madax.quantize_params for its codes, and replace the "
            "old ones, in an nnx.Variable by its set_value."
        )

    def __len__(self) -> int:
        return len(self.codes)

    def __array__(self, dtype=None, copy: bool | None = None) -> np.ndarray:
        check_copy(copy)
        return np.asarray(self.dequantize(), dtype)

    __jax_array__ = dequantize
    __iter__ = _by_value(iter)
    __int__ = _by_value(int)
    __float__ = _by_value(float)
    __bool__ = _by_value(bool)
    __add__, __radd__ = _both_ways(operator.add)
    __sub__, __rsub__ = _both_ways(operator.sub)
    __mul__, __rmul__ = _both_ways(operator.mul)
    __truediv__, __rtruediv__ = _both_ways(operator.truediv)
    __floordiv__, __rfloordiv__ = _both_ways(operator.floordiv)
    __mod__, __rmod__ = _both_ways(operator.mod)
    __pow__, __rpow__ = _both_ways(operator.pow)
    __matmul__, __rmatmul__ = _both_ways(operator.matmul)
    __neg__ = _by_value(operator.neg)
    __pos__ = _by_value(operator.pos)
    __abs__ = _by_value(operator.abs)
    __lt__ = _by_value(operator.lt)
    __le__ = _by_value(operator.le)
    __gt__ = _by_value(operator.gt)
    __ge__ = _by_value(operator.ge)
    __eq__ = _by_value(operator.eq)
    __ne__ = _by_value(operator.ne)
    __hash__ = None  # type: ignore[assignment]

    def parts(self) -> dict[str, jax.Array]:
        """The codes and the scale by their names in files.

        The name of the codes contains their format: codes restored in another format
        would be silently wrong.
        """
        return {f"codes:{self.kind}": self.codes, "scale": self.scale}

    @property
    def kind(self) -> Kind:
        """The format and the dtype of the values."""
        return Kind(self.format, self.value_dtype)

    def like(self, codes: jax.Array, scale: jax.Array) -> "QuantizedArray":
        """Returns other codes and scales with the same format and dtype."""
        return QuantizedArray(codes, scale, *self.kind)

    def tree_flatten_with_keys(self) -> tuple[tuple, Kind]:
        key = jax.tree_util.GetAttrKey
        return tuple((key(k), part) for k, part in self.parts().items()), self.kind

    @classmethod
    def tree_unflatten(cls, aux: Kind, children: Any) -> "QuantizedArray":
        codes, scale, *others = children
        # Otherwise an average or a rescaling of codes would pass for one of weights.
        dtypes = [getattr(x, "dtype", type(x)) for x in (codes, scale)]
        if dtypes[0] == jax.dtypes.float0:
            raise TypeError(
                "a derivative was taken with respect to the codes of a QuantizedArray, "
                "which are integers; use madax.value_and_grad or madax.grad."
            )
        if codes is None and isinstance(dtypes[1], np.dtype):
            raise TypeError(
                "a QuantizedArray has a scale but no codes, as after a filter of "
                "floating arrays; a scale is not trained: use madax.value_and_grad for "
                "gradients, and filter all arrays, as by equinox.is_array, or whole "
                "QuantizedArrays."
            )
        if not aux.has_dtypes(*dtypes):
            raise TypeError(
                f"the codes of a QuantizedArray became {_name(dtypes[0])}, and its "
                f"scale {_name(dtypes[1])}; {_REMEDY}"
            )
        if isinstance(scale, jax.Array) and dtypes[1] == np.bool_:
            # An array that jax.vmap made of False, the mark of steps, would not fit the
            # scales of a stack.
            scale = False
        return cls(codes, scale, *aux, *others)

    def _value(self) -> jax.Array:
        # The product is rounded, because a sum of the caller might be fused with it. A
        # scale that is not positive means that arithmetic treated the tree as weights.
        traced = isinstance(self.scale, jax.core.Tracer)
        scale = _constant(self.scale) if traced else self.scale
        scale = jnp.where(scale > 0, scale, jnp.nan)
        return rounded(scale * self.format.decode(self.codes))

    def _at(self, index: Any) -> "QuantizedArray":
        """The codes at an index, with their scales."""
        scale = _index_scale(self.scale, self.shape, index)
        return self.like(self.codes[index], scale)

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", self.codes)
        scale = self.scale
        if isinstance(scale, (jax.Array, np.ndarray)):
            traced = isinstance(scale, jax.core.Tracer)
            known = not traced and scale.size == 1
            scale = f"{scale.item():.6g}" if known else f"<{scale.shape}>"
        return f"QuantizedArray(shape={shape}, scale={scale}, {self.kind})"


def _refuse(*_: object) -> jax.Array:
    raise TypeError(
        "a derivative was taken with respect to the scale of a QuantizedArray, which "
        "is a constant, as by a filter of floating arrays; use madax.value_and_grad or "
        "madax.grad, and filter whole QuantizedArrays."
    )


@with_derivative(_refuse)
def _constant(scale: jax.Array) -> jax.Array:
    """Returns the scale, which an optimizer of floats would silently train alone."""
    return scale


def _index_scale(scale: jax.Array, shape: tuple[int, ...], index: Any) -> jax.Array:
    """Like ``broadcast_to(scale, shape)[index]``; axes of a single scale stay 1."""
    if np.size(scale) == 1:
        return jnp.reshape(scale, ())
    scale = jnp.reshape(scale, (*[1] * (len(shape) - np.ndim(scale)), *np.shape(scale)))
    index = index if isinstance(index, tuple) else (index,)
    if any(getattr(i, "dtype", type(i)) in (bool, np.bool_) for i in index):
        return jnp.broadcast_to(scale, shape)[index]
    missing = len(shape) - sum(i is not None and i is not Ellipsis for i in index)
    where = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    whole = (slice(None),) * missing
    index = (*index[:where], *whole, *index[where + 1 :])
    sizes = iter(zip(scale.shape, shape, strict=True))
    return scale[tuple(i if i is None else _index_axis(i, *next(sizes)) for i in index)]


def _index_axis(index: Any, scales: int, size: int) -> Any:
    """Returns the index of scales on an axis, which may have one scale for all."""
    if scales == size:
        return index
    return slice(None) if isinstance(index, slice) else jnp.zeros_like(index)


def _name(dtype: object) -> str:
    return getattr(dtype, "__name__", str(dtype))


jax.export.register_pytree_node_serialization(
    QuantizedArray,
    serialized_name="madax.QuantizedArray",
    serialize_auxdata=lambda kind: str(kind).encode(),
    deserialize_auxdata=lambda text: Kind.parse(bytes(text).decode()),
)


# A leaf of parameters.
Leaf: TypeAlias = jax.Array | QuantizedArray


def is_quantized(x: object) -> TypeGuard[QuantizedArray]:
    """Whether a node of a tree is a quantised leaf."""
    return isinstance(x, QuantizedArray)


def lowered(leaf: Any) -> Any:
    """Returns the codes of a leaf that ``madax.hijax`` lifted; any other as it is."""
    return leaf.lowered() if hasattr(leaf, "lowered") else leaf
