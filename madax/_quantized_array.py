"""Parameters that are codes of a number format."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from madax._formats import Format

_REMEDY = (
    "codes are not to be scaled or averaged: use madax.dequantize_params(params), or "
    "put the transform inside madax.with_quantized_params(...)."
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array stored as integer codes of a number format.

    A pytree node with two children, ``codes`` and ``scale``; the format is static.
    Two of them add code by code, so a tree of code steps adds to a tree of
    parameters under plain ``optax.apply_updates``.

    Attributes:
      codes: signed codes, int8 or int16, any shape.
      scale: value of the largest code, float32; a scalar, or one a channel, with a
        shape that broadcasts against ``codes``.
      format: the number format.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> fmt = madax.LogFormat(bits=8, base_step=0.05)
      >>> w = madax.quantize_params(jnp.full((4, 4), -0.5), fmt)
      >>> w
      QuantizedArray(shape=(4, 4), scale=1.5, LogFormat(bits=8, base_step=0.05))
      >>> print(f"{w.nbytes} bytes, w[0, 0] = {w.dequantize()[0, 0]:.3f}")
      20 bytes, w[0, 0] = -0.499
    """

    codes: Any
    scale: Any
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scale together."""
        return self.codes.nbytes + self.scale.nbytes

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The values of the codes.

        Args:
          dtype: floating dtype of the result; float32 by default.

        Returns:
          An array of the shape of the codes.
        """
        value = self.scale * self.format.decode(self.codes)
        return value.astype(jnp.float32 if dtype is None else dtype)

    def tree_flatten_with_keys(self) -> Any:
        # The format is part of the key, so that a checkpoint's names tell formats
        # apart: codes restored as another format's would be silent nonsense.
        codes_key = jax.tree_util.GetAttrKey(f"codes:{self.format!r}")
        children = (
            (codes_key, self.codes),
            (jax.tree_util.GetAttrKey("scale"), self.scale),
        )
        return children, self.format

    @classmethod
    def tree_unflatten(cls, aux: Format, children: Any) -> "QuantizedArray":
        codes, scale = children
        # Where an average or a rescaling of codes would slip in as one of weights.
        dtype = getattr(codes, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"the codes of a QuantizedArray became {dtype}; {_REMEDY}")
        return cls(codes, scale, aux)

    def _no_arithmetic(self, *_: Any) -> Any:
        raise TypeError(f"{self!r} was used as a number; {_REMEDY}")

    __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _no_arithmetic
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _no_arithmetic

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", self.codes)
        scale = self.scale
        if isinstance(scale, (jax.Array, np.ndarray)):
            traced = isinstance(scale, jax.core.Tracer)
            known = not traced and scale.ndim == 0
            scale = f"{float(scale):.6g}" if known else f"<{scale.shape}>"
        return f"QuantizedArray(shape={shape}, scale={scale}, {self.format!r})"


def _serialize(format: Format) -> bytes:
    fields = dataclasses.asdict(format)
    return json.dumps([type(format).__name__, fields]).encode()


def _deserialize(data: bytes) -> Format:
    name, fields = json.loads(data)
    formats: dict[str, Any] = {kind.__name__: kind for kind in Format.__subclasses__()}
    return formats[name](**fields)


jax.export.register_pytree_node_serialization(
    QuantizedArray,
    serialized_name="madax.QuantizedArray",
    serialize_auxdata=_serialize,
    deserialize_auxdata=_deserialize,
)


def is_quantized(x: Any) -> bool:
    """Whether a node of a tree is a quantised leaf."""
    return isinstance(x, QuantizedArray)
