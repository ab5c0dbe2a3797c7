"""Stores any leaf of an optimizer's state as codes.

The octaves of the codes follow from the values to be stored, in the same step.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.numerics import (
    MANTISSA,
    divided,
    from_pattern,
    rounded,
    to_pattern,
)
from madax._core.rounding import Rounding, rounding_bits
from madax._core.shards import over_shards
from madax._core.sums import part_axes
from madax._core.vectors import shape_per_leaf
from madax.formats._moment_format import (
    UNSIGNED_OCTAVES,
    MomentFormat,
    MomentGrid,
    MomentWindow,
    fraction_and_exponent,
    window_start,
)

# The min factor of decay. Below it, the fall of one element would bring its noise to
# all others.
_MIN_FACTOR = 0.1
# Octaves that a window may reach above the mean of a leaf at once, and octaves by which
# it rises in a step beyond. So it does not follow a single element that is far too
# large, below which all others would be lost. Unsigned values are squares, and have
# twice as many.
_REACH, _RISE = 20, 4
# The max number of elements whose exponents are added up at once: a sum of more has few
# bits left for each, and none beyond 2**30.
_AT_ONCE = 2**25


@dataclasses.dataclass(frozen=True)
class MomentCodec:
    """Encodes values, and decodes codes.

    Codes without a sign are bits of the float32 pattern, from some octave up. Codes
    with a sign are bits of ``magnitude + 2**octave``, so zero is a code, and the first
    codes are evenly spaced.

    Attributes:
      bits: width of a code.
      octaves: the number of octaves of a leaf with a sign.
    """

    bits: int
    octaves: int

    @property
    def format(self) -> MomentFormat:
        """The format, in which the number of octaves is chosen."""
        return MomentFormat(self.bits, self.octaves)

    @partial(jax.jit, static_argnums=0)
    def decode(self, codes: jax.Array, window: MomentWindow) -> jax.Array:
        """The values of the codes of a leaf, float32."""
        code = codes.astype(jnp.int32)
        grid, _, offset = self._grid(window)
        sign = code & self._sign(window)
        code ^= sign
        value = from_pattern(grid.pattern(code)) - offset
        value = to_pattern(window.scale * value)
        # Zero and the sign are chosen in the pattern, after the product, so a compiler
        # cannot fuse the product with a sum in the inner optimizer.
        return from_pattern(jnp.where(code > 0, value, 0) | sign << (32 - self.bits))

    @partial(jax.jit, static_argnums=0, static_argnames="at_start")
    def follow(
        self,
        new: jax.Array,
        before: jax.typing.ArrayLike,
        window: MomentWindow,
        *,
        at_start: bool = False,
    ) -> MomentWindow:
        """Returns the window for the new values of a leaf.

        The values ``before``, float32, stay where new ones are not finite. ``at_start``
        means that the values are constants, which XLA reduces while it compiles: that
        takes minutes if three reductions are one operation.
        """
        x = new.astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, before)
        # A common factor goes into the scale, unrounded, so an average decays exactly.
        factor = jnp.where(before == 0, 1, x / jnp.where(before == 0, 1, before))
        found = (
            _extremes(x, factor)
            if at_start
            else jax.lax.platform_dependent(
                x, factor, cpu=_extremes_at_once, default=_extremes
            )
        )
        min_value, factor = (
            over_shards(jax.lax.pmin, jnp.min(x), window.scale)
            for x in (found.min_value, found.min_factor)
        )
        # The max of the shards' means is used, because a sum over all could overflow.
        max_size, mean = (
            over_shards(jax.lax.pmax, x, window.scale)
            for x in (jnp.max(found.max_size), _mean_exponent(found, x.shape))
        )
        signed = min_value < 0
        fraction, _ = fraction_and_exponent(window.scale * factor)
        scale = jnp.where(factor >= _MIN_FACTOR, fraction, window.scale)
        squares = jnp.where(signed, 1, 2)
        # may fuse: integers
        limit = jnp.maximum(
            mean + squares * _REACH, self._top(window) + squares * _RISE
        )
        top = to_pattern(divided(max_size, scale)) >> MANTISSA
        octaves = self._octaves(signed)
        # It ends above the octave of the max magnitude.
        octave = window_start(jnp.minimum(top, limit) + 2 - octaves, octaves)
        return MomentWindow(octave, scale, signed.astype(jnp.int32))

    @partial(jax.jit, static_argnums=0)
    def fits(self, new: jax.Array, window: MomentWindow) -> jax.Array:
        """Returns whether new values are finite and not above a window."""
        above = to_pattern(window.scale) & ((1 << MANTISSA) - 1)
        above = from_pattern(above + ((self._top(window) + 1) << MANTISSA))
        # NaN and infinity are not below any number.
        return jnp.abs(new.astype(jnp.float32)) < above

    @partial(jax.jit, static_argnums=(0, 6))
    def encode(
        self,
        new: jax.Array,
        before: jax.typing.ArrayLike,
        fits: jax.Array,
        window: MomentWindow,
        key: jax.Array,
        rounding: Rounding,
    ) -> jax.Array:
        """Returns the codes of new values where they fit, and of old ones elsewhere."""
        x = jnp.where(fits, new.astype(jnp.float32), before)
        grid, max_code, offset = self._grid(window)
        bits = rounding_bits(rounding, key, new.shape)
        bits = (1 << (grid.shift - 1)).astype(jnp.uint32) if bits is None else bits
        # The scale is in [1, 2), so its reciprocal is a normal number. The sign is cut
        # from the pattern, after the product, which no compiler then fuses with a sum.
        value = to_pattern(x * rounded(1 / window.scale))
        pattern = value & 0x7FFFFFFF
        # Without a sign, 0 is code 0, and anything above it is code 1 or more.
        min_code = jnp.minimum(pattern, jnp.where(window.signed, 0, 1))
        code = grid.encode(from_pattern(pattern) + offset, bits)
        code = jnp.clip(code, min_code, max_code)
        code |= (value >> (32 - self.bits)) & self._sign(window)
        return code.astype(self.format.dtype)

    @partial(jax.jit, static_argnums=0)
    def start(self, new: jax.Array) -> tuple[jax.Array, MomentWindow]:
        """Returns the codes of initial values, and their window."""
        window = MomentWindow(jnp.int32(1), jnp.float32(1), jnp.int32(0))
        window = self.follow(new, 0.0, window, at_start=True)
        fits = self.fits(new, window)
        return self.encode(new, 0.0, fits, window, jnp.uint32(0), "nearest"), window

    def _grid(self, window: MomentWindow) -> tuple[MomentGrid, jax.Array, jax.Array]:
        """The grid of magnitudes, its max code, and what is added to them."""
        signed, bits = window.signed, self.bits
        # Of a pattern, the bits of a code stay, of which the high ones count octaves.
        octave_bits = jnp.where(
            signed, self.octaves.bit_length(), UNSIGNED_OCTAVES.bit_length() - 1
        )
        grid = MomentGrid.above(window.octave, MANTISSA + octave_bits - bits)
        max_code = jnp.where(signed, 2 ** (bits - 1) - 1, 2**bits - 1)
        # With an offset, code 0 is the first of the min octave.
        first = window.octave << MANTISSA
        grid = grid._replace(origin=jnp.where(signed, first, grid.origin))
        return grid, max_code, jnp.where(signed, from_pattern(first), 0)

    def _sign(self, window: MomentWindow) -> jax.Array:
        """Returns the sign bit of codes; 0 if there is none."""
        return jnp.where(window.signed, 1 << (self.bits - 1), 0)

    def _octaves(self, signed: jax.Array) -> jax.Array:
        return jnp.where(signed, self.octaves, UNSIGNED_OCTAVES)

    def _top(self, window: MomentWindow) -> jax.Array:
        """Returns the biased exponent of the max values that fit.

        The octave above is free, for values that are rounded up.
        """
        return window.octave + self._octaves(window.signed) - 2


class _Extremes(NamedTuple):
    """Independent reductions of a leaf, or of each of its parts."""

    min_value: jax.Array  # 0 at most
    max_size: jax.Array
    min_factor: jax.Array  # of a value to the one before; 1 at most
    exponents: jax.Array  # the sum of biased exponents, without their low bits
    count: jax.Array  # the number of values that are not zero


def _extremes(x: jax.Array, factor: jax.Array) -> _Extremes:
    """Reduces one by one; compilers make one pass of it."""
    size, axes = jnp.abs(x), part_axes(x.shape, _AT_ONCE)
    # By default JAX adds up int32 as int64 in x64 mode.
    total, count = (jnp.sum(each, axes, jnp.int32) for each in _exponents(size))
    low, high = jnp.min(x, axes, initial=0), jnp.max(size, axes, initial=0)
    return _Extremes(low, high, jnp.min(factor, axes, initial=1), total, count)


def _extremes_at_once(x: jax.Array, factor: jax.Array) -> _Extremes:
    """Reduces in one operation, or CPUs would compute the values for each reduction."""

    def either(a, b):
        reduce = jnp.minimum, jnp.maximum, jnp.minimum, jnp.add, jnp.add
        return tuple(f(*pair) for f, *pair in zip(reduce, a, b, strict=True))

    start = *map(np.float32, (0, 0, 1)), np.int32(0), np.int32(0)
    size = jnp.abs(x)
    values = x, size, jnp.broadcast_to(factor, x.shape), *_exponents(size)
    return _Extremes(
        *jax.lax.reduce(values, start, either, part_axes(x.shape, _AT_ONCE))
    )


def _exponents(size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The biased exponents of magnitudes, to be summed; and whether they are not 0."""
    pattern = to_pattern(size)
    return pattern >> (MANTISSA + _dropped(size.shape)), jnp.minimum(pattern, 1)


