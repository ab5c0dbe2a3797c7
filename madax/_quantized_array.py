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
    "put the transform inside madax.with_quantized_params(...). Steps of codes are "
    "added by optax.apply_updates, as they are."
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array stored as integer codes of a number format.

    A pytree node with two children, ``codes`` and ``scale``; the format is static.
    What an optimizer returns for one is another, with steps of codes in the place of
    codes and False in that of the scale. Under ``optax.apply_updates`` both are added
    as they are. Steps have a wider dtype than codes, so that whatever comes between
    and makes something else of one or the other does not fit together: an error.

    Attributes:
      codes: signed codes, int8 or int16, any shape; steps of them are int16 or int32.
      scale: value of the largest code, float32, of the rank of ``codes``: of size 1,
        or one a channel.
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

    @classmethod
    def steps(cls, delta: jax.Array, format: Format) -> "QuantizedArray":
        """The update that adds ``delta``, integers, to the codes of a format.

        Args:
          delta: steps of codes, any integer dtype, the shape of the codes.
          format: the number format.

        Returns:
          The update, to be added by ``optax.apply_updates``.
        """
        return cls(delta.astype(format.step_dtype), False, format)

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
        return self.codes.nbytes + np.asarray(self.scale).nbytes

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
        dtypes = [getattr(x, "dtype", type(x)) for x in children]
        if not _fit(dtypes[0], dtypes[1], aux):
            raise TypeError(
                f"the codes of a QuantizedArray became {dtypes[0]}, and its scale "
                f"{dtypes[1]}; {_REMEDY}"
            )
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
            known = not traced and scale.size == 1
            scale = f"{scale.item():.6g}" if known else f"<{scale.shape}>"
        return f"QuantizedArray(shape={shape}, scale={scale}, {self.format!r})"


def _fit(codes: Any, scale: Any, format: Format) -> bool:
    """Whether dtypes are those of an array of the format, or of steps of its codes.

    Trees of anything but arrays of numbers, as of masks, shapes and shardings, do.
    """
    if not isinstance(codes, np.dtype) or not jnp.issubdtype(codes, np.number):
        return True
    if scale in (bool, np.bool_):
        return codes == format.step_dtype
    number = isinstance(scale, np.dtype) or scale in (int, float)
    return not number or (
        codes == format.storage_dtype and jnp.issubdtype(scale, np.floating)
    )


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
