"""Direction: the gradient over second moments of the rows and columns of a matrix."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_decay, check_state
from madax._core.leaf_names import Axes
from madax._core.names import Tree
from madax._core.numerics import (
    decay_rate,
    divided_or_same,
    incremented,
    moving_average,
)
from madax.codes._array import is_quantized
from madax.codes._leaves import compute_dtype, flatten
from madax.codes._scales import root_mean_square
from madax.transforms._matrices import Matrices, all_axes
from madax.transforms._second_moment import Direction, bias_correction


class ScaleByFactoredSecondMomentState(NamedTuple):
    """State of :func:`scale_by_factored_second_moment`.

    The moments are in tuples, in flatten order, because their shapes differ from the
    parameters', so the sharding of a parameter must not be copied to them. A scalar
    stands for no leaves, which ``optax.tree.map_params`` can tell from a parameter.

    Attributes:
      count: number of steps taken, int32 scalar.
      nu_in: for each leaf, mean squares over the outputs: the shape of the leaf, but 1
        for the output axes; float32 or wider.
      nu_out: likewise mean squares over the inputs, with 1 for the input axes.
    """

    count: jax.Array
    nu_in: tuple[jax.Array, ...] | jax.Array
    nu_out: tuple[jax.Array, ...] | jax.Array


class FactoredMoments(NamedTuple):
    """The state without the count, for optimizers, which have one count."""

    nu_in: tuple[jax.Array, ...] | jax.Array
    nu_out: tuple[jax.Array, ...] | jax.Array

    def pairs(self) -> list[tuple[jax.Array, jax.Array]]:
        """The two moments of each leaf."""
        return list(zip(*self, strict=True)) if isinstance(self.nu_in, tuple) else []


def scale_by_factored_second_moment(
    b2: ArrayLike = 0.999, *, matrices: Matrices | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients of matrices by second moments of their rows and columns.

    .. math::

      r_t &= b_2 r_{t-1} + (1 - b_2)\, \mathrm{mean}_\text{out}(g_t^2), \qquad
        c_t = b_2 c_{t-1} + (1 - b_2)\, \mathrm{mean}_\text{in}(g_t^2) \\
      \hat g_t &= g_t\,
        \sqrt{(1 - b_2^t)\, \mathrm{mean}(r_t)} / \sqrt{r_t c_t}, \qquad 0/0 := 0

    This is the second moment of Adafactor: two vectors instead of a matrix, which are
    0.05 % of its elements at a width of 4096. A gradient element that is not finite, or
    whose square overflows, counts as zero.

    Args:
      b2: decay rate of the second moments, in [0, 1).
      matrices: as for :func:`scale_by_orthogonal_momentum`.

    Returns:
      A gradient transformation from gradients to directions with a root mean square of
      about 1, float32 or wider. All leaves must be matrices.

    Raises:
      ValueError: if ``b2`` is out of range, a leaf is not a matrix, or the state was
        made for other shapes.
      TypeError: if an argument is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.transforms.scale_by_factored_second_moment()
      >>> g = jnp.array([[1e-6, -2e-6], [3e-3, 6e-3]])
      >>> direction, state = tx.update(g, tx.init(g))
      >>> print(direction.round(2), state.nu_in[0].shape, state.nu_out[0].shape)
      [[ 1. -1.]
       [ 1.  1.]] (2, 1) (1, 2)

    References:
      Shazeer and Stern, `Adafactor: adaptive learning rates with sublinear memory cost
      <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    tx = factored_second_moment(check_decay("b2", b2, 0.999), all_axes(matrices))

    def init_fn(params):
        return ScaleByFactoredSecondMomentState(
            jnp.zeros([], jnp.int32), *tx.init(params)
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, ScaleByFactoredSecondMomentState)
        count, *moments = state
        directions, moments = tx.update(
            updates, FactoredMoments(*moments), params, count=count
        )
        count = incremented(count)
        return directions, ScaleByFactoredSecondMomentState(count, *moments)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def factored_second_moment(
    b2: ArrayLike, axes_of: Callable[..., Sequence[Tree]]
) -> Direction:
    """Like :func:`scale_by_factored_second_moment`, for a caller that counts steps."""

    def init_fn(params):
        paths, leaves, _ = flatten(params)
        kept = [
            [_zeros_along(leaf, others) for others in axes[::-1]]
            for leaf, axes in zip(leaves, axes_of(paths, leaves), strict=True)
        ]
        return _moments_of(kept)

    def update_fn(updates, state, params=None, *, count, **extra_args):
        del params, extra_args
        check_state(state, FactoredMoments)
        paths, gs, treedef = flatten(updates, "updates")
        axes, rate = axes_of(paths, gs), decay_rate(b2)
        wanted = list(map(_shapes, gs, axes))
        pairs = state.pairs()
        found = [tuple(map(np.shape, pair)) for pair in pairs]
        if found != wanted:
            raise ValueError(
                f"the optimizer state has second moments of the shapes {found}, but "
                f"updates need {wanted}; call init again with these params."
            )
        steps = incremented(count)
        correction = jnp.sqrt(bias_correction(b2, steps))
        directions, kept = [], []
        leaves = zip(gs, pairs, axes, strict=True)
        for g, (nu_in, nu_out), (inputs, outputs) in leaves:
            g = jnp.asarray(g).astype(nu_in.dtype)
            g = jnp.where(jnp.isfinite(g * g), g, 0)
            rms_in, rms_out = (
                root_mean_square(g, ax, keepdims=True) for ax in (outputs, inputs)
            )
            nu_in = moving_average(nu_in, rms_in * rms_in, rate)
            nu_out = moving_average(nu_out, rms_out * rms_out, rate)
            root_in = jnp.sqrt(nu_in)
            # The root mean square of roots is the root of the mean.
            mean = root_mean_square(root_in, inputs, keepdims=True)
            d = divided_or_same(g * (mean * correction), jnp.sqrt(nu_out))
            d = divided_or_same(d, root_in)
            directions.append(d)
            kept.append((nu_in, nu_out))
        return treedef.unflatten(directions), _moments_of(kept)

    return Direction(init_fn, update_fn)


def _moments_of(
    kept: Sequence[Sequence[jax.Array]],
) -> FactoredMoments:
    if not kept:
        # One array twice could not be donated.
        return FactoredMoments(*(jnp.zeros([], jnp.float32) for _ in range(2)))
    nu_in, nu_out = (tuple(pair[i] for pair in kept) for i in (0, 1))
    return FactoredMoments(nu_in, nu_out)


def _zeros_along(leaf: Tree, others: Sequence[int]) -> jax.Array:
    """Zeros of the shape of a leaf, but 1 for the other axes, sharded as it is."""
    # A reduction of the leaf is sharded as the moments will be.
    array = leaf.codes if is_quantized(leaf) else leaf
    reduced = jnp.any(array, tuple(others), keepdims=True)
    return jnp.zeros_like(reduced, compute_dtype(leaf))


def _shapes(leaf: Tree, axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the moments of a leaf."""
    inputs, outputs = (
        tuple(1 if i in others else n for i, n in enumerate(np.shape(leaf)))
        for others in (axes[1], axes[0])
    )
    return inputs, outputs
