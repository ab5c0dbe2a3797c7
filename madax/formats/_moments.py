"""Storage: the format of the optimizer's moments, small floats.

The top bits of a float32 pattern are a grid that is logarithmic from octave to
octave and uniform within one; adding random bits below the cut before cutting is
unbiased stochastic rounding. That takes two integer operations and no logarithm.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from madax._core.checks import check_bits
from madax._core.numerics import rounded
from madax._core.shards import over_shards
from madax._core.vectors import entries

_MANTISSA = 23  # float32: 1 sign bit, 8 exponent bits of bias 127, 23 mantissa bits
_BIAS = 127
_OCTAVES_V = 64
_OCTAVES_M = 32  # m goes as g, v as g squared: half the octaves for the same range
_LOWEST_M = _BIAS - 62  # with bits to spare for what squares to a normal float32
# So many of v's octaves lie below that of the largest v of a leaf. A gradient of 1e-8
# of the largest is then stored as it is. So is one of 700 times the largest, as a step
# adds only a thousandth of its square.
_BELOW = 54
# Windows follow in each of the first steps, and in every eighth afterwards, since that
# takes a pass over the codes of v. In between, the decay of v lowers them.
_FIRST_STEPS, _INTERVAL = 8, 8
# With a larger fraction of the newest square in v, they would fall too far by then.
_FASTEST = 0.25


class MomentWindow(NamedTuple):
    """Where the codes of moments lie.

    Attributes:
      octave: biased exponent of the lowest octave of each leaf's ``v``, int32, shape
        (number of leaves,), or () if there are none; 0 before it is placed.
      scale: unit of every ``v``, float32 scalar in [1, 2). It decays instead of the
        codes, which would be rounded each time.
    """

    octave: jax.Array
    scale: jax.Array


@dataclasses.dataclass(frozen=True)
class MomentFormat:
    r"""How moments are stored: as codes of ``bits`` bits, stochastically rounded.

    The second moment ``v`` becomes an unsigned float of 6 exponent bits, 64
    octaves; a first moment ``m`` a signed one of 5, which is the same range of
    gradients. The rest is mantissa.

    - The octaves follow the largest ``v`` of each leaf, up and down, so gradients of
      any scale are stored alike. They are moved in each of the first 8 steps, and in
      every 8th then. An element whose ``v`` jumps out of them, as by a gradient of 700
      times the largest of its leaf, is skipped until they have followed, like one
      that is not finite. With a decay rate below 0.75 they are moved in every step,
      and only elements that are not finite are skipped.
    - The decay of ``v`` is exact. It goes into a scale that all leaves share, so ``v``
      is rounded only where a gradient adds to it.
    - There is no zero to be trapped at. The least code of ``v`` is a number below the
      octaves, which stands for what gradients of up to 1e-8 of the largest leave; an
      element that has had none has it, too, and does not move.
    - In the long run ``v`` has a relative variance of about :math:`0.36 / 2^{b}` from
      its rounding, with :math:`b = \text{bits} - 6` mantissa bits, for any decay rate
      near 1. It would make :math:`1/\sqrt v` too large on average, by 3.4 % for 8
      bits; that is divided out.

    Attributes:
      bits: width of a code, 8 to 16; 8 takes one byte per moment, more takes two.

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
    def rounding_variance(self) -> float:
        """Relative variance of a ``v`` that many gradients have been added to.

        Half the mean spacing of the codes relative to their values: each gradient
        adds a variance of its share of ``v`` times the spacing, and the decay halves
        the sum.
        """
        return 0.5 * 0.7213 * 2.0 ** -(self.bits - 6)

    @property
    def highest_v(self) -> int:
        """The greatest code of ``v``, that of all beyond; 254 octaves if not placed."""
        return min(2**self.bits - 1, 254 << (self.bits - 8))

    @property
    def highest_m(self) -> int:
        """The greatest code of ``|m|``."""
        return 2 ** (self.bits - 1) - 1

    def v_grid(self, octave: jax.Array) -> "MomentGrid":
        """The grid of ``v`` from an octave up."""
        return self._grid(octave, octave, 1)

    def m_grid(self, octave: jax.Array) -> "MomentGrid":
        """The grid of ``|m|``, given the ``octave`` of ``v``."""
        # The highest octave of m squares to the highest of v; that gives the lowest.
        highest = (octave + _OCTAVES_V - _BIAS + 1) >> 1
        return self._grid(octave, highest - _OCTAVES_M + _BIAS, _LOWEST_M)

    def _grid(
        self, window: jax.Array, lowest: jax.Array, unplaced: int
    ) -> "MomentGrid":
        # Before it is placed, a grid has more octaves and two mantissa bits fewer.
        placed = window > 0
        octave = jnp.where(placed, lowest, unplaced)
        mantissa = jnp.where(placed, self.bits - 6, self.bits - 8)
        shift = _MANTISSA - mantissa
        # With this origin, code 1 is the first of the lowest octave.
        return MomentGrid(shift, (octave << _MANTISSA) - (1 << shift))

    def start(self, leaves: int) -> MomentWindow:
        """The window of no gradients yet."""
        return MomentWindow(
            jnp.zeros(entries(leaves), jnp.int32), jnp.ones([], jnp.float32)
        )

    def follow(
        self,
        octave: jax.Array,
        count: jax.Array,
        vs: Sequence[jax.Array],
        octaves: jax.Array,
        fast: jax.Array,
    ) -> jax.Array:
        """The lowest octaves in a step, which suit the codes ``vs`` if they are due.

        Args:
          octave: the ones before, int32, shape (number of leaves,).
          count: number of steps taken before this one.
          vs: the codes of each leaf's ``v`` before, one leaf at least.
          octaves: by how many the decay of the unit of ``v`` lowers its values.
          fast: whether they are due in every step, as :func:`is_fast` tells.

        Returns:
          The new ones; 0 for a leaf whose codes are all zero.
        """

        def suitable():
            largest = jnp.stack([jnp.max(codes, initial=0) for codes in vs])
            top = self.v_grid(octave).pattern(largest) >> _MANTISSA
            top = jnp.where(largest > 0, top, 0)
            top = over_shards(jax.lax.pmax, top, octave)
            lowest = jnp.clip(top - _BELOW, 1, 254 - _OCTAVES_V)
            return jnp.where(top > 0, lowest, 0)

        # The window follows the codes, not the gradients: all of those would have to be
        # there before the first could be used up.
        due = (count < _FIRST_STEPS) | (count % _INTERVAL == 0) | fast
        lowest = jax.lax.cond(due, suitable, lambda: octave)
        # With a short memory, v is about as large after the step as it was before, not
        # as small as its decayed part.
        lowered = jnp.maximum(lowest - jnp.where(fast, 0, octaves), 1)
        return jnp.where(lowest > 0, lowered, 0)


