"""Direction: decay of the weights, as a part of the log-step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import check_non_negative, check_state
from madax._core.numerics import relative_to, rounded
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten_both, per_leaf, widen
from madax.codes._scales import initial_scales
from madax.transforms._sign_log import additive_floors


class AddDecayedLogWeightsState(NamedTuple):
    """State of :func:`add_decayed_log_weights`: that of ``scale_by_sign_log``.

    Attributes:
      rms0: root mean square of each float leaf at init, or ``zero_init_scale`` where
        the leaf was all zeros; float32 or wider, shape (number of float leaves,), or
        () if there are none.
      zero_init: which leaves were all zeros at init; bool, same shape.
    """

    rms0: jax.Array
    zero_init: jax.Array


def add_decayed_log_weights(
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    floor: jax.typing.ArrayLike = 0.0,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds decoupled weight decay, that of AdamW, to the direction of a log-step.

    .. math:: \hat g \leftarrow \hat g + \lambda\, \frac{w}{\max(|w|, f)}

    where :math:`f` is the magnitude up to which :func:`scale_by_sign_log` steps
    additively. After a learning rate :math:`\eta` and that transform this is
    :math:`w \leftarrow w - \eta \lambda w`, exactly where steps are additive, and
    :math:`w \leftarrow w\, e^{-\eta\lambda}` where they multiply. Codes decay by the
    same share, whatever their format: no weight is decoded.

    .. warning::
      It comes after :func:`scale_by_second_moment` and any clip of its direction, and
      before the learning rate. Decay of the gradient, as of
      ``optax.add_decayed_weights`` before :func:`madam`, is normalised away: without
      any other gradient, a decay of 1e-6 and one of 0.1 do the same.

    Args:
      weight_decay: :math:`\lambda`, the share of a weight that a step of rate 1 takes.
      mask: which leaves decay, as in optax: a tree of booleans like the parameters,
        or a function from them to one; None for all.
      floor: as of :func:`scale_by_sign_log`.
      zero_init_scale: as of :func:`scale_by_sign_log`.

    Returns:
      A gradient transformation from directions to directions, float32 or wider.

    Raises:
      ValueError: if an argument is negative or not finite, ``params`` are missing or
        do not match.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> tx = madax.transforms.add_decayed_log_weights(0.1)
      >>> w = jnp.array([2.0, -0.5, 0.0])
      >>> direction, _ = tx.update(jnp.zeros(3), tx.init(w), w)
      >>> print(direction)
      [ 0.1 -0.1  0. ]

    References:
      Loshchilov and Hutter, `Decoupled weight decay regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    weight_decay = check_non_negative("weight_decay", weight_decay, 0.0)
    floor = check_non_negative("floor", floor, 0.0)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init_fn(params):
        first = initial_scales(params, zero_init_scale)
        return AddDecayedLogWeightsState(first.rms0, first.zero_init)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, AddDecayedLogWeightsState)
        _, ws, ds, treedef = flatten_both(params, updates)
        floors = per_leaf(additive_floors(floor, *state), ws)
        ds = [
            widen(d) + rounded(jnp.asarray(weight_decay * _relative_step(w, f)))
            for w, d, f in zip(ws, ds, floors, strict=True)
        ]
        return treedef.unflatten(ds), state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def _relative_step(w: Any, floor: Any) -> jax.Array:
    """The log-step that changes a weight by a share of itself, over that share."""
    if is_quantized(w):
        return w.format.relative_step(w.codes)
    x = widen(w)
    in_floors = relative_to(jnp.where(floor > 0, floor, 1), x)
    return jnp.where(jnp.abs(x) > floor, jnp.sign(x), in_floors)
