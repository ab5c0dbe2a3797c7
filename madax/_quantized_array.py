"""Parameters that are codes of a number format."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madax._formats import Format


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
        return cls(codes, scale, aux)

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", self.codes)
        scale = self.scale
        if isinstance(scale, (jax.Array, np.ndarray)):
            traced = isinstance(scale, jax.core.Tracer)
            known = not traced and scale.ndim == 0
            scale = f"{float(scale):.6g}" if known else f"<{scale.shape}>"
        return f"QuantizedArray(shape={shape}, scale={scale}, {self.format!r})"


def is_quantized(x: Any) -> bool:
    """Whether a node of a tree is a quantised leaf."""
    return isinstance(x, QuantizedArray)
