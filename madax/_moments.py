"""Layer 3, storage: the format of the optimizer's moments, small floats.

The top bits of a float32 pattern are a grid that is logarithmic from octave to
octave and uniform within one; adding random bits below the cut before cutting is
unbiased stochastic rounding. That takes two integer operations and no logarithm.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from madax._checks import check_bits

_MANTISSA = 23  # float32: 1 sign bit, 8 exponent bits of bias 127, 23 mantissa bits
_BIAS = 127
_OCTAVES_V = 64
_OCTAVES_M = 32  # m goes as g, v as g squared: half the octaves for the same range
_BELOW = 40  # of v's octaves, how many lie below the largest first squared gradient


@dataclasses.dataclass(frozen=True)
class MomentFormat:
    """How moments are stored: as codes of ``bits`` bits, stochastically rounded.

    The second moment ``v`` becomes an unsigned float of 6 exponent bits, 64
    octaves; a first moment ``m`` a signed one of 5, which is the same range of
    gradients. The rest is mantissa. The octaves are placed leaf by leaf, by the
    first gradient that is not zero: from 2**40 below its largest square to 2**24
    above, so gradients of any scale are stored alike. Once positive, ``v`` stays
    so: there is no zero to be trapped in.

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

    @property
    def _shift(self) -> int:
        """How many bits of a float32 pattern are cut: both moments' mantissas agree."""
        return _MANTISSA - (self.bits - 6)

    def place(self, window: jax.Array, g2: jax.Array) -> jax.Array:
        """The lowest octave of one leaf's ``v``, once and for all.

        Args:
          window: biased exponent of the lowest octave, int32; 0 before placement.
          g2: squared gradients.

        Returns:
          The new window; still 0 if all gradients are zero.
        """
        peak = _pattern(jnp.max(g2, initial=0)) >> _MANTISSA
        lowest = jnp.clip(peak - _BELOW, 1, 254 - _OCTAVES_V)
        return jnp.where((window == 0) & (peak > 0), lowest, window)

    def decode_v(self, code: jax.Array, window: jax.Array) -> jax.Array:
        """The second moment of a code, float32."""
        return self._decode(code.astype(jnp.int32), window)

    def encode_v(self, v: jax.Array, window: jax.Array, bits: jax.Array) -> jax.Array:
        """The code of a second moment; ``bits`` are random, the low half is used."""
        code = self._encode(v, window, bits)
        highest = 2**self.bits - 1
        return jnp.where(v > 0, jnp.clip(code, 1, highest), 0).astype(self.v_dtype)

    def decode_m(self, code: jax.Array, window: jax.Array) -> jax.Array:
        """The first moment of a code, float32."""
        c = code.astype(jnp.int32)
        magnitude = self._decode(jnp.abs(c), _m_window(window))
        return jnp.where(c < 0, -magnitude, magnitude)

    def encode_m(self, m: jax.Array, window: jax.Array, bits: jax.Array) -> jax.Array:
        """The code of a first moment; ``bits`` are random, the low half is used."""
        window = _m_window(window)
        magnitude = jnp.abs(m)
        # Below the lowest octave the grid is 0 and the smallest code, nothing between.
        smallest = self._decode(jnp.int32(1), window)
        chance = (bits & 0xFFFF).astype(jnp.float32) * 2.0**-16
        code = jnp.where(
            magnitude < smallest,
            (chance * smallest < magnitude).astype(jnp.int32),
            jnp.minimum(
                self._encode(magnitude, window, bits), 2 ** (self.bits - 1) - 1
            ),
        )
        return jnp.where(m < 0, -code, code).astype(self.m_dtype)

    def _decode(self, code: jax.Array, window: jax.Array) -> jax.Array:
        pattern = ((code - 1) << self._shift) + (window << _MANTISSA)
        value = jax.lax.bitcast_convert_type(pattern, jnp.float32)
        return jnp.where(code > 0, value, 0)

    def _encode(self, x: jax.Array, window: jax.Array, bits: jax.Array) -> jax.Array:
        noise = (bits & 0xFFFF).astype(jnp.int32)
        cut = self._shift - 16
        noise = noise << cut if cut > 0 else noise >> -cut
        return ((_pattern(x) - (window << _MANTISSA) + noise) >> self._shift) + 1


def _pattern(x: jax.Array) -> jax.Array:
    """The bits of a float32, as an int32: monotone for x >= 0."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _m_window(window: jax.Array) -> jax.Array:
    """The lowest octave of ``m``: its highest squares to the highest of ``v``."""
    highest = (window + _OCTAVES_V - _BIAS + 1) >> 1
    return highest - _OCTAVES_M + _BIAS
