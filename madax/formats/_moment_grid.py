"""What the codecs of moments share: grids of small floats, and where the grids lie.

The top bits of a float32 pattern are a grid that is logarithmic from octave to octave
and uniform within one; adding random bits below the cut before cutting is unbiased
stochastic rounding. That takes two integer operations and no logarithm.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from madax._core.names import Tree
from madax._core.numerics import BIAS, MANTISSA, from_pattern, to_pattern

# Octaves of a moment without a sign. A moment with a sign goes as the gradient, not as
# its square: half as many cover the same range.
UNSIGNED_OCTAVES, SIGNED_OCTAVES = 64, 32


class MomentWindow(NamedTuple):
    """Where the codes of moments lie: one entry per stored leaf, in flatten order.

    Attributes:
      octave: biased exponent of the min octave of each leaf, int32, shape (number of
        stored leaves,), or () if there are none; of :func:`scale_by_second_moment` it
        is that of the second moment, and 0 before the first gradient.
      scale: unit of the values, float32 in [1, 2): of the same shape for
        :func:`with_quantized_state`, a scalar for the second moments of
        :func:`scale_by_second_moment`. What all elements decay by goes here, rather
        than into codes, which would be rounded.
      signed: whether a bit of the codes is a sign, bool, the shape of ``octave``; None
        for :func:`scale_by_second_moment`, whose second moments have no sign.
    """

    octave: jax.Array
    scale: jax.Array
    signed: Tree = None


def window_start(octave: jax.Array, octaves: jax.typing.ArrayLike) -> jax.Array:
    """The min octave of a window of normal numbers, ``octave`` if that is possible."""
    return jnp.clip(octave, 1, 254 - octaves)


def fraction_and_exponent(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A positive number as one in [1, 2) and the exponent of a power of two."""
    pattern = to_pattern(x)
    exponent = (pattern >> MANTISSA) - BIAS
    return from_pattern(pattern - (exponent << MANTISSA)), exponent


def check_made_for(wanted: str | None, made_for: str | None) -> None:
    """Raises unless a state was made for the format of its optimizer.

    That is the ``repr`` of the format, or None for floats. The key of a window in the
    state has it, followed by dtypes perhaps.
    """
    if made_for != wanted and not f"{made_for}".startswith(f"{wanted}, "):
        raise ValueError(
            f"moment_format is {wanted}, but the optimizer state was made for "
            f"{made_for}; call init again, or use the state's moment_format."
        )


class MomentGrid(NamedTuple):
    """Non-negative floats that are some bits of a float32 pattern.

    Attributes:
      shift: number of bits of the pattern that are cut, int32.
      origin: the pattern of code 0, int32.
    """

    shift: jax.Array
    origin: jax.Array

    @classmethod
    def above(cls, octave: jax.Array, shift: jax.Array) -> "MomentGrid":
        """The grid whose code 1 is the first value of an octave."""
        return cls(shift, (octave << MANTISSA) - (1 << shift))

    def lowered(self, octaves: jax.Array) -> "MomentGrid":
        """The grid, moved down by some octaves."""
        return self._replace(origin=self.origin - (octaves << MANTISSA))

    def pattern(self, code: jax.typing.ArrayLike) -> jax.Array:
        """The patterns of codes, int32; negative below all normal numbers."""
        return (jnp.asarray(code, jnp.int32) << self.shift) + self.origin

    def value(self, code: jax.typing.ArrayLike) -> jax.Array:
        """The values of codes, float32; 0 if they are below all normal numbers."""
        return from_pattern(jnp.maximum(self.pattern(code), 0))

    def value_from_zero(self, code: jax.Array) -> jax.Array:
        """Like :meth:`value`, but code 0 is zero."""
        return from_pattern(jnp.where(code > 0, self.pattern(code), 0))

    def encode(self, x: jax.Array, bits: jax.Array) -> jax.Array:
        """The codes of values, stochastically rounded, outside of the grid perhaps.

        Args:
          x: values, float32, not negative, not NaN.
          bits: random bits, uint32, of which the low ones are used, one for each bit
            that is cut.

        Returns:
          The codes, int32; negative if the values are below the grid.
        """
        # The noise takes the place of the bits that are cut.
        noise = bits.astype(jnp.int32) & ((1 << self.shift) - 1)
        return (to_pattern(x) - self.origin + noise) >> self.shift

    def encode_from_zero(
        self, x: jax.Array, bits: jax.Array, max_code: int
    ) -> jax.Array:
        """Like :meth:`encode`, saturated, with nothing between 0 and the first code."""
        smallest = self.value(1)
        chance = (bits & 0xFFFF).astype(jnp.float32) * 2.0**-16
        return jnp.where(
            x < smallest,
            (chance * smallest < x).astype(jnp.int32),
            jnp.minimum(self.encode(x, bits), max_code),
        )
