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

from madax._core.numerics import relative_to, rounded
from madax._core.rounding import Rounding, rounding_bits
from madax._core.shards import barrier, over_shards
from madax._core.vectors import entries
from madax.formats._moments import MomentFormat, MomentGrid

# The least factor of decay. Below it, the fall of one element would bring its noise to
# all others.
_LEAST_FACTOR = 0.1
_UNSIGNED_OCTAVES = 64
# Octaves that a window may reach above the mean of a leaf at once, and octaves by which
# it rises in a step beyond. So it does not follow a single element that is far too
# large, below which all others would be lost. Unsigned values are squares, and have
# twice as many.
_REACH, _RISE = 20, 4
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
        code = codes.astype(jnp.int32)
        grid, _, offset = self._grid(window)
        sign = code & self._sign(window)
        code ^= sign
        value = jax.lax.bitcast_convert_type(grid.pattern(code), jnp.float32) - offset
        value = jax.lax.bitcast_convert_type(window.scale * value, jnp.int32)
        # Zero and the sign are chosen in the pattern, after the product. So no compiler
        # fuses that with a sum that the inner optimizer has it in.
        pattern = jnp.where(code > 0, value, 0) | sign << (32 - self.format.bits)
        return jax.lax.bitcast_convert_type(pattern, jnp.float32)

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
        x = jnp.asarray(new).astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, before)
        # A common factor goes into the scale, unrounded, so an average decays exactly.
        factor = jnp.where(before == 0, 1, x / jnp.where(before == 0, 1, before))
        least, peak, factor, total, count = (
            _extremes(x, factor)
            if at_start
            else jax.lax.platform_dependent(
                x, factor, cpu=_extremes_at_once, default=_extremes
            )
        )
        least, factor = (
            over_shards(jax.lax.pmin, x, window.scale) for x in (least, factor)
        )
        mean = (total // jnp.maximum(count, 1)) << _bin(x.size)
        # Of shards, the largest mean counts: sums of them all could overflow.
        peak, mean = (over_shards(jax.lax.pmax, x, window.scale) for x in (peak, mean))
        signed, scale = least < 0, _decayed(window.scale, factor)
        squares = jnp.where(signed, 1, 2)
        highest = jnp.maximum(
            mean + squares * _REACH, self._top(window) + squares * _RISE
        )
        peak = jax.lax.bitcast_convert_type(relative_to(scale, peak), jnp.int32)
        top = jnp.minimum(peak >> _MANTISSA, highest)
        octaves = self._octaves(signed)
        # It ends above the octave of the largest magnitude.
        octave = jnp.clip(top + 2 - octaves, 1, 254 - octaves)
        return StateWindow(octave, scale, signed)

    def fits(self, new: Any, window: StateWindow) -> jax.Array:
        """Whether new values are finite, and not above the octaves of a window."""
        pattern = jax.lax.bitcast_convert_type(window.scale, jnp.int32) & _FRACTION
        pattern += (self._top(window) + 1) << _MANTISSA
        above = jax.lax.bitcast_convert_type(pattern, jnp.float32)
        # NaN and infinity are not below any number.
        return jnp.abs(jnp.asarray(new).astype(jnp.float32)) < above

    def encode(
        self, x: jax.Array, window: StateWindow, bits: jax.Array | None
    ) -> jax.Array:
        """The codes of values.

        Args:
          x: the values, float32, which fit.
          window: where the codes lie.
          bits: random bits of the shape of the leaf; None to round to nearest.
        """
        grid, highest, offset = self._grid(window)
        bits = (1 << (grid.shift - 1)).astype(jnp.uint32) if bits is None else bits
        # The scale is in [1, 2), so its reciprocal is a normal number. The sign is cut
        # from the pattern, after the product, which no compiler then fuses with a sum.
        value = jax.lax.bitcast_convert_type(x * rounded(1 / window.scale), jnp.int32)
        pattern = value & 0x7FFFFFFF
        size = jax.lax.bitcast_convert_type(pattern, jnp.float32)
        # Without a sign, 0 is code 0, and anything above it at least code 1.
        least = jnp.minimum(pattern, jnp.where(window.signed, 0, 1))
        code = jnp.clip(grid.encode(size + offset, bits), least, highest)
        code |= (value >> (32 - self.format.bits)) & self._sign(window)
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

    def _sign(self, window: StateWindow) -> jax.Array:
        """The bit of codes that is a sign; 0 if there is none."""
        return jnp.where(window.signed, 1 << (self.format.bits - 1), 0)

    def _octaves(self, signed: jax.Array) -> jax.Array:
        return jnp.where(signed, self.octaves, _UNSIGNED_OCTAVES)

    def _top(self, window: StateWindow) -> jax.Array:
        """The biased exponent of the largest values that fit.

        The octave above is free, for values that are rounded up.
        """
        return window.octave + self._octaves(window.signed) - 2


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


@partial(jax.jit, static_argnums=0)
def fitting(codec: Codec, new: jax.Array, window: StateWindow) -> jax.Array:
    """Where the new values of a leaf can be stored."""
    return codec.fits(new, window)


@partial(jax.jit, static_argnums=(0, 6))
def encoded(
    codec: Codec,
    new: jax.Array,
    before: jax.Array,
    fits: jax.Array,
    window: StateWindow,
    key: jax.Array,
    rounding: Rounding,
) -> jax.Array:
    """The codes of the new values of a leaf where those fit, else of those before."""
    x = jnp.where(fits, new.astype(jnp.float32), before)
    return codec.encode(x, window, rounding_bits(rounding, key, new.shape))


@partial(jax.jit, static_argnums=0)
def started(codec: Codec, new: Any) -> tuple[jax.Array, StateWindow]:
    """The codes of the values that a state starts with, and where they lie."""
    window = StateWindow(jnp.int32(1), jnp.float32(1), jnp.bool(False))
    window = codec.follow(new, 0.0, window, at_start=True)
    x = jnp.where(codec.fits(new, window), new.astype(jnp.float32), 0)
    return codec.encode(x, window, None), window


def computed_again(x: Any) -> Any:
    """A tree of arrays, of which what follows is computed anew, for less memory.

    TPUs keep what is there: arithmetic is their bound.
    """
    return jax.lax.platform_dependent(x, tpu=lambda x: x, default=barrier)


def _bin(size: int) -> int:
    """Bits to drop of each exponent, so that a sum of ``size`` of them fits 31 bits."""
    return max(2, size.bit_length() - 23)


def _exponents(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The biased exponents of magnitudes, to be summed; and whether they are not 0."""
    pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
    return pattern >> (_MANTISSA + _bin(x.size)), jnp.minimum(pattern, 1)


def _extremes(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, ...]:
    """The least value and largest magnitude, and the least factor; 0, 0 and 1 at most.

    And the sum of exponents, and how many there are. None of them depends on another,
    and compilers find all in one pass.
    """
    size = jnp.abs(x)
    # By default JAX adds up int32 as int64 in x64 mode.
    total, count = (jnp.sum(each, dtype=jnp.int32) for each in _exponents(size))
    peak = jnp.max(size, initial=0)
    return jnp.min(x, initial=0), peak, jnp.min(factor, initial=1), total, count


def _extremes_at_once(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, ...]:
    """The same as one operation, without which CPUs compute the values for each."""

    def either(a, b):
        least, peak, factor, total, count = zip(a, b, strict=True)
        extremes = jnp.minimum(*least), jnp.maximum(*peak), jnp.minimum(*factor)
        return *extremes, jnp.add(*total), jnp.add(*count)

    start = *map(np.float32, (0, 0, 1)), np.int32(0), np.int32(0)
    size = jnp.abs(x)
    values = x, size, jnp.broadcast_to(factor, x.shape), *_exponents(size)
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
