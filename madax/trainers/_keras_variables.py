"""Variables of Keras that hold codes, and nothing else once they do."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from madax._core.checks import is_lifted
from madax._core.names import Tree
from madax._core.numerics import divided_or_same
from madax.codes._array import QuantizedArray
from madax.hijax._primitives import decode_array
from madax.hijax._values import LiftedArray, lifted
from madax.trainers._shared import imported


def hold(variable: Any, value: Tree) -> None:
    """Puts codes into a variable of Keras, which takes no floats from then on."""
    if is_lifted(value):
        variable.__class__ = _of_codes(type(variable))
        variable.assign(value)


@cache
def _of_codes(kind: type) -> type:
    """Returns a subclass of a class of variables; itself if it is one already."""
    if hasattr(kind, "_codes_of"):
        return kind
    keras: Any = imported("keras.src.backend.common.global_state", "keras")

    class Variable(kind):
        """Layers read decoded values, as convolutions call ``jax.lax``."""

        def _maybe_autocast(self, value):
            is_read = keras.get_global_attribute("current_call_ctx") is not None
            if is_read and is_lifted(value):
                value = decode_array(value)
            return super()._maybe_autocast(value)

        def _convert_to_tensor(self, value, dtype=None):
            return value if is_lifted(value) else self._codes_of(value)

        def _direct_assign(self, value):
            super()._direct_assign(value)
            if value is not None:  # A fit takes the values of nnx variables away.
                # A copy, because steps donate the scale with the codes.
                self._kind, self._scale = value.aval, value.scale.copy()

        def _codes_of(self, value: Tree) -> LiftedArray:
            """Returns the codes of decoded values.

            ``get_weights`` and files of HDF5 hold those, and steps return them for
            variables that are not trained.
            """
            if not isinstance(value, jax.core.Tracer):
                value, format = jnp.asarray(value, self.dtype), self._kind.number_format
                x = divided_or_same(value.astype(jnp.float32), self._scale)
                codes = format.nearest(x).astype(format.storage_dtype)
                new = QuantizedArray(codes, self._scale, format, self._kind.dtype)
                if jnp.array_equal(new.dequantize(value.dtype), value):
                    return lifted(new)
            raise ValueError(
                f"the variable {self.path!r} holds codes, and was given floats that "
                "are not their values; set or load weights before madax.trainers.keras "
                "makes codes, save and load codes by keras.callbacks.OrbaxCheckpoint, "
                "and train by the optimizer that madax.trainers.keras returned."
            )

    return Variable
