"""Layer 1, direction: the gradient over the root of its second moment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._checks import check_b1, check_decay
from madax._leaves import compute_dtype, flatten, flatten_like


class ScaleBySecondMomentState(NamedTuple):
    """State of :func:`scale_by_second_moment`.

    Attributes:
      count: number of steps taken, int32 scalar.
      v: second moment, a tree like the parameters, float32 or wider.
      m: first moment, likewise; None unless ``b1`` is given.
    """

    count: jax.Array
    v: Any
    m: Any


def scale_by_second_moment(
    b2: jax.typing.ArrayLike = 0.999, *, b1: jax.typing.ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Normalises each gradient element by the root of its second moment.

    .. math::

      v_t &= b_2 v_{t-1} + (1 - b_2) g_t^2, \qquad \hat v_t = v_t / (1 - b_2^t) \\
      \hat g_t &= g_t / \sqrt{\hat v_t}, \qquad 0/0 := 0

    There is no epsilon: :math:`\hat g` does not depend on the gradient's scale,
    and :math:`|\hat g| \le 1/\sqrt{1 - b_2}` (31.6 by default). With ``b1``, a
    bias-corrected first moment takes the place of :math:`g_t` in the numerator.

    A gradient element that is not finite, or whose square overflows, changes
    neither its moments nor its weight in that step. An element whose second
    moment is zero, or underflows to it, gives :math:`\hat g = 0`.

    Args:
      b2: decay rate of the second moment, in [0, 1).
      b1: decay rate of the first moment, in [0, 1); None for no first moment.

    Returns:
      A gradient transformation from gradients to :math:`\hat g`, in float32 or
      wider whatever the dtype of the gradients.

    Raises:
      ValueError: if a decay rate is out of range, or gradients do not match.
      TypeError: if a decay rate is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.scale_by_second_moment()
      >>> state = tx.init(jnp.ones(3))
      >>> direction, state = tx.update(jnp.array([1e-6, 0.0, -300.0]), state)
      >>> print(direction.round(3))
      [ 1.  0. -1.]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
      With ``b1``, the direction of Cornford et al., `Brain-like learning with
      exponentiated gradients <https://doi.org/10.1101/2024.10.25.620272>`_, 2024.
    """
    check_decay("b2", b2, 0.999)
    check_b1(b1)

    def init_fn(params):
        _, leaves, treedef = flatten(params)

        def zeros():
            return treedef.unflatten(
                [
                    jnp.zeros_like(w, compute_dtype(jnp.result_type(w)))
                    for w in leaves
                ]
            )

        return ScaleBySecondMomentState(
            count=jnp.zeros([], jnp.int32),
            v=zeros(),
            m=None if b1 is None else zeros(),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        paths, vs, treedef = flatten(state.v, "state.v")
        gs = flatten_like(updates, treedef, "state.v", paths, vs)
        count = optax.safe_increment(state.count)
        gs = [jnp.asarray(g).astype(v.dtype) for g, v in zip(gs, vs, strict=True)]
        usable = [jnp.isfinite(g * g) for g in gs]
        vs = [
            _moment(v, g * g, b2, ok) for v, g, ok in zip(vs, gs, usable, strict=True)
        ]
        if b1 is None:
            ms, numerators, correction = None, gs, 1.0
        else:
            ms = [
                _moment(m, g, b1, ok)
                for m, g, ok in zip(
                    treedef.flatten_up_to(state.m), gs, usable, strict=True
                )
            ]
            numerators, correction = ms, 1 / _bias_correction(b1, count)
        root = correction * jnp.sqrt(_bias_correction(b2, count))
        directions = [
            jnp.where(ok & (v > 0), n * (root.astype(v.dtype) / jnp.sqrt(v)), 0)
            for n, v, ok in zip(numerators, vs, usable, strict=True)
        ]
        new_state = ScaleBySecondMomentState(
            count=count,
            v=treedef.unflatten(vs),
            m=None if ms is None else treedef.unflatten(ms),
        )
        return treedef.unflatten(directions), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moment(moment: jax.Array, x: jax.Array, decay: Any, ok: jax.Array) -> jax.Array:
    """``decay * moment + (1 - decay) * x`` where ``ok``, else unchanged."""
    rate = jnp.asarray(1 - decay, moment.dtype)
    return moment + jnp.where(ok, rate * (x - moment), 0)


def _bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count``, without the cancellation that loses digits near 1."""
    rate = jnp.asarray(1 - decay, jnp.result_type(float))
    return -jnp.expm1(count * jnp.log1p(-rate))
