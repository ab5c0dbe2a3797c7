"""The three primitives of lifted codes: lift, take apart, and decode."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from madax.codes._array import QuantizedArray
from madax.hijax._jax import Primitive
from madax.hijax._values import CodesType, LiftedArray, type_of


class _Decode(Primitive):
    """Decodes lifted codes; the derivative is the identity."""

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
    """Returns the codes and the scale, neither of which has a derivative."""

    def __init__(self, kind: CodesType):
        self.in_avals, self.out_aval = (kind,), tuple(kind.lo_ty())
        self.params = {"kind": kind}
        super().__init__()

    def expand(self, x):
        return x.codes, x.scale

    def vjp_fwd(self, nzs_in, /, *args):
        # A derivative of zero would be silently wrong.
        raise TypeError(
            "madax.hijax.lower, put or an update of an optimizer was called on codes "
            "that are being differentiated, and has no derivative; call it outside, "
            "and use the lifted codes inside."
        )

    jvp = lin = vjp_fwd

    def batch(self, axis_data, args, dims):
        return _parts(*args), (*dims, *dims)


class _Lift(Primitive):
    """Makes a lifted array of codes and a scale."""

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
    """Decodes lifted codes, with a derivative."""
    return _Decode(jax.typeof(x))(x)


def lower_array(x: LiftedArray) -> QuantizedArray:
    """Returns the :class:`QuantizedArray` of lifted codes, without a derivative."""
    codes, scale = _parts(x)
    return QuantizedArray(codes, scale, jax.typeof(x).number_format, x.dtype)


def lift_array(w: QuantizedArray, dtype: DTypeLike) -> LiftedArray:
    """Lifts codes, to be decoded to a dtype."""
    w.check_has_value()
    return _lifted(w.codes, w.scale, w.format, jnp.dtype(dtype))


def _parts(x):
    return _Parts(jax.typeof(x))(x)


def _lifted(codes, scale, number_format, dtype):
    return _Lift(type_of(codes, scale, number_format, dtype))(codes, scale)
