"""Geometry: an additive step in log|w|."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import check_non_negative, check_state
from madax._core.numerics import fast_expm1, within
from madax._core.vectors import known_values
from madax.codes._array import is_quantized
from madax.codes._leaves import compute_dtype, flatten_both, per_leaf, widen
from madax.codes._scales import check_code_scales, initial_scales

_LARGEST = 80.0  # the largest log-step, which takes any weight to its bound


class ScaleBySignLogState(NamedTuple):
    """State of :func:`scale_by_sign_log`: one entry per float leaf, in flatten order.

    Attributes:
      rms0: root mean square of each leaf at init, or ``zero_init_scale`` where the
        leaf was all zeros; float32 or wider, shape (number of float leaves,), or
        () if there are none.
      zero_init: which leaves were all zeros at init; bool, same shape.
    """

    rms0: jax.Array
    zero_init: jax.Array


def scale_by_sign_log(
    *,
    floor: jax.typing.ArrayLike = 0.0,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns log-steps into additive updates that multiply the weights.

    .. math::

      u = w \,\mathrm{expm1}(\mathrm{sign}(w)\, d)
      \qquad\Longrightarrow\qquad
      w + u = w \, e^{\mathrm{sign}(w)\, d}

    A positive log-step ``d`` (nats) moves the weight upwards: it grows a positive
    weight and shrinks a negative one. A weight keeps its sign and never leaves 0.

    But networks have leaves that must leave 0: biases, gates and last layers that
    start there. So up to a magnitude :math:`f` the step is additive,

    .. math:: u = f d \quad\text{where}\quad |w| \le f = \text{floor} \cdot
        \mathrm{rms}_0

    and the step in weight space is :math:`\max(|w|, f)` times the log-step. A leaf
    that is all zeros at init gets :math:`\mathrm{rms}_0` := ``zero_init_scale`` and
    floor 1. With ``floor=0`` an exact zero in any other leaf stays zero, so pruning
    masks survive; ``floor=0, zero_init_scale=0`` is the paper's rule to the letter.

    A quantised leaf needs no exponential: there the step becomes a number of codes,
    still real-valued, ``d / base_step`` for a ``LogFormat``, to be rounded by
    :func:`lns_quantize`. Its format decides how it behaves near zero.

    A log-step that is not finite leaves its weight unchanged. In :func:`madam` and the
    other optimizers directions are finite, so a NaN comes from a hyperparameter, and
    makes float weights NaN. Log-steps of float weights saturate at 80 nats.

    .. warning::
      Only :func:`clip_log_weights` and storage transforms may come after this one:
      anything that rescales ``u`` breaks the exponential law. Scale the log-step,
      before this transform, instead.

    Args:
      floor: magnitude below which steps are additive, relative to the root mean
        square of the leaf at init; 0 is the paper.
      zero_init_scale: the scale given to a leaf of zeros, in units of the weights.

    Returns:
      A gradient transformation from log-steps to updates, float32 or wider, which
      :func:`lns_quantize` rounds to the parameters' dtype.

    Raises:
      ValueError: if an argument is negative or not finite, ``params`` are missing
        or do not match, or codes have no scale.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> tx = madax.scale_by_sign_log()
      >>> w = jnp.array([2.0, -2.0, 0.0])
      >>> log_step = jnp.full(3, jnp.log(1.5))
      >>> updates, _ = tx.update(log_step, tx.init(w), w)
      >>> print(optax.apply_updates(w, updates))
      [ 3.        -1.3333334  0.       ]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    return sign_log(floor, zero_init_scale, skips=True)


def sign_log(
    floor: jax.typing.ArrayLike, zero_init_scale: jax.typing.ArrayLike, *, skips: bool
) -> optax.GradientTransformationExtraArgs:
    """As :func:`scale_by_sign_log`, which ``skips`` log-steps that are not finite.

    If it does not, a NaN makes a float weight NaN. In the optimizers it can only come
    from a hyperparameter, as directions are finite.
    """
    floor = check_non_negative("floor", floor, 0.0)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init_fn(params):
        check_code_scales(params)
        first = initial_scales(params, zero_init_scale)
        _warn_of_stuck_leaves(first.paths, first.rms0)
        return ScaleBySignLogState(first.rms0, first.zero_init)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, ScaleBySignLogState)
        _, ws, ds, treedef = flatten_both(params, updates)
        floors = per_leaf(additive_floors(floor, *state), ws)
        leaves = zip(ws, ds, floors, strict=True)
        return treedef.unflatten([_update(*leaf, skips) for leaf in leaves]), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def additive_floors(
    floor: jax.typing.ArrayLike, rms0: jax.Array, zero_init: jax.Array
) -> jax.Array:
    """The magnitudes up to which steps are additive, one per float leaf."""
    floors = jnp.where(zero_init, 1.0, floor) * rms0
    # A step of `_LARGEST` floors does not overflow.
    return jnp.minimum(floors, jnp.finfo(rms0.dtype).max / 128).astype(rms0.dtype)


@partial(jax.jit, static_argnums=3)
def _update(w: Any, d: jax.Array, floor: Any, skips: bool) -> jax.Array:
    """The update that takes log-step ``d`` from ``w``; additive up to the floor."""
    d = jnp.asarray(d, compute_dtype(w))
    if is_quantized(w):
        return w.format.log_step(w.codes, d)
    d = within(jnp.where(jnp.isfinite(d), d, 0) if skips else d, -_LARGEST, _LARGEST)
    x = widen(w)
    floor = floor.astype(x.dtype)
    # Floats, unlike codes, need not be the same bits everywhere. So GPUs and TPUs take
    # their instruction, and CPUs a polynomial without a division.
    growth = jax.lax.platform_dependent(
        jnp.where(x < 0, -d, d), cpu=fast_expm1, default=jnp.expm1
    )
    return jnp.where(jnp.abs(x) > floor, x * growth, floor * d)


def _warn_of_stuck_leaves(paths, rms0) -> None:
    stuck = [
        path or "params"
        for path, scale in zip(paths, known_values(rms0), strict=False)
        if scale == 0
    ]
    if stuck:
        warnings.warn(
            f"{', '.join(stuck)}: all zeros at init, so a multiplicative update with "
            "zero_init_scale=0 can never move them; initialise them with non-zero "
            "values, leave zero_init_scale at its default, or train them with "
            "another optimizer through optax.partition.",
            UserWarning,
            stacklevel=3,
        )
