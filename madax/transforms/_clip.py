"""Geometry: the bound on |w|."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._core.checks import (
    CLIPPED,
    check_non_negative,
    check_positive,
    check_state,
    in_percent,
    leaf_name,
    warn_of_leaves,
)
from madax._core.leaf_kinds import read_leaves
from madax._core.numerics import within
from madax._core.vectors import awaited, known_values
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten, flatten_both, max_weight, per_leaf, widen
from madax.codes._scales import fraction_above, initial_scales


class ClipLogWeightsState(NamedTuple):
    """State of :func:`clip_log_weights`: one entry per float leaf, in flatten order.

    Attributes:
      rms0: root mean square of each leaf at init, or ``zero_init_scale`` where the
        leaf was all zeros; float32 or wider, shape (number of float leaves,), or
        () if there are none.
      peak0: largest magnitude in each leaf at init; same dtype and shape.
    """

    rms0: jax.Array
    peak0: jax.Array


def clip_log_weights(
    p_scale: jax.typing.ArrayLike | None = None,
    *,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps weights within a bound frozen at init.

    .. math:: |w + u| \le \max(3\, \mathrm{rms}_0, \max |w_0|)

    where :math:`\mathrm{rms}_0` is the root mean square of the weight's leaf at init,
    and :math:`\max |w_0|` the largest magnitude in it. This bound keeps matrices from
    running away at a high rate. All other leaves are free to grow up to the largest
    number of their dtype, because their size at init says nothing about how large they
    have to become: a gain of a residual branch starts at 1e-6, a bias at zero. Free
    are leaves of rank below 2, leaves that are called a norm, a scale, a gain or a bias
    (whatever their rank, as in stacked layers), and leaves that are all zeros at init.

    With a number for ``p_scale`` every leaf has the bound of the paper,
    :math:`p_\text{scale}\, \mathrm{rms}_0`. Weights that are beyond it at init, such
    as outliers of pretrained weights, are clipped by the first step, and a warning says
    so. :func:`madax.diagnostics.fraction_at_bound` tells which leaves are at their
    bound during training.

    An update that stays within the bound passes through bit for bit. Any other lands on
    the bound, to within a rounding of the parameters' dtype. Updates of quantised
    leaves pass through: the range of their codes is the bound.

    .. warning::
      It comes after :func:`scale_by_sign_log`; only storage may follow.

    Args:
      p_scale: the bound on every leaf, relative to its root mean square at init; None
        for a bound on matrices alone, which clips no weight at init; ``inf`` for no
        bound except the largest number of the dtype.
      zero_init_scale: stands in for the root mean square of a leaf that is all
        zeros at init, in units of the weights, where ``p_scale`` is a number; 0 is the
        paper, which pins such a leaf to zero.

    Returns:
      A gradient transformation from updates to updates, float32 or wider, which
      :func:`lns_quantize` rounds to the parameters' dtype.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> tx = madax.clip_log_weights(p_scale=2.0)
      >>> w = jnp.array([1.0, -1.0])
      >>> updates, _ = tx.update(jnp.array([0.5, -7.0]), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates))
      [ 1.5 -2. ]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    if p_scale is not None:
        p_scale = check_positive("p_scale", p_scale, None)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init_fn(params):
        first = initial_scales(params, zero_init_scale)
        state = ClipLogWeightsState(first.rms0, first.peak0)
        if p_scale is not None:
            _warn_of_clipped_leaves(params, weight_bounds(p_scale, *state), state.peak0)
        return state

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, ClipLogWeightsState)
        paths, ws, us, treedef = flatten_both(params, updates)
        bounds = leaf_bounds(p_scale, state, paths, ws)
        us = [
            u if is_quantized(w) else clip_update(w, u, bound)
            for w, u, bound in zip(ws, us, bounds, strict=True)
        ]
        return treedef.unflatten(us), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def weight_bounds(
    p_scale: jax.typing.ArrayLike | None, rms0: jax.Array, peak0: jax.Array
) -> jax.Array:
    """The bound that its scale at init gives each float leaf, free or not."""
    if p_scale is None:
        return jnp.maximum(3 * rms0, peak0)
    bounds = jnp.where(rms0 > 0, p_scale * rms0, 0)  # not inf * 0
    return bounds.astype(rms0.dtype)


def leaf_bounds(
    p_scale: jax.typing.ArrayLike | None,
    state: ClipLogWeightsState,
    paths: Sequence[str],
    leaves: Sequence[Any],
) -> list[Any]:
    """The bound on each leaf, a scalar; quantised leaves have none to use."""
    bounds = weight_bounds(p_scale, *state)
    free = [False] * len(leaves)
    if p_scale is None:
        bounds = jnp.where(state.peak0 > 0, bounds, jnp.inf)  # zeros have no size
        free = _are_vectors(paths, leaves)
    scalars = zip(free, per_leaf(bounds, leaves), strict=True)
    return [jnp.inf if is_free else bound for is_free, bound in scalars]


def _are_vectors(paths: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Whether each leaf is a vector, or a stack of them; in doubt it is a matrix."""
    return [x.kind == "vector" for x in read_leaves(paths, map(np.shape, leaves))]


@jax.jit
def clip_update(w: jax.Array, u: jax.Array, bound: jax.Array) -> jax.Array:
    """Shortens ``u`` so that ``|w + u| <= bound``; otherwise leaves it alone."""
    x = widen(w)
    bound = jnp.minimum(bound, max_weight(jnp.result_type(w))).astype(x.dtype)
    # A bound is NaN if a traced p_scale is out of range. The weights show it.
    u = jnp.where(bound >= 0, u.astype(x.dtype), jnp.nan)
    return within(u, -bound - x, bound - x)


def _warn_of_clipped_leaves(params: Any, bounds: jax.Array, peaks: jax.Array) -> None:
    beyond = known_values(peaks > bounds * (1 + 1e-5))  # not by a rounding
    if not beyond.any():
        return
    paths, leaves, _ = flatten(params)
    floats = [
        leaf for leaf in zip(paths, leaves, strict=True) if not is_quantized(leaf[1])
    ]
    clipped = [
        (leaf_name("params", path), awaited(fraction_above(w, bound)))
        for (path, w), bound, too_far in zip(
            floats, known_values(bounds), beyond, strict=True
        )
        if too_far
    ]
    warn_of_leaves(in_percent(clipped), CLIPPED, stacklevel=3)