def _mean_exponent(found: _Extremes, shape: Sequence[int]) -> jax.Array:
    """The mean biased exponent of values that are not zero, to within a few octaves.

    Of a leaf in parts it is the mean over parts, large or small, that are not zero.
    """
    mean = (found.exponents // jnp.maximum(found.count, 1)) << _dropped(shape)
    if mean.ndim:
        dropped = _dropped((mean.size,))
        total = jnp.sum(mean >> dropped, dtype=jnp.int32)
        parts = jnp.sum(found.count > 0, dtype=jnp.int32)
        mean = (total // jnp.maximum(parts, 1)) << dropped
    return mean


def _dropped(shape: Sequence[int]) -> int:
    """Bits to drop of each exponent, so that the sum of a part's fits 31 bits."""
    size = math.prod(shape[axis] for axis in part_axes(shape, _AT_ONCE))
    return max(2, size.bit_length() - 23)


def stack_windows(windows: Sequence[MomentWindow]) -> MomentWindow:
    """Joins the windows of all leaves."""
    if not windows:
        shape = shape_per_leaf(0)
        ones = jnp.ones(shape, jnp.int32), jnp.ones(shape, jnp.float32)
        return MomentWindow(*ones, jnp.zeros(shape, jnp.int32))
    return MomentWindow(*map(jnp.stack, zip(*windows, strict=True)))
