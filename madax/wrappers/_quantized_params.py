"""Any optax transform on parameters that are codes: decode, update, encode."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import (
    check_format,
    check_seed,
    check_state,
    check_transformation,
    check_where,
    type_error,
)
from madax._core.names import Tree
from madax._core.numerics import incremented
from madax._core.rounding import Rounding, check_rounding, keys_per_leaf
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten_both, widened_for_codes
from madax.codes._quantize import decoded
from madax.codes._scales import check_code_scales
from madax.codes._steps import as_steps, rounded_sum
from madax.formats._moment_format import MomentFormat
from madax.wrappers._error_feedback import ErrorFeedback, place_and_reason
from madax.wrappers._quantized_state import Where, with_quantized_state


class WithQuantizedParamsState(NamedTuple):
    """State of :func:`with_quantized_params`.

    Attributes:
      count: number of steps taken, int32 scalar.
      inner_state: state of the inner optimizer, for decoded parameters.
      slope: with error feedback, the derivative of an update with respect to the
        momentum, for a second moment of 1: float32, shape (leaves of codes,), or () if
        there are none; 0 before the first step with a learning rate above 0. None
        without error feedback.
    """

    count: jax.Array
    inner_state: Tree
    slope: Tree = None


def with_quantized_params(
    inner: optax.GradientTransformation,
    *,
    moment_format: MomentFormat | None = None,
    error_feedback: bool = False,
    moment_where: Where | None = None,
    rounding: Rounding = "stochastic",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets any optax optimizer train quantised parameters.

    Each quantised leaf is decoded, the inner optimizer proposes an additive update
    :math:`u`, and :math:`w + u` is encoded and rounded. There is no float copy of the
    weights between steps. The inner optimizer trains float leaves. Stochastic rounding
    keeps the mean of the value, also where the spacing of codes varies. With
    ``moment_format``, the moments of ``inner`` become codes, too, as in
    :func:`with_quantized_state`: Adam on 8-bit codes then takes three bytes per
    parameter.

    Error feedback puts the errors of rounding into the momentum of ``inner``, and so
    into the next updates:

    .. math:: m \leftarrow m + (1 - \beta)\, e / s

    where :math:`e` is the rounding error of the value, and :math:`s` and :math:`\beta`
    are the derivatives of the update and of the new momentum with respect to the old
    momentum. It keeps one number for each leaf of codes. Without error feedback, errors
    add up to a random walk, and their noise in a weight does not fall with the learning
    rate. Where the rate rises faster than the momentum decays, as in a warm restart,
    the momentum of codes is reduced in proportion, because its errors were counted at
    the lower rate. Float leaves get the update of ``inner`` to the bit.

    Error feedback is for optimizers whose update is a linear function of one momentum,
    element by element: SGD, Adam, AdamW, NAdam, AMSGrad, AdaMax. Others raise an error:
    Lion and other signs, Muon, LAMB, a clip of updates, averages of updates, centred
    RMSProp, AdaBelief, schedule-free. With error feedback, a step calls ``inner`` three
    times, once for single elements; compilers drop unused results, but not callbacks.

    :func:`madam` and :func:`muon_madam` need no wrapper: they train codes natively.

    Args:
      inner: any optax optimizer.
      moment_format: the format of moments, such as ``MomentFormat(bits=8)``; None to
        leave them as ``inner`` has them.
      error_feedback: whether to put errors of rounding into the momentum of ``inner``,
        a field ``mu`` or ``trace`` of its state.
      moment_where: ``moment_where(path, leaf)`` tells which leaves of the state of
        ``inner`` are stored, as ``where`` does in :func:`with_quantized_state`.
      rounding: "stochastic", or "nearest" (halves to even).
      seed: seed of the stochastic rounding.

    Returns:
      An optimizer for trees that mix arrays and :class:`QuantizedArray`; its updates
      add to them under ``optax.apply_updates``.

    Raises:
      ValueError: if ``params`` are missing or do not match, codes have no scale,
        ``rounding`` is unknown, error feedback is wrong for ``inner``, moments cannot
        be stored as codes, or ``moment_where`` comes without ``moment_format``.
      TypeError: if an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> params = madax.quantize_params(jnp.ones((4, 4)), madax.UniformFormat(bits=8))
      >>> tx = madax.with_quantized_params(optax.adam(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jnp.ones((4, 4)), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params.dequantize().mean():.1f}")
      -1.0

    References:
      Nikdan et al., `ECO: quantized training without full-precision master weights
      <https://arxiv.org/abs/2601.22101>`_, 2026, for error feedback.
    """
    check_transformation("inner", inner)
    if not isinstance(error_feedback, bool):
        remedy = "pass True to keep rounding errors in the momentum"
        raise type_error("error_feedback", "True or False", error_feedback, remedy)
    check_format("moment_format", moment_format, MomentFormat)
    check_where(moment_where, "moment_where")
    check_rounding(rounding)
    check_seed(seed)
    if moment_where is not None and moment_format is None:
        raise ValueError(
            "moment_where selects moments for moment_format, but moment_format is "
            "None; pass moment_format=madax.MomentFormat(bits=8)."
        )
    on_params = partial(
        _quantized_params, error_feedback=error_feedback, rounding=rounding, seed=seed
    )
    if moment_format is None:
        return on_params(inner)
    on_state = partial(
        with_quantized_state, moment_format=moment_format, rounding=rounding, seed=seed
    )
    # Error feedback adds to a float momentum, so codes of moments go around it.
    if error_feedback:
        where = moment_where and _inside(moment_where)
        return on_state(on_params(inner), where=where)
    return on_params(on_state(inner, where=moment_where))


