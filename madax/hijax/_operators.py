"""Lifted codes where an array is expected: they decode, except for ``p + steps``."""

import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import hijax

from madax._core.names import Tree
from madax.codes._array import QuantizedArray
from madax.hijax._primitives import decode, lift_array, lower_array
from madax.hijax._values import CodesType, LiftedArray, is_lifted

# What ShapedArray has in order to make arrays, or what a LiftedArray has itself.
_OTHER = {"__new__", "_create", "_array_module", "_copy", "_deepcopy", "copy"}
# Where an update is added to weights by others.
_APPLIERS = ("optax", "equinox._update")


class _Stepped(jax.Array):
    """New codes on their way through ``jnp.asarray(p + u).astype(p.dtype)`` of optax.

    ``jnp.asarray`` returns a ``jax.Array`` as it is, where it would decode codes. In a
    tree, as where ``p + u`` is all, this is a node, which becomes the codes themselves.
    """

    def __init__(self, value: LiftedArray):
        self.value = value

    aval = property(lambda self: self.value.aval)
    dtype = property(lambda self: self.value.dtype)
    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: self.value.size)
    sharding = property(lambda self: self.value.sharding)
    weak_type = False

    def astype(self, *args: object, **kwargs: object) -> LiftedArray:
        return self.value


jax.tree_util.register_pytree_node(
    _Stepped, lambda x: ((x.value,), None), lambda _, children: children[0]
)


def _value(x: Tree) -> Tree:
    return decode(x) if is_lifted(x) else x


def _sum(x, other):
    """Steps of codes are integers of their shape; all else is added to the value."""
    dtype, shape = getattr(other, "dtype", None), getattr(other, "shape", None)
    is_array = shape == x.shape and not is_lifted(other)
    if is_array and dtype == jax.typeof(x).number_format.step_dtype:
        w = lower_array(x)
        codes = (w.codes + other).astype(w.codes.dtype)
        stepped = QuantizedArray(codes, w.scale, w.format)
        return _Stepped(lift_array(stepped, x.dtype))
    if _caller().startswith(_APPLIERS):
        raise TypeError(
            f"the update of {x!r} is {other!r}, which would make floats of the codes; "
            "wrap the optimizer in madax.hijax.optimizer, one of floats in "
            "madax.with_quantized_params before, and change no update after it."
        )
    return decode(x) + _value(other)


def _caller() -> str:
    """The name of the module that added to a value."""
    frame, name = sys._getframe(2), ""
    while frame and (name := frame.f_globals["__name__"]).startswith(("jax.", "madax.")):
        frame = frame.f_back
    return name


def _item(x, index):
    # With an ellipsis alone it is the value of an nnx.Variable, decoded where it is
    # used.
    return x if index is Ellipsis else decode(x)[index]


def _setitem(x, index, value):
    raise TypeError(
        "lifted codes cannot be written to; use w.at[...].set(x) for an array of "
        "changed values, and madax.quantize_params and madax.hijax.lift for its codes."
    )


def _of_value(function: Callable) -> Callable:
    return lambda x, *args, **kwargs: function(decode(x), *map(_value, args), **kwargs)


def _install() -> None:
    """Every operator, method and property of arrays, for values and for tracers."""

    def operator(name: str, function: Callable) -> None:
        setattr(CodesType, name, staticmethod(function))
        setattr(LiftedArray, f"_{name}__", function)
        setattr(_Stepped, f"_{name}__", lambda x, *args: function(x.value, *args))

    def method(name: str, function: Callable) -> None:
        setattr(CodesType, name, hijax.aval_method(function))
        setattr(LiftedArray, name, function)

    for name, kind in list(vars(hijax.ShapedArray).items()):
        if name in _OTHER:
            continue
        if isinstance(kind, staticmethod):
            operator(name, _of_value(kind.__func__))
        elif isinstance(kind, hijax.aval_method):
            method(name, _of_value(kind.fun))
        elif isinstance(kind, hijax.aval_property) and not hasattr(CodesType, name):
            get = _of_value(kind.fget)
            setattr(CodesType, name, hijax.aval_property(get))
            if name not in vars(LiftedArray):
                setattr(LiftedArray, name, property(get))
    operator("_add", _sum)
    operator("_getitem", _item)
    operator("_setitem", _setitem)
    method("__jax_array__", decode)
    method("copy", LiftedArray.copy)
    CodesType._copy = CodesType._deepcopy = staticmethod(lambda x, *memo: x)
    for kind in (bool, int, float, complex):
        setattr(LiftedArray, f"__{kind.__name__}__", _of_value(kind))
    LiftedArray.__array__ = lambda x, dtype=None, copy=None: np.asarray(
        decode(x), dtype
    )


_install()
