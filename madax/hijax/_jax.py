"""What is used of ``jax.experimental.hijax``, which changes from version to version."""

from typing import Any

import jax
from jax.experimental import hijax

HiType: Any = hijax.HiType
ShapedArray: Any = hijax.ShapedArray
# JAX 0.12 renamed it. The methods that are used of it have not changed since 0.10.
Primitive: Any = getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive")  # noqa: B009
# A base that may set its own attributes.
Array: Any = jax.Array

register = hijax.register_hitype
method, property_ = hijax.aval_method, hijax.aval_property