def _quantized_params(
    inner: optax.GradientTransformation,
    *,
    error_feedback: bool,
    rounding: Rounding,
    seed: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """Like :func:`with_quantized_params`, with the moments that ``inner`` has."""
    inner = optax.with_extra_args_support(inner)
    known = lru_cache(maxsize=64)(partial(place_and_reason, inner))
    feedback_of = partial(ErrorFeedback, inner, known)

    def init_fn(params):
        check_code_scales(params)
        inner_state = inner.init(decoded(params))
        slope = None
        if error_feedback:
            slope = feedback_of(None, params, {}).zero_slopes(inner_state)
        return WithQuantizedParamsState(jnp.zeros([], jnp.int32), inner_state, slope)

    def update_fn(updates, state, params: Tree = None, **extra_args):
        check_state(state, WithQuantizedParamsState)
        paths, ws, gs, treedef = flatten_both(params, updates)
        updates = treedef.unflatten(widened_for_codes(ws, gs))
        values, slope = decoded(params), state.slope
        before = state.inner_state
        feedback = feedback_of(updates, params, extra_args)
        if error_feedback:
            feedback.check()
            before, slope = feedback.limited_momentum(before, slope)
        proposed, inner_state = inner.update(updates, before, values, **extra_args)
        us = treedef.flatten_up_to(proposed)
        layer = extra_args.get("madax_layer")
        keys = keys_per_leaf(seed, state.count, paths, layer, separate_kernels=True)
        moves = {
            i: rounded_sum(ws[i], us[i], key, rounding)
            for i, key in enumerate(keys)
            if is_quantized(ws[i])
        }
        if error_feedback:
            moved = list(moves.values())
            inner_state, again = feedback.state_with_errors(before, moved)
            moves = dict(zip(moves, again, strict=True))
        for i, move in moves.items():
            us[i] = as_steps(ws[i], move)
        count = incremented(state.count)
        new_state = WithQuantizedParamsState(count, inner_state, slope)
        return treedef.unflatten(us), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _inside(where: Where) -> Where:
    """Returns ``where`` for the state of :func:`with_quantized_params`."""
    prefix = "inner_state/"
    return lambda path, x: path.startswith(prefix) and where(path[len(prefix) :], x)
