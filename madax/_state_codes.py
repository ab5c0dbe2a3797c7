"""Storage: codes of any state of an optimizer, a leaf at a time.

Where the codes lie follows from the values that are to be stored, in the same step.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madax._leaves import entries
from madax._moments import MomentFormat, MomentGrid
from madax._numerics import relative_to, rounded
from madax._rounding import Rounding, rounding_bits

# The least factor of decay. Below it, the fall of one element would bring its noise to
# all others.
_LEAST_FACTOR = 0.1
_UNSIGNED_OCTAVES = 64
# float32: the bits of the fraction, their mask, and the pattern of 1.0.
_MANTISSA, _FRACTION, _ONE = 23, 0x007FFFFF, 0x3F800000


class StateWindow(NamedTuple):
    """Where the codes of a state lie: one entry per stored leaf, in flatten order.

    Attributes:
      octave: biased exponent of the lowest octave, int32, shape (number of stored
        leaves,), or () if there are none.
      scale: unit of the values, float32 in [1, 2), same shape. What all elements of a
        leaf decay by goes here, rather than into codes, which would be rounded.
      signed: whether a bit of the codes is a sign, bool, same shape.
    """

    octave: jax.Array
    scale: jax.Array
    signed: jax.Array


@dataclasses.dataclass(frozen=True)
class Codec:
    """How values become codes, and codes become values.

    Magnitudes without a sign are the bits of a float32 from some octave up. Those with
    a sign are the bits of the magnitude and ``2**octave`` together: zero is a code like
    any other, and the first are spaced evenly.

    Attributes:
      format: the width of the codes.
      octaves: how many a leaf with a sign has.
    """

    format: MomentFormat
    octaves: int

    def decode(self, codes: jax.Array, window: StateWindow) -> jax.Array:
        """The values of codes, float32."""
        code, sign = codes.astype(jnp.int32), 1 << (self.format.bits - 1)
        negative = window.signed & (code >= sign)
        code = jnp.where(negative, code - sign, code)
        grid, _, offset = self._grid(window)
        # The product is rounded, as the inner optimizer may add to it.
        value = rounded(
            window.scale * jnp.where(code > 0, grid.value(code) - offset, 0)
        )
        return jnp.where(negative, -value, value)

    def follow(
        self, new: Any, before: Any, window: StateWindow, *, at_start: bool = False
    ) -> StateWindow:
        """Where the codes of new values lie.

        Args:
          new: the values, floating.
          before: the values before, float32, which stay where new ones are not finite.
          window: where their codes lay.
          at_start: whether the values are constants, as zeros are. Those XLA reduces
            while it compiles, which takes it minutes if three reductions are one.
        """
        x = _finite(new, before)
        # A common factor goes into the scale, unrounded, so an average decays exactly.
        factor = jnp.where(before == 0, 1, x / jnp.where(before == 0, 1, before))
        least, peak, factor = (
            _extremes(x, factor)
            if at_start
            else jax.lax.platform_dependent(
                x, factor, cpu=_extremes_at_once, default=_extremes
            )
        )
        signed, scale = least < 0, _decayed(window.scale, factor)
        octave = self._octave(relative_to(scale, peak), signed)
        return StateWindow(octave, scale, signed)

    def encode(
        self, new: Any, before: Any, window: StateWindow, bits: jax.Array | None
    ) -> jax.Array:
        """The codes of new values.

        Args:
          new: the values, floating.
          before: the values before, as of :meth:`follow`.
          window: where the codes lie.
          bits: random bits of the shape of the leaf; None to round to nearest.
        """
        x, signed = _finite(new, before), window.signed
        size = relative_to(window.scale, jnp.abs(x))
        grid, highest, offset = self._grid(window)
        bits = (1 << (grid.shift - 1)).astype(jnp.uint32) if bits is None else bits
        least = jnp.where(signed, 0, 1)
        code = jnp.clip(grid.encode(size + offset, bits), least, highest)
        code = jnp.where(size > 0, code, 0)
        code += jnp.where(signed & (x < 0), 1 << (self.format.bits - 1), 0)
        return code.astype(self.format.v_dtype)

    def _grid(self, window: StateWindow) -> tuple[MomentGrid, jax.Array, jax.Array]:
        """The grid of magnitudes, its greatest code, and what is added to them."""
        signed, bits = window.signed, self.format.bits
        lowest = window.octave << _MANTISSA
        # These bits of a pattern are cut: all but those of a code, whose exponent
        # counts so many octaves.
        shift = jnp.where(
            signed,
            _MANTISSA + self.octaves.bit_length() - bits,
            _MANTISSA + _UNSIGNED_OCTAVES.bit_length() - 1 - bits,
        )
        highest = jnp.where(signed, 2 ** (bits - 1) - 1, 2**bits - 1)
        offset = jax.lax.bitcast_convert_type(lowest, jnp.float32)
        # Without an offset, code 1 is the first of the lowest octave.
        origin = jnp.where(signed, lowest, lowest - (1 << shift))
        return MomentGrid(shift, origin), highest, jnp.where(signed, offset, 0)

    def _octave(self, peak: jax.Array, signed: jax.Array) -> jax.Array:
        """The lowest octave of a grid that ends above the largest magnitude."""
        top = jax.lax.bitcast_convert_type(peak, jnp.int32) >> _MANTISSA
        octaves = jnp.where(signed, self.octaves, _UNSIGNED_OCTAVES)
        return jnp.clip(top + 2 - octaves, 1, 254 - octaves)


@partial(jax.jit, static_argnums=0)
def decoded(codec: Codec, codes: jax.Array, window: StateWindow) -> jax.Array:
    """The values of the codes of a leaf, float32."""
    return codec.decode(codes, window)


@partial(jax.jit, static_argnums=0)
def followed(
    codec: Codec, new: jax.Array, before: jax.Array, window: StateWindow
) -> StateWindow:
    """Where the codes of the new values of a leaf lie."""
    return codec.follow(new, before, window)


@partial(jax.jit, static_argnums=(0, 5))
def encoded(
    codec: Codec,
    new: jax.Array,
    before: jax.Array,
    window: StateWindow,
    key: jax.Array,
    rounding: Rounding,
) -> jax.Array:
    """The codes of the new values of a leaf, rounded."""
    return codec.encode(new, before, window, rounding_bits(rounding, key, new.shape))


@partial(jax.jit, static_argnums=0)
def started(codec: Codec, new: Any) -> tuple[jax.Array, StateWindow]:
    """The codes of the values that a state starts with, and where they lie."""
    window = StateWindow(jnp.int32(1), jnp.float32(1), jnp.bool(False))
    window = codec.follow(new, 0.0, window, at_start=True)
    return codec.encode(new, 0.0, window, None), window


def computed_again(x: Any) -> Any:
    """A tree of arrays, of which what follows is computed anew, for less memory.

    TPUs keep what is there: arithmetic is their bound.
    """
    return jax.lax.platform_dependent(
        x, tpu=lambda x: x, default=jax.lax.optimization_barrier
    )


def _finite(new: Any, before: Any) -> jax.Array:
    x = jnp.asarray(new).astype(jnp.float32)
    return jnp.where(jnp.isfinite(x), x, before)


def _extremes(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, ...]:
    """The least value and largest magnitude, and the least factor; 0, 0 and 1 at most.

    None of them depends on another, and compilers find all in one pass.
    """
    peak = jnp.max(jnp.abs(x), initial=0)
    return jnp.min(x, initial=0), peak, jnp.min(factor, initial=1)


def _extremes_at_once(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, ...]:
    """The same as one operation, without which CPUs compute the values for each."""

    def either(a, b):
        least, peak, factor = zip(a, b, strict=True)
        return jnp.minimum(*least), jnp.maximum(*peak), jnp.minimum(*factor)

    start = tuple(np.float32(i) for i in (0, 0, 1))
    values = x, jnp.abs(x), jnp.broadcast_to(factor, x.shape)
    return jax.lax.reduce(values, start, either, tuple(range(x.ndim)))


def _decayed(scale: jax.Array, factor: jax.Array) -> jax.Array:
    """``scale * factor`` over a power of two, in [1, 2)."""
    pattern = jax.lax.bitcast_convert_type(scale * factor, jnp.int32)
    pattern = (pattern & _FRACTION) | _ONE
    fraction = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    return jnp.where(factor >= _LEAST_FACTOR, fraction, scale)


def stack_windows(windows: Sequence[StateWindow]) -> StateWindow:
    """The windows of all leaves in one."""
    if not windows:
        shape = entries(0)
        ones = jnp.ones(shape, jnp.int32), jnp.ones(shape, jnp.float32)
        return StateWindow(*ones, jnp.zeros(shape, bool))
    return StateWindow(*map(jnp.stack, zip(*windows, strict=True)))
