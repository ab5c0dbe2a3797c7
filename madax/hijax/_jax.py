"""The names of ``jax.experimental.hijax`` that madax uses, for each version of JAX."""

from typing import Any

import jax
from jax.experimental import hijax

HiType: Any = hijax.HiType
ShapedArray: Any = hijax.ShapedArray
# JAX 0.12 renamed this class. The methods used here have not changed since 0.10.
Primitive: Any = getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive")  # noqa: B009
# As Any, because subclasses set attributes that jax.Array declares read-only.
Array: Any = jax.Array

register = hijax.register_hitype
method, property_ = hijax.aval_method, hijax.aval_property