def is_fast(rate: jax.Array) -> jax.Array:
    """Whether memory is so short that windows are moved in every step.

    A value beyond them is then stored as the largest, and still moves its weight. The
    newest square is a large fraction of ``v``: divided by its root, it is no outlier.
    """
    return rate > _FASTEST


def decayed(scale: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(1 - rate) * scale`` as a number in [1, 2), and how many octaves that is up.

    A NaN stays.
    """
    # Beyond 100 octaves nothing is left of any v, and the scale would underflow.
    product = jnp.maximum(scale - rounded(rate * scale), 2.0**-100)
    pattern = jax.lax.bitcast_convert_type(product, jnp.int32)
    octaves = _BIAS - (pattern >> _MANTISSA)
    pattern += octaves << _MANTISSA
    scale = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    return jnp.where(jnp.isnan(product), product, scale), octaves


class MomentGrid(NamedTuple):
    """Non-negative floats that are some bits of a float32 pattern.

    Attributes:
      shift: how many bits of the pattern are cut, int32.
      origin: the pattern of code 0, int32.
    """

    shift: jax.Array
    origin: jax.Array

    def lowered(self, octaves: jax.Array) -> "MomentGrid":
        """The grid so many octaves further down."""
        return self._replace(origin=self.origin - (octaves << _MANTISSA))

    def pattern(self, code: jax.typing.ArrayLike) -> jax.Array:
        """The patterns of codes, int32; negative below all normal numbers."""
        return (jnp.asarray(code, jnp.int32) << self.shift) + self.origin

    def value(self, code: jax.typing.ArrayLike) -> jax.Array:
        """The values of codes, float32; 0 if they are below all normal numbers."""
        return jax.lax.bitcast_convert_type(
            jnp.maximum(self.pattern(code), 0), jnp.float32
        )

    def value_from_zero(self, code: jax.Array) -> jax.Array:
        """As :meth:`value`, but code 0 is zero."""
        pattern = jnp.where(code > 0, self.pattern(code), 0)
        return jax.lax.bitcast_convert_type(pattern, jnp.float32)

    def encode(self, x: jax.Array, bits: jax.Array) -> jax.Array:
        """The codes of values, stochastically rounded, outside of the grid perhaps.

        Args:
          x: values, float32, not negative, not NaN.
          bits: random bits, uint32, of which as many are used, the lowest, as are cut.

        Returns:
          The codes, int32; negative if the values are below the grid.
        """
        # The noise takes the place of the bits that are cut.
        noise = bits.astype(jnp.int32) & ((1 << self.shift) - 1)
        pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
        return (pattern - self.origin + noise) >> self.shift

    def encode_from_zero(
        self, x: jax.Array, bits: jax.Array, highest: int
    ) -> jax.Array:
        """As :meth:`encode`, saturated, with nothing between 0 and the first code."""
        smallest = self.value(1)
        chance = (bits & 0xFFFF).astype(jnp.float32) * 2.0**-16
        return jnp.where(
            x < smallest,
            (chance * smallest < x).astype(jnp.int32),
            jnp.minimum(self.encode(x, bits), highest),
        )
