"""Layer 2, geometry: the bound on |w|."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._checks import check_non_negative, check_positive
from madax._leaves import (
    flatten_both,
    initial_scales,
    largest_weight,
    per_leaf,
    widen,
)
from madax._quantized_array import is_quantized


class ClipLogWeightsState(NamedTuple):
    """State of :func:`clip_log_weights`: an entry a float leaf, in flatten order.

    Attributes:
      rms0: root mean square of each leaf at init, or ``zero_init_scale`` where the
        leaf was all zeros; float32 or wider, shape (number of float leaves,), or
        () if there are none.
    """

    rms0: jax.Array


def clip_log_weights(
    p_scale: jax.typing.ArrayLike = 3.0,
    *,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps every weight within a bound frozen at init.

    .. math:: |w + u| \le p_\text{scale} \cdot \mathrm{rms}_0

    where :math:`\mathrm{rms}_0` is the root mean square of the weight's leaf at
    init. Exponential growth needs such a bound. An update that stays within it
    passes through bit for bit; one that does not lands on the bound, to within a
    rounding of the parameters' dtype. Updates of quantised leaves pass through:
    the range of their codes is the bound.

    .. warning::
      Comes after :func:`scale_by_sign_log`, and before nothing but storage.

    Args:
      p_scale: the bound, relative to the root mean square of the leaf at init;
        ``inf`` for no bound but the largest number of the dtype.
      zero_init_scale: stands in for the root mean square of a leaf that is all
        zeros at init, in units of the weights; 0 is the paper, which pins such a
        leaf to zero.

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
    check_positive("p_scale", p_scale, 3.0)
    check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init_fn(params):
        _, rms0, _ = initial_scales(params, zero_init_scale)
        return ClipLogWeightsState(rms0)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _, ws, us, treedef = flatten_both(params, updates)
        bounds = jnp.where(state.rms0 > 0, p_scale * state.rms0, 0)  # not inf * 0
        bounds = jnp.where(jnp.isnan(bounds), jnp.inf, bounds)
        us = [
            u if is_quantized(w) else clip_update(w, u, bound)
            for w, u, bound in zip(ws, us, per_leaf(bounds, ws), strict=True)
        ]
        return treedef.unflatten(us), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_update(w: jax.Array, u: jax.Array, bound: jax.Array) -> jax.Array:
    """Shortens ``u`` so that ``|w + u| <= bound``; otherwise leaves it alone."""
    x, u = widen(w), widen(u)
    largest = largest_weight(jnp.result_type(w))
    bound = jnp.minimum(bound, largest)
    moved = x + u
    # Not clip(moved) - x everywhere: that would round updates that need no clipping.
    u = jnp.where(jnp.abs(moved) <= bound, u, jnp.clip(moved, -bound, bound) - x)
    # From one end of the dtype to the other is two steps.
    return jnp.clip(u, -largest, largest)
