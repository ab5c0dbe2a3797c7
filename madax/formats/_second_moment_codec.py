"""Stores the moments of ``scale_by_second_moment`` as floats or as codes.

Both classes have the same two methods, which take a stored moment of a leaf and return
the stored moment after a gradient.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from madax._core.numerics import BIAS, MANTISSA, minus_product, moving_average
from madax._core.rounding import random_bits
from madax._core.shards import over_shards
from madax._core.vectors import shape_per_leaf, split_per_leaf
from madax.formats._moment_format import (
    SIGNED_OCTAVES,
    UNSIGNED_OCTAVES,
    MomentFormat,
    MomentGrid,
    MomentWindow,
    fraction_and_exponent,
    window_start,
)

# Before mu has its octaves, its grid starts here: the square of its min is a normal
# float32, with bits to spare.
_UNPLACED_MU = BIAS - 62
# Octaves of nu below the octave of the max nu of a leaf. A gradient of 1e-8 of the max
# is then stored as it is. So is one of 700 times the max, as a step adds only a
# thousandth of its square.
_BELOW = 54
# Windows follow in each of the first steps, and then in every eighth, because to follow
# takes a pass over the codes of nu. In between, the decay of nu lowers them.
_FIRST_STEPS, _INTERVAL = 8, 8
# Where the newest square is a larger fraction of nu, eight steps would be too many.
_FASTEST = 0.25


class SecondMoment(NamedTuple):
    """A second moment after a gradient."""

    stored: jax.Array
    exact: jax.Array  # before rounding
    counted: jax.Array  # whether the gradient of an element counts
    moved: jax.Array  # whether a weight moves: 0/0 does not


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FloatMoments:
    """The moments of a leaf, stored as floats."""

    def add_square(self, nu: jax.Array, g: jax.Array, rate: jax.Array) -> SecondMoment:
        """Returns the second moment after a gradient."""
        counted = g * g < jnp.inf
        nu = jnp.where(counted, moving_average(nu, g * g, rate), nu)
        return SecondMoment(nu, nu, counted, counted & (nu > 0))

    def add(
        self, mu: jax.Array, g: jax.Array, counted: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the first moment after a gradient, as stored and before rounding."""
        mu = jnp.where(counted, moving_average(mu, g, rate), mu)
        return mu, mu


@dataclasses.dataclass(frozen=True)
class SecondMomentCodec:
    """The grids of a second moment nu, and of a first moment mu beside it."""

    format: MomentFormat

    def __post_init__(self) -> None:
        if self.format.octaves is not None:
            raise ValueError(
                f"moment_format is {self.format}, but the octaves of these moments are "
                f"fixed; pass MomentFormat(bits={self.format.bits})."
            )

    @property
    def mu_dtype(self) -> jnp.dtype:
        """The integer dtype of the first moment's codes: int8 or int16."""
        return jnp.dtype(f"int{8 * self.format.dtype.itemsize}")

    @property
    def rounding_variance(self) -> float:
        """Relative variance of nu after many gradients: half the mean relative spacing.

        Each gradient adds its fraction of nu times the spacing, and decay halves that.
        """
        # 1 / (2 ln 2), the mean of 1 / m for m that is log-uniform in [1, 2).
        return 0.5 * 0.7213 * 2.0 ** -(self.format.bits - 6)

    @property
    def max_nu(self) -> int:
        """The max code of nu, also for values beyond; 254 octaves if not placed."""
        return min(2**self.format.bits - 1, 254 << (self.format.bits - 8))

    @property
    def max_mu(self) -> int:
        """The max code of ``|mu|``."""
        return 2 ** (self.format.bits - 1) - 1

    def nu_grid(self, octave: jax.Array) -> MomentGrid:
        """The grid of nu from an octave up."""
        return self._grid(octave, octave, 1)

    def mu_grid(self, octave: jax.Array) -> MomentGrid:
        """The grid of ``|mu|``, given the ``octave`` of nu."""
        # The max octave of mu squares to the max octave of nu; that gives the min.
        above = (octave + UNSIGNED_OCTAVES - BIAS + 1) >> 1
        return self._grid(octave, above - SIGNED_OCTAVES + BIAS, _UNPLACED_MU)

    def _grid(self, window: jax.Array, octave: jax.Array, unplaced: int) -> MomentGrid:
        # Before it is placed, a grid has more octaves and two digits fewer.
        placed, digits = window > 0, self.format.bits - 6
        shift = MANTISSA - jnp.where(placed, digits, digits - 2)
        return MomentGrid.above(jnp.where(placed, octave, unplaced), shift)

    def start(self, leaves: int) -> MomentWindow:
        """The window before the first gradient."""
        return MomentWindow(
            jnp.zeros(shape_per_leaf(leaves), jnp.int32), jnp.float32(1)
        )

    def follow(
        self,
        octave: jax.Array,
        count: jax.Array,
        nus: Sequence[jax.Array],
        octaves: jax.typing.ArrayLike,
        fast: jax.typing.ArrayLike,
    ) -> jax.Array:
        """The min octaves, moved to suit the codes before a step; 0 if all are zero.

        The decay of the unit of nu lowers its values by some ``octaves``. If it is
        ``fast``, a move is due in every step.
        """

        def suitable():
            most = jnp.stack([jnp.max(codes, initial=0) for codes in nus])
            top = self.nu_grid(octave).pattern(most) >> MANTISSA
            top = jnp.where(most > 0, top, 0)
            top = over_shards(jax.lax.pmax, top, octave)
            start = window_start(top - _BELOW, UNSIGNED_OCTAVES)
            return jnp.where(top > 0, start, 0)

        # The window follows the codes, not the gradients, or all gradients would have
        # to be computed before the first is used.
        due = (count < _FIRST_STEPS) | (count % _INTERVAL == 0) | fast
        start = jax.lax.cond(due, suitable, lambda: octave)
        # With a short memory, nu is about as large after the step as it was before, not
        # as small as its decayed part.
        lowered = jnp.maximum(start - jnp.where(fast, 0, octaves), 1)
        return jnp.where(start > 0, lowered, 0)


