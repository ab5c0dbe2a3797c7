"""The format of an optimizer's moments, with the grids and windows of its codes.

The top bits of a float32 pattern are a grid that is logarithmic from octave to octave
and uniform within one; adding random bits below the cut before cutting is unbiased
stochastic rounding. That takes two integer operations and no logarithm.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from madax._core.checks import check_bits
from madax._core.names import Tree
from madax._core.numerics import BIAS, MANTISSA, from_pattern, to_pattern

# Octaves of a moment without a sign, such as a squared gradient. A moment with a sign,
# such as a gradient, covers the same range with half as many.
UNSIGNED_OCTAVES, SIGNED_OCTAVES = 64, 32


@dataclasses.dataclass(frozen=True)
class MomentFormat:
    r"""The format of stored moments: codes of ``bits`` bits, stochastically rounded.

    A code is a small float: some bits count octaves, which are powers of two, and the
    others are binary digits. The octaves follow the values of each leaf, so gradients
    of any scale are stored alike.

    :func:`with_quantized_state` describes how it stores the moments of any optimizer.
    :func:`scale_by_second_moment`, and so :func:`madam`, has a grid of its own:

    - A second moment ``nu`` has 64 octaves and no sign; a first moment ``mu`` has a
      sign and 32 octaves, which is the same range of gradients. The other bits are
      digits: two of them in 8 bits.
    - The octaves follow the max of ``nu`` in each leaf, in each of the first 8 steps
      and in every 8th after that. An element whose ``nu`` jumps above them, for example
      by a gradient of 700 times the max of its leaf, is skipped until they have
      followed, like an element that is not finite. With a decay rate below 0.75 they
      follow in each step, and only elements that are not finite are skipped.
    - The decay of ``nu`` is exact. It goes into a scale that all leaves share, so
      ``nu`` is rounded only where a gradient adds to it.
    - No element is trapped at zero: the min code of ``nu`` stands for values below the
      octaves, from gradients below 1e-8 of the max. An element without a gradient so
      far has this code, too, and does not move.
    - After many steps, rounding gives ``nu`` a relative variance of about :math:`0.36 /
      2^{b}`, with :math:`b = \text{bits} - 6` digits, for any decay rate near 1. That
      would make :math:`1/\sqrt\nu` too large on average, by 3.4 % for 8 bits, and is
      divided out.

    Attributes:
      bits: width of a code, 8 to 16; 8 takes one byte per moment, more takes two.
      octaves: the number of octaves of a moment with a sign: 2, 4, 8, 16 or 32. Half as
        many leave one more digit. With None the optimizer chooses: 8 for the momentum
        of :func:`muon_madam`, 32 elsewhere.

    Raises:
      ValueError: if ``bits`` or ``octaves`` is out of range.
      TypeError: if ``bits`` is not an int.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.madam(moment_format=madax.MomentFormat(bits=8))
      >>> print(tx.init(jnp.ones(1000)).direction.nu.nbytes)
      1000
    """

    bits: int = 8
    octaves: int | None = None

    def __post_init__(self) -> None:
        beyond = "narrower moments would have less than two binary digits"
        check_bits(self.bits, 8, 16, beyond)
        if self.octaves is not None and (
            type(self.octaves) is not int or self.octaves not in (2, 4, 8, 16, 32)
        ):
            raise ValueError(
                f"octaves must be 2, 4, 8, 16, 32 or None, got {self.octaves!r}; None "
                "suits most optimizers."
            )

    def __repr__(self) -> str:
        octaves = "" if self.octaves is None else f", octaves={self.octaves}"
        return f"MomentFormat(bits={self.bits}{octaves})"

    @property
    def dtype(self) -> jnp.dtype:
        """The integer dtype of codes without a sign of their own: uint8 or uint16."""
        return jnp.dtype(jnp.uint8 if self.bits == 8 else jnp.uint16)


class MomentWindow(NamedTuple):
    """The octaves of stored moments: one entry per stored leaf, in flatten order.

    Attributes:
      octave: biased exponent of the min octave, int32, shape (number of stored
        leaves,), or () if there are none. In :func:`scale_by_second_moment` it belongs
        to the second moment, and is 0 before the first gradient.
      scale: unit of the values, float32 in [1, 2), same shape; a scalar in
        :func:`scale_by_second_moment`. The decay that all elements share goes here,
        because codes would be rounded.
      signed: 1 if a bit of the codes is a sign, else 0, int32, same shape; None in
        :func:`scale_by_second_moment`.
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
    """Raises unless a state was made for a format, by its ``repr``; None for floats.

    In the key of a window, dtypes may follow the format.
    """
    if made_for != wanted and not f"{made_for}".startswith(f"{wanted}, "):
        raise ValueError(
            f"moment_format is {wanted}, but the optimizer state was made for "
            f"{made_for}; call init again, or use the state's moment_format."
        )


class MomentGrid(NamedTuple):
    """A grid of non-negative floats, whose codes are some bits of a float32 pattern.

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
        """The codes of values, int32, stochastically rounded; negative below the grid.

        Args:
          x: values, float32, not negative, not NaN.
          bits: random bits, uint32: a low one is used for each bit that is cut.
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
