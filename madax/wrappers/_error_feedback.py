"""Error feedback: a momentum makes up for what the rounding of codes lost.

In each element, the previous momentum enters the update with a factor, the slope, and
the new momentum with another, the decay. An amount added to the momentum therefore adds
slope * (1 + decay + decay**2 + ...) times as much to the updates that follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.names import Tree
from madax._core.numerics import rounded
from madax._core.shards import barrier
from madax._core.vectors import entries, one_a_leaf
from madax.codes._array import QuantizedArray, is_quantized
from madax.codes._leaves import flatten, widen
from madax.codes._quantize import dequantize_params
from madax.wrappers._feedback_checks import check_feedback
from madax.wrappers._momentum import find_momentum, places_of_codes, with_momentum


class Slopes(NamedTuple):
    """Derivatives with respect to the momentum before a step, for each leaf of codes.

    Attributes:
      update: the derivatives of the updates.
      momentum: the derivatives of the new momentum.
    """

    update: list[jax.Array]
    momentum: list[jax.Array]


class DifferentiatedStep(NamedTuple):
    """The updates of a step, the state after it, and its derivatives."""

    updates: optax.Updates
    state: optax.OptState
    slopes: Slopes


def zero_slopes(
    inner: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    params: optax.Params,
) -> jax.Array:
    """The slopes before the first step: zeros, one for each leaf of codes.

    Raises:
      ValueError: if ``inner`` is known to be wrong for errors of rounding.
    """
    places = places_of_codes(params)
    find_momentum(state, params, places)
    # An update that needs more arguments is checked when there are some.
    with contextlib.suppress(TypeError):
        check_feedback(inner, params, {})
    return jnp.zeros(entries(len(places)), jnp.float32)


def limited_momentum(
    inner: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    grads: optax.Updates,
    params: optax.Params,
    before: jax.Array | None,
    extra_args: dict[str, Tree],
) -> tuple[optax.OptState, jax.Array]:
    """The state before a step, with a momentum that fits the learning rate.

    A momentum that makes up for errors at a low rate would be far too large at a high
    one, as in a warm restart. Its effect grows only where slopes rise faster than the
    momentum decays, so it is made smaller there, and only there.

    The rate is read from a step of the same optimizer on a tree of single elements,
    whose moments are all ones. Its slopes change with counts, schedules and
    hyperparameters, but not with any gradient.

    Args:
      inner: the optimizer.
      state: its state.
      grads: the gradients.
      params: the parameters, of which some are codes.
      before: the last slopes that were not zero; at first :func:`zero_slopes`.
      extra_args: extra arguments of the update.

    Returns:
      The state to take the step from, and the slopes of this step.
    """
    places = places_of_codes(params)
    if before is None or before.shape != entries(len(places)):
        made = "without" if before is None else f"for {sum(before.shape)}"
        raise ValueError(
            f"error_feedback=True and params has {len(places)} leaves of codes, but "
            f"the optimizer state was made {made}; call init again."
        )
    single = jax.tree.map(_single, params, is_leaf=is_quantized)
    ones = jax.tree.map(
        lambda x, one: x if jnp.shape(x) == one.shape else jnp.ones_like(one),
        state,
        jax.eval_shape(inner.init, single),
    )
    zeros = jax.tree.map(lambda w, g: jnp.zeros_like(w, g.dtype), single, grads)
    slopes = differentiated_step(inner, ones, zeros, single, places, extra_args).slopes

    ms, after = find_momentum(state, params, places), []
    for i, last in enumerate(one_a_leaf(before, len(places), apart=True)):
        slope, decay = (each[i].reshape(()).astype(last.dtype) for each in slopes)
        now = jnp.abs(slope)
        rises = (last > 0) & (now * decay > last)
        factor = jnp.where(rises, last / jnp.where(rises, now * decay, 1), 1)
        ms[i] = rounded(widen(ms[i]) * factor).astype(ms[i].dtype)
        after.append(jnp.where(now > 0, now, last))
    state = with_momentum(state, params, places, ms)
    return state, jnp.stack(after) if after else before


def differentiated_step(
    inner: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    grads: optax.Updates,
    params: optax.Params,
    places: Sequence[int],
    extra_args: dict[str, Tree],
) -> DifferentiatedStep:
    """A step, and its derivatives with respect to the momentum before it.

    Args:
      inner: an optimizer whose momentum acts on each element alone.
      state: the state before the step.
      grads: the gradients.
      params: the values of the parameters.
      places: the places of the leaves of codes, in flatten order.
      extra_args: extra arguments of the update.
    """
    treedef = jax.tree.structure(params)

    def step(ms):
        before = with_momentum(state, params, places, ms)
        updates, after = inner.update(grads, before, params, **extra_args)
        us = treedef.flatten_up_to(updates)
        new = find_momentum(after, params, places)
        return Slopes([us[i] for i in places], new), (updates, after)

    ms = find_momentum(state, params, places)
    ones = [jnp.ones_like(m) for m in ms]
    _, slopes, (updates, after) = jax.jvp(step, (ms,), (ones,), has_aux=True)
    return DifferentiatedStep(updates, after, slopes)


def state_with_errors(
    inner: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    grads: optax.Updates,
    params: optax.Params,
    moves: Sequence[jax.Array],
    extra_args: dict[str, Tree],
) -> tuple[optax.OptState, list[jax.Array]]:
    """The state after a step, with its rounding errors in the momentum.

    On CPUs the step is taken a second time, after the new codes are stored. A kernel
    there has one result, and quotients that the codes and the momentum share would be
    kept as floats, six for each weight.

    Args:
      inner: the optimizer.
      state: the state before the step.
      grads: the gradients.
      params: the parameters before the step.
      moves: how many codes the leaves of codes move by.
      extra_args: extra arguments of the update.

    Returns:
      The state, and the moves, computed from the stored codes.
    """
    _, ws, treedef = flatten(params)
    gs, places, new = treedef.flatten_up_to(grads), places_of_codes(params), []
    for i, move in zip(places, moves, strict=True):
        codes = ws[i].codes
        codes = (codes.astype(jnp.int32) + move).astype(codes.dtype)
        gs[i], ws[i], codes = _computed_first((gs[i], ws[i], codes))
        new.append(codes)
    grads, values = map(treedef.unflatten, (gs, ws))
    updates, state, slopes = differentiated_step(
        inner, state, grads, dequantize_params(values), places, extra_args
    )
    us, ws = treedef.flatten_up_to(updates), [ws[i] for i in places]
    ms = find_momentum(state, params, places)
    leaves = zip(ws, [us[i] for i in places], new, ms, *slopes, strict=True)
    # An optimizer that stores the momentum as codes reads it in several kernels.
    ms = [_computed_first(_momentum_with_error(*leaf)) for leaf in leaves]
    pairs = zip(ws, new, strict=True)
    moves = [codes.astype(jnp.int32) - w.codes.astype(jnp.int32) for w, codes in pairs]
    return with_momentum(state, params, places, ms), moves


def _computed_first(x: Tree) -> Tree:
    """A tree of arrays, which CPUs store before they go on.

    Other compilers make one kernel for all results of a leaf, and keep no floats.
    """
    return jax.lax.platform_dependent(x, cpu=barrier, default=lambda x: x)


@jax.jit
def _momentum_with_error(
    w: QuantizedArray,
    u: jax.Array,
    codes: jax.Array,
    m: jax.Array,
    slope: jax.Array,
    decay: jax.Array,
) -> jax.Array:
    """The momentum ``m`` after an update ``u`` that was rounded to ``codes``.

    It gains ``(1 - decay) / slope`` times the error of the value, not of the code: on a
    curved grid, a step of one code up and one down are not equally long.
    """
    # Compilers rewrite a quotient of quotients, where they see that it is one.
    value, slope = w.dequantize(), rounded(widen(slope))
    moved = QuantizedArray(codes, w.scale, w.format).dequantize() - value
    # What would have gone beyond the largest code is no error of rounding.
    wanted = jnp.clip(rounded(widen(u)), -w.scale - value, w.scale - value)
    error = rounded((wanted - moved) * (1 - widen(decay)))
    after = widen(m) + error / jnp.where(slope == 0, 1, slope)
    after = after.astype(m.dtype)
    ok = (slope != 0) & jnp.isfinite(u) & jnp.isfinite(after)
    return jnp.where(ok, after, m)


def _single(leaf: jax.Array | QuantizedArray) -> jax.Array:
    """A one, as an array of the rank and dtype of a leaf."""
    return jnp.ones((1,) * leaf.ndim, leaf.dtype)