def is_fast(rate: jax.Array) -> jax.Array:
    """Whether the decay is so fast that windows move in each step."""
    # A value above the window is then stored as the max code, and still moves its
    # weight. The newest square is a large fraction of nu: divided by its root, it is no
    # outlier.
    return rate > _FASTEST


def decayed(scale: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(1 - rate) * scale`` in [1, 2) or NaN, and the octaves that it falls by."""
    # Beyond 100 octaves nothing is left of any nu, and the scale would underflow.
    product = jnp.maximum(minus_product(scale, rate, scale), 2.0**-100)
    fraction, exponent = fraction_and_exponent(product)
    return jnp.where(jnp.isnan(product), product, fraction), -exponent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedMoments:
    """The moments of a leaf, stored as codes."""

    codec: SecondMomentCodec = dataclasses.field(metadata={"static": True})
    before: jax.Array  # the min octave of nu before the step
    after: jax.Array  # and after it
    octaves: jax.Array  # which the decay of the unit of nu lowers its values by
    max_counted: jax.Array  # the max code of nu with which a gradient counts
    fraction: jax.Array  # of a squared gradient in nu, in the unit after the step
    nu_key: jax.Array
    mu_key: jax.Array | None = None

    def add_square(self, nu: jax.Array, g: jax.Array, rate: jax.Array) -> SecondMoment:
        """Like ``FloatMoments.add_square``, but relative to the unit of nu."""
        del rate
        old = self.codec.nu_grid(self.before).lowered(self.octaves)
        new = self.codec.nu_grid(self.after)
        added = self.fraction * (g * g)
        fits = added < jnp.inf
        # A choice between product and sum keeps them from being fused, as `rounded`
        # would.
        value = old.value(nu) + jnp.where(fits, added, 0)
        code = new.encode(value, random_bits(self.nu_key, nu.shape))
        stored = jnp.clip(code, 0, self.codec.max_nu).astype(nu.dtype)
        # The max code may stand for values beyond it. That the direction depends on the
        # stored code lets XLA make one kernel of both.
        counted = fits & (stored <= self.max_counted)
        return SecondMoment(stored, value, counted, counted)

    def add(
        self, mu: jax.Array, g: jax.Array, counted: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Like ``FloatMoments.add``."""
        assert self.mu_key is not None
        old, new = map(self.codec.mu_grid, (self.before, self.after))
        size = old.value_from_zero(jnp.abs(mu.astype(jnp.int32)))
        value = jnp.where(mu < 0, -size, size)
        value = jnp.where(counted, moving_average(value, g, rate), value)
        bits = random_bits(self.mu_key, mu.shape)
        code = new.encode_from_zero(jnp.abs(value), bits, self.codec.max_mu)
        return jnp.where(value < 0, -code, code).astype(mu.dtype), value


def coded_moments(
    codec: SecondMomentCodec,
    window: MomentWindow,
    nus: Sequence[jax.Array],
    rate: jax.Array,
    count: jax.Array,
    keys: Sequence[jax.Array],
) -> tuple[list[CodedMoments], MomentWindow]:
    """Returns how a step stores the moments of each leaf, and the window after it."""
    scale, octaves = decayed(window.scale, rate.astype(jnp.float32))
    fast = is_fast(rate)
    after = codec.follow(window.octave, count, nus, octaves, fast)
    fraction = (rate / scale).astype(jnp.float32)
    max_counted = jnp.where(fast, codec.max_nu, codec.max_nu - 1)
    max_counted = max_counted.astype(codec.format.dtype)
    storages = [
        CodedMoments(codec, old, new, octaves, max_counted, fraction, *key)
        for old, new, *key in split_per_leaf((window.octave, after, *keys), len(nus))
    ]
    return storages, MomentWindow(after, scale)
