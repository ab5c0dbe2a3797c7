"""Codes whose values have derivatives.

Integers have no derivatives. So a loss is differentiated with respect to probes: zeros
of the shape of a weight. The decoded value is declared to have the derivative of its
probe. Nothing reads a probe, so XLA allocates no array for it.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from madax._core.names import Tree
from madax._core.numerics import straight_through
from madax.codes._array import Leaf, QuantizedArray, is_quantized
from madax.codes._kind import Kind
from madax.codes._leaf_guards import LeafOfCodes, leaves_are_taken, without_guard
from madax.codes._leaves import zeros_like


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ProbedArray(QuantizedArray):
    """Codes whose value, in the dtype of ``probe``, has the derivative of ``probe``.

    Slices, scans and maps carry the probe along.
    """

    probe: jax.Array = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, w: QuantizedArray, probe: jax.Array) -> "ProbedArray":
        """The codes ``w``, to be differentiated with respect to ``probe``."""
        w.check_has_value()
        if isinstance(w, ProbedArray):  # a derivative within a derivative
            probe = w.probe.astype(probe.dtype) + probe
        return cls(w.codes, w.scale, *w.kind, probe=probe)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that the codes decode to."""
        return self.probe.dtype

    def tree_flatten_with_keys(self) -> tuple[tuple, Kind]:
        children, kind = super().tree_flatten_with_keys()
        probe = jax.tree_util.GetAttrKey("probe"), _shifted(self.probe, 1)
        children = *children, probe
        if leaves_are_taken():
            children = tuple((key, LeafOfCodes(x)) for key, x in children)
        return children, kind

    @classmethod
    def tree_unflatten(cls, aux: Kind, children: Any) -> Any:
        codes, scale, probe = map(without_guard, children)
        # JAX rebuilds the node from tangents, for a function with its own derivative
        # rule.
        if getattr(codes, "dtype", None) == jax.dtypes.float0:
            return probe
        w = QuantizedArray.tree_unflatten(aux, (codes, scale))
        return cls(w.codes, w.scale, *w.kind, probe=_shifted(probe, -1))

    def _value(self) -> jax.Array:
        value = straight_through(self.probe, super()._value().astype(self.dtype))
        noted = _NOTED.get()
        if noted is not None:
            noted.append(Decode.of(value, self))
        return value

    def _at(self, index: Any) -> QuantizedArray:
        return ProbedArray.of(super()._at(index), self.probe[index])


class Decode(NamedTuple):
    """A decoded value and its codes, which the note does not keep alive.

    A loop or a checkpoint in the loss has tracers that must not outlive it.

    Attributes:
      value: a weak reference to the decoded array.
      codes: a weak reference.
      scale: a weak reference.
      kind: what is static of the codes.
    """

    value: Callable[[], jax.Array | None]
    codes: Callable[[], jax.Array | None]
    scale: Callable[[], jax.Array | None]
    kind: Kind

    @classmethod
    def of(cls, value: jax.Array, w: QuantizedArray) -> "Decode":
        """The note of ``value``, which ``w`` decodes to."""
        ref = weakref.ref
        return cls(ref(_primal(value)), ref(w.codes), ref(w.scale), w.kind)

    def codes_of(self, array: jax.Array) -> QuantizedArray | None:
        """The codes of an array that is the decoded value; None for any other."""
        if self.value() is not array:
            return None
        codes, scale = self.codes(), self.scale()
        gone = codes is None or scale is None
        return None if gone else QuantizedArray(codes, scale, *self.kind)


# The decodes of the loss that is being differentiated.
_NOTED: ContextVar[list[Decode] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noting_decodes() -> Generator[list[Decode], None, None]:
    """Collects what is decoded while the context is active."""
    noted: list[Decode] = []
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def _primal(x: jax.Array) -> jax.Array:
    """Returns the value at the bottom of nested JVP tracers."""
    while hasattr(x, "primal"):
        x = x.primal
    return x


def _shifted(probe: jax.Array, sign: int) -> jax.Array:
    """Converts a probe to a leaf of a tree (``sign`` 1), or back (-1).

    The leaf is huge, so that a norm or a penalty over leaves of codes that is not
    refused is infinite, and does not look right.
    """
    if not isinstance(probe, jax.Array):
        return probe
    return probe + sign * 2.0 ** (jnp.finfo(probe.dtype).maxexp - 2)


def probes_of(weights: Sequence[Leaf], dtype: DTypeLike | None) -> list[Tree]:
    """Replaces each QuantizedArray by a probe of zeros."""
    return [
        zeros_like(w, dtype or w.value_dtype) if is_quantized(w) else w for w in weights
    ]


def probed(weights: Sequence[Leaf], probes: Sequence[Tree]) -> list[Leaf]:
    """Replaces each QuantizedArray by a ProbedArray that carries its probe.

    Other leaves are taken from ``probes``, which :func:`probes_of` made.
    """
    return [
        ProbedArray.of(w, x) if is_quantized(w) else x
        for w, x in zip(weights, probes, strict=True)
    ]


def without_probes(
    tree: Tree, weights: Sequence[Leaf], is_leaf: Callable[[Tree], bool] = is_quantized
) -> Tree:
    """The results of a loss of ``weights``, without the probes added to them."""
    if any(isinstance(w, ProbedArray) for w in weights):
        return tree  # a loss within a loss

    def codes_of(x):
        is_probed = isinstance(x, ProbedArray)
        return x.like(x.codes, x.scale) if is_probed else x

    return jax.tree.map(codes_of, tree, is_leaf=is_leaf)
