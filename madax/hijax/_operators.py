"""Array operators of lifted codes: all decode, except ``p + steps``."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.checks import check_copy, is_lifted
from madax._core.names import Tree
from madax.hijax._jax import Array, ShapedArray, method, property_
from madax.hijax._primitives import decode_array, lift_array, lower_array
from madax.hijax._values import CodesType, LiftedArray

# Attributes that ShapedArray has for other purposes, or that lifted codes define.
_OTHER = {"__new__", "_create", "_array_module", "_copy", "_deepcopy", "copy"}
# Modules that add updates to weights.
_APPLIERS = ("optax.", "equinox._update")


class _Stepped(Array):
    """Carries new codes through optax's ``jnp.asarray(p + u).astype(p.dtype)``.

    ``jnp.asarray`` returns a ``jax.Array`` unchanged, but would decode codes. Where a
    loop uses plain ``p + u``, this is a node of the tree, and unflattening it returns
    the codes.
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


def install() -> None:
    """Gives lifted codes and their tracers every operator and method of arrays.

    The list of operators, methods and properties comes from JAX.
    """
    for name, kind in list(vars(ShapedArray).items()):
        if name in _OTHER:
            continue
        if isinstance(kind, staticmethod):
            _operator(name, _of_value(kind.__func__))
        elif isinstance(kind, method):
            _method(name, _of_value(kind.fun))
        elif isinstance(kind, property_) and not hasattr(CodesType, name):
            get = _of_value(kind.fget)
            setattr(CodesType, name, property_(get))
            if name not in vars(LiftedArray):
                setattr(LiftedArray, name, property(get))
    _operator("_add", _add)
    _operator("_getitem", _getitem)
    _operator("_setitem", _setitem)
    _method("__jax_array__", decode_array)
    setattr(CodesType, "_len", lambda self, _: self.shape[0])  # noqa: B010
    setattr(LiftedArray, "__iter__", _of_value(iter))  # noqa: B010
    for name in ("_copy", "_deepcopy"):
        setattr(CodesType, name, staticmethod(lambda x, *memo: x))
    setattr(CodesType, "copy", method(lambda x: x))  # noqa: B010
    setattr(CodesType, "lowered", method(lower_array))  # noqa: B010
    for kind in (bool, int, float, complex):
        setattr(LiftedArray, f"__{kind.__name__}__", _of_value(kind))
    setattr(LiftedArray, "__array__", _to_numpy)  # noqa: B010


def _operator(name: str, function: Callable) -> None:
    setattr(CodesType, name, staticmethod(function))
    setattr(LiftedArray, f"_{name}__", function)
    setattr(_Stepped, f"_{name}__", lambda x, *args: function(x.value, *args))


def _method(name: str, function: Callable) -> None:
    setattr(CodesType, name, method(function))
    setattr(LiftedArray, name, function)


def _of_value(function: Callable) -> Callable:
    return lambda x, *args, **kwargs: function(
        decode_array(x), *map(_value, args), **kwargs
    )


def _value(x: Tree) -> Tree:
    return decode_array(x) if is_lifted(x) else x


def _add(x: LiftedArray, other: Tree) -> Tree:
    """Returns new codes if ``other`` holds integer steps, or else a sum of floats."""
    of_shape = getattr(other, "shape", None) == x.shape and not is_lifted(other)
    if of_shape and other.dtype == jax.typeof(x).number_format.step_dtype:
        w = lower_array(x)
        codes = (w.codes + other).astype(w.codes.dtype)
        return _Stepped(lift_array(w.like(codes, w.scale), x.dtype))
    if _caller().startswith(_APPLIERS):
        raise TypeError(
            f"the update of {jax.typeof(x).str_short()} is {jnp.result_type(other)}, "
            "which would make floats of codes; wrap the optimizer in "
            "madax.hijax.optimizer, one of floats in madax.with_quantized_params "
            "inside it, and transform no update after it."
        )
    return decode_array(x) + _value(other)


def _to_numpy(x, dtype=None, copy=None):
    check_copy(copy)
    return np.asarray(decode_array(x), dtype)


def _caller() -> str:
    """Returns the name of the module that called the operator."""
    frame, name = sys._getframe(2), ""
    while frame and (name := frame.f_globals["__name__"]).startswith(
        ("jax.", "madax.")
    ):
        frame = frame.f_back
    return name


def _getitem(x: LiftedArray, index: Tree) -> Tree:
    # x[...] is how nnx.Variable reads its value, which is decoded later, at its use.
    return x if index is Ellipsis else decode_array(x)[index]


def _setitem(x: LiftedArray, index: Tree, value: Tree) -> None:
    raise TypeError(
        "lifted codes cannot be written to; use w.at[...].set(x) for an array of "
        "changed values, and madax.quantize_params and madax.hijax.lift for its codes."
    )
