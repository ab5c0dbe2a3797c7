"""Codes whose values have derivatives.

Integers have no derivatives. So a loss is differentiated with respect to probes: zeros
of a weight's shape. The decoded value is declared to have the derivative of its probe.
Nothing reads a probe, so XLA makes no array of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from madax._core.numerics import straight_through
from madax.codes._array import QuantizedArray
from madax.formats._base import Format


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ProbedArray(QuantizedArray):
    """Codes whose value, in the dtype of ``probe``, has the derivative of ``probe``.

    Slices, scans and maps carry the probe along.
    """

    probe: Any

    @classmethod
    def of(cls, w: QuantizedArray, probe: jax.Array) -> "ProbedArray":
        """The codes ``w``, to be differentiated with respect to ``probe``."""
        w.check_has_value()
        if isinstance(w, ProbedArray):  # a derivative within a derivative
            probe = w.probe.astype(probe.dtype) + probe
        return cls(w.codes, w.scale, w.format, probe)

    def without_probe(self) -> QuantizedArray:
        """The codes alone."""
        return QuantizedArray(self.codes, self.scale, self.format)

    @property
    def dtype(self) -> Any:
        """What the codes decode to."""
        return self.probe.dtype

    def tree_flatten_with_keys(self) -> Any:
        children, format = super().tree_flatten_with_keys()
        probe = _shifted(self.probe, 1)
        return (*children, (jax.tree_util.GetAttrKey("probe"), probe)), format

    @classmethod
    def tree_unflatten(cls, aux: Format, children: Any) -> Any:
        codes, scale, probe = children
        # Tangents, for a function that has a derivative rule of its own.
        if getattr(codes, "dtype", None) == jax.dtypes.float0:
            return probe
        return super().tree_unflatten(aux, (codes, scale, _shifted(probe, -1)))

    def _value(self) -> jax.Array:
        return straight_through(self.probe, super()._value().astype(self.dtype))

    def _at(self, index: Any) -> QuantizedArray:
        return ProbedArray.of(super()._at(index), self.probe[index])


def _shifted(probe: Any, sign: int) -> Any:
    """The probe as a leaf of a tree (``sign`` 1), or as it was before (-1).

    The leaf is huge, so that a norm or a penalty over the leaves of codes in a loss is
    infinite. Otherwise it would be a number that looks right.
    """
    if not isinstance(probe, jax.Array):
        return probe
    return probe + sign * 2.0 ** (jnp.finfo(probe.dtype).maxexp - 2)
