"""Layer 3, storage: the format of the optimizer's moments, small floats.

The top bits of a float32 pattern are a grid that is logarithmic from octave to
octave and uniform within one; adding random bits below the cut before cutting is
unbiased stochastic rounding. That takes two integer operations and no logarithm.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from madax._checks import check_bits

_MANTISSA = 23  # float32: 1 sign bit, 8 exponent bits of bias 127, 23 mantissa bits
_BIAS = 127
_OCTAVES_V = 64
_OCTAVES_M = 32  # m goes as g, v as g squared: half the octaves for the same range
_LOWEST_M = _BIAS - 62  # with bits to spare for what squares to a normal float32
_BELOW = 30  # of v's octaves, how many lie below the first v's largest


@dataclasses.dataclass(frozen=True)
class MomentFormat:
    """How moments are stored: as codes of ``bits`` bits, stochastically rounded.

    The second moment ``v`` becomes an unsigned float of 6 exponent bits, 64
    octaves; a first moment ``m`` a signed one of 5, which is the same range of
    gradients. The rest is mantissa. The octaves are placed leaf by leaf, around the
    largest ``v`` after the first gradient that is not zero, so gradients of any scale
    are stored alike; for that one step all of float32's exponents are kept, and less
    mantissa. Once positive, ``v`` stays so: there is no zero to be trapped in.

    Attributes:
      bits: width of a code, 8 to 16; 8 is one byte a moment, more takes two.

    Raises:
      ValueError: if ``bits`` is out of range.
      TypeError: if ``bits`` is not an int.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.madam(moment_format=madax.MomentFormat(bits=8))
      >>> print(tx.init(jnp.ones(1000))[0].v.nbytes)
      1000
    """

    bits: int = 8

    def __post_init__(self) -> None:
        beyond = "narrower moments would have less than two mantissa bits"
        check_bits(self.bits, 8, 16, beyond)

    @property
    def v_dtype(self) -> Any:
        """The integer dtype of the second moment's codes: uint8 or uint16."""
        return jnp.dtype(jnp.uint8 if self.bits == 8 else jnp.uint16)

    @property
    def m_dtype(self) -> Any:
        """The integer dtype of the first moment's codes: int8 or int16."""
        return jnp.dtype(jnp.int8 if self.bits == 8 else jnp.int16)

    def place(self, window: jax.Array, v_codes: jax.Array) -> jax.Array:
        """The lowest octave of one leaf's ``v``, once and for all.

        Args:
          window: biased exponent of the lowest octave, int32; 0 before placement.
          v_codes: the leaf's codes, stored without a window.

        Returns:
          The new window; still 0 if all codes are zero.
        """
        highest = jnp.max(v_codes, initial=0).astype(jnp.int32)
        octave = ((highest - 1) >> (self.bits - 8)) + 1
        lowest = jnp.clip(octave - _BELOW, 1, 254 - _OCTAVES_V)
        return jnp.where((window == 0) & (highest > 0), lowest, window)

    def decode_v(self, code: jax.Array, window: jax.Array) -> jax.Array:
        """The second moment of a code, float32."""
        return self._v_grid(window).decode(code.astype(jnp.int32))

    def encode_v(self, v: jax.Array, window: jax.Array, bits: jax.Array) -> jax.Array:
        """The code of a second moment; ``bits`` are random, the low half is used."""
        grid = self._v_grid(window)
        code = jnp.clip(grid.encode(v, bits), 1, grid.highest)
        return jnp.where(v > 0, code, 0).astype(self.v_dtype)

    def decode_m(self, code: jax.Array, window: jax.Array) -> jax.Array:
        """The first moment of a code, float32."""
        c = code.astype(jnp.int32)
        magnitude = self._m_grid(window).decode(jnp.abs(c))
        return jnp.where(c < 0, -magnitude, magnitude)

    def encode_m(self, m: jax.Array, window: jax.Array, bits: jax.Array) -> jax.Array:
        """The code of a first moment; ``bits`` are random, the low half is used."""
        grid = self._m_grid(window)
        magnitude = jnp.abs(m)
        # Below the lowest octave the grid is 0 and the smallest code, nothing between.
        smallest = grid.decode(jnp.int32(1))
        chance = (bits & 0xFFFF).astype(jnp.float32) * 2.0**-16
        code = jnp.where(
            magnitude < smallest,
            (chance * smallest < magnitude).astype(jnp.int32),
            jnp.minimum(grid.encode(magnitude, bits), grid.highest),
        )
        return jnp.where(m < 0, -code, code).astype(self.m_dtype)

    def _v_grid(self, window: jax.Array) -> "_Grid":
        return _grid(window, window, 1, self.bits, self.bits - 6)

    def _m_grid(self, window: jax.Array) -> "_Grid":
        # The lowest octave of m: its highest squares to the highest of v.
        highest = (window + _OCTAVES_V - _BIAS + 1) >> 1
        lowest = highest - _OCTAVES_M + _BIAS
        return _grid(window, lowest, _LOWEST_M, self.bits - 1, self.bits - 6)


class _Grid(NamedTuple):
    """Non-negative floats that are some bits of a float32 pattern; one leaf's.

    Attributes:
      shift: how many bits of the pattern are cut, int32.
      origin: the pattern that code 0 would have, int32; 0 decodes to 0 all the same.
      highest: the greatest code, int32.
    """

    shift: jax.Array
    origin: jax.Array
    highest: jax.Array

    def decode(self, code: jax.Array) -> jax.Array:
        """The values of codes, float32."""
        pattern = (code << self.shift) + self.origin
        value = jax.lax.bitcast_convert_type(pattern, jnp.float32)
        return jnp.where(code > 0, value, 0)

    def encode(self, x: jax.Array, bits: jax.Array) -> jax.Array:
        """The codes of values, stochastically rounded, beyond the highest perhaps."""
        # The low half of the random bits, in the place of the bits that are cut.
        noise = (bits << 16) >> (32 - self.shift).astype(jnp.uint32)
        pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
        return (pattern - self.origin + noise.astype(jnp.int32)) >> self.shift


def _grid(
    window: jax.Array, lowest: jax.Array, lowest_unplaced: int, bits: int, mantissa: int
) -> _Grid:
    """The grid of ``bits`` bits from an octave up; before placement, of more octaves.

    Then two bits less are left for the mantissa.
    """
    placed = window > 0
    octave = jnp.where(placed, lowest, lowest_unplaced)
    shift = _MANTISSA - jnp.where(placed, mantissa, mantissa - 2)
    every_octave = min(2**bits - 1, 254 << (mantissa - 2))
    return _Grid(
        shift,
        # So that 1 is the first code of the lowest octave.
        (octave << _MANTISSA) - (1 << shift),
        jnp.where(placed, 2**bits - 1, every_octave),
    )
