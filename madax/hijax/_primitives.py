"""The three things that are done to lifted codes: made, taken apart, and decoded."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from madax.codes._array import QuantizedArray
from madax.hijax._jax import Primitive
from madax.hijax._values import CodesType, LiftedArray, type_of


class _Decode(Primitive):
    """The floats of codes; its derivative is the identity."""

    def __init__(self, kind: CodesType):
        self.in_avals, self.out_aval = (kind,), kind.to_tangent_aval()
        self.params = {"kind": kind}
        super().__init__()

    def expand(self, x):
        return x.lowered().dequantize(x.dtype)

    def vjp_fwd(self, nzs_in, /, x):
        return decode_array(x), None

    def vjp_bwd_retval(self, res, outgrad, /):
        return (outgrad,)

    def jvp(self, primals, tangents):
        return decode_array(*primals), tangents[0]

    def lin(self, nzs_in, x):
        return decode_array(x), None

    def linearized(self, residuals, tangent):
        return tangent

    def batch(self, axis_data, args, dims):
        return decode_array(*args), *dims


class _Parts(Primitive):
    """The codes and the scale, which are integers and a constant."""

    def __init__(self, kind: CodesType):
        self.in_avals, self.out_aval = (kind,), tuple(kind.lo_ty())
        self.params = {"kind": kind}
        super().__init__()

    def expand(self, x):
        return x.codes, x.scale

    def vjp_fwd(self, nzs_in, /, *args):
        # A derivative of zero would be wrong without a word.
        raise TypeError(
            "madax.hijax.lower, put or an update was called on codes inside a "
            "derivative, which it does not have; call it outside, and use the codes "
            "as they are inside."
        )

    jvp = lin = vjp_fwd

    def batch(self, axis_data, args, dims):
        return _parts(*args), (*dims, *dims)


class _Lift(Primitive):
    """A lifted array of codes and a scale."""

    def __init__(self, kind: CodesType):
        self.in_avals, self.out_aval = tuple(kind.lo_ty()), kind
        self.params = {"kind": kind}
        super().__init__()

    def expand(self, codes, scale):
        return self.kind.raise_val(codes, scale)

    def batch(self, axis_data, args, dims):
        codes, scale = (
            jnp.broadcast_to(x, (axis_data.size, *x.shape))
            if dim is None
            else jnp.moveaxis(x, dim, 0)
            for x, dim in zip(args, dims, strict=True)
        )
        return _lifted(codes, scale, self.kind.number_format, self.kind.dtype), 0


def decode_array(x: LiftedArray) -> jax.Array:
    """The array that lifted codes decode to, with a derivative."""
    return _Decode(jax.typeof(x))(x)


def lower_array(x: LiftedArray) -> QuantizedArray:
    """The codes of a lifted array, which have no derivative."""
    codes, scale = _parts(x)
    return QuantizedArray(codes, scale, jax.typeof(x).number_format, x.dtype)


def lift_array(w: QuantizedArray, dtype: DTypeLike) -> LiftedArray:
    """A lifted array of codes, which decodes to a dtype."""
    w.check_has_value()
    return _lifted(w.codes, w.scale, w.format, jnp.dtype(dtype))


def _parts(x):
    return _Parts(jax.typeof(x))(x)


def _lifted(codes, scale, number_format, dtype):
    return _Lift(type_of(codes, scale, number_format, dtype))(codes, scale)
