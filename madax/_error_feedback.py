"""Error feedback: a momentum makes up for what the rounding of codes lost.

In each element, the previous momentum enters the update with a factor, the slope, and
the new momentum with another, the decay. An amount added to the momentum therefore adds
slope * (1 + decay + decay**2 + ...) times as much to the updates that follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils

from madax._checks import leaf_name
from madax._leaves import entries, flatten, flatten_named, one_a_leaf, widen
from madax._numerics import rounded
from madax._quantize_params import dequantize_params
from madax._quantized_array import QuantizedArray, is_quantized
from madax._shards import barrier
from madax._tracing import dependences

# What optax calls the momentum of an optimizer.
_NAMES = ("mu", "trace")


class Slopes(NamedTuple):
    """Derivatives with respect to the momentum before a step, for each leaf of codes.

    Attributes:
      update: the derivatives of the updates.
      momentum: the derivatives of the new momentum.
    """

    update: list[jax.Array]
    momentum: list[jax.Array]


def start(
    inner: optax.GradientTransformationExtraArgs, state: Any, params: Any
) -> jax.Array:
    """The slopes before the first step: zeros, one for each leaf of codes.

    Raises:
      ValueError: if ``inner`` is known to be wrong for errors of rounding.
    """
    places = _places(params)
    find_momentum(state, params, places)
    # An update that needs more arguments is checked when there are some.
    with contextlib.suppress(TypeError):
        check_feedback(inner, params, {})
    return jnp.zeros(entries(len(places)), jnp.float32)


def limited(
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    grads: Any,
    params: Any,
    before: jax.Array | None,
    extra_args: dict[str, Any],
) -> tuple[Any, jax.Array]:
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
      before: the last slopes that were not zero; at first, those from :func:`start`.
      extra_args: extra arguments of the update.

    Returns:
      The state to take the step from, and the slopes of this step.
    """
    places = _places(params)
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
    *_, slopes = step_with_slopes(inner, ones, zeros, single, places, extra_args)

    ms, after = find_momentum(state, params, places), []
    for i, last in enumerate(one_a_leaf(before, len(places), apart=True)):
        slope, decay = (each[i].reshape(()).astype(last.dtype) for each in slopes)
        now = jnp.abs(slope)
        rises = (last > 0) & (now * decay > last)
        factor = jnp.where(rises, last / jnp.where(rises, now * decay, 1), 1)
        ms[i] = rounded(widen(ms[i]) * factor).astype(ms[i].dtype)
        after.append(jnp.where(now > 0, now, last))
    state = _with_momentum(state, params, places, ms)
    return state, jnp.stack(after) if after else before


def step_with_slopes(
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    grads: Any,
    params: Any,
    places: Sequence[int],
    extra_args: dict[str, Any],
) -> tuple[Any, Any, Slopes]:
    """Takes a step, and its derivatives with respect to the previous momentum.

    Args:
      inner: an optimizer whose momentum acts on each element alone.
      state: the state before the step.
      grads: the gradients.
      params: the values of the parameters.
      places: the places of the leaves of codes, in flatten order.
      extra_args: extra arguments of the update.

    Returns:
      Updates, the new state, and the derivatives.
    """
    treedef = jax.tree.structure(params)
    update = _by_momentum(inner, state, grads, params, places, extra_args)

    def step(ms):
        updates, after = update(ms)
        us = treedef.flatten_up_to(updates)
        new = find_momentum(after, params, places)
        return Slopes([us[i] for i in places], new), (updates, after)

    ms = find_momentum(state, params, places)
    ones = [jnp.ones_like(m) for m in ms]
    _, slopes, (updates, after) = jax.jvp(step, (ms,), (ones,), has_aux=True)
    return updates, after, slopes


def with_errors(
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    grads: Any,
    params: Any,
    moves: Sequence[jax.Array],
    extra_args: dict[str, Any],
) -> tuple[Any, list[jax.Array]]:
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
    gs, places, new = treedef.flatten_up_to(grads), _places(params), []
    for i, move in zip(places, moves, strict=True):
        codes = ws[i].codes
        codes = (codes.astype(jnp.int32) + move).astype(codes.dtype)
        gs[i], ws[i], codes = _computed_first((gs[i], ws[i], codes))
        new.append(codes)
    grads, values = map(treedef.unflatten, (gs, ws))
    updates, state, slopes = step_with_slopes(
        inner, state, grads, dequantize_params(values), places, extra_args
    )
    us, ws = treedef.flatten_up_to(updates), [ws[i] for i in places]
    ms = find_momentum(state, params, places)
    leaves = zip(ws, [us[i] for i in places], new, ms, *slopes, strict=True)
    # An optimizer that stores the momentum as codes reads it in several kernels.
    ms = [_computed_first(_with_error(*leaf)) for leaf in leaves]
    pairs = zip(ws, new, strict=True)
    moves = [codes.astype(jnp.int32) - w.codes.astype(jnp.int32) for w, codes in pairs]
    return _with_momentum(state, params, places, ms), moves


def _computed_first(x: Any) -> Any:
    """A tree of arrays, which CPUs store before they go on.

    Other compilers make one kernel for all results of a leaf, and keep no floats.
    """
    return jax.lax.platform_dependent(x, cpu=barrier, default=lambda x: x)


@jax.jit
def _with_error(
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


# --- the momentum ---------------------------------------------------------------------


def find_momentum(state: Any, params: Any, places: Sequence[int]) -> list[jax.Array]:
    """The momentum that the state of an optimizer has for each leaf of codes.

    Raises:
      ValueError: if there is none, more than one, or one of codes.
    """
    fields, names, momenta = _fields(state, params), " or ".join(_NAMES), []
    for i in places:
        found = [leaves[i] for *_, leaves in fields]
        found = [m for m in found if not isinstance(m, optax.MaskedNode)]
        name = leaf_name("params", flatten(params)[0][i])
        if len(found) != 1:
            raise ValueError(
                f"error_feedback=True needs one momentum of {name} in the state of "
                f"inner, called {names} as in optax.adam and optax.sgd with momentum, "
                f"but there are {len(found)}; leave error_feedback out."
            )
        if not jnp.issubdtype(found[0].dtype, jnp.floating):
            raise ValueError(
                "error_feedback=True needs a momentum of floats, but inner has a "
                f"momentum of {name} with dtype {found[0].dtype}; put "
                "with_quantized_state around with_quantized_params, not inside it."
            )
        momenta += found
    return momenta


def _with_momentum(
    state: Any, params: Any, places: Sequence[int], ms: Sequence[Any]
) -> Any:
    """The state of an optimizer with another momentum for the leaves of codes."""
    treedef = jax.tree.structure(params, is_leaf=is_quantized)
    for name, path, leaves in _fields(state, params):
        for i, m in zip(places, ms, strict=True):
            if not isinstance(leaves[i], optax.MaskedNode):
                leaves[i] = m
        tree = treedef.unflatten(leaves)
        state = tree_utils.tree_set(
            state, lambda at, _, path=path: at == path, **{name: tree}
        )
    return state


def _fields(state: Any, params: Any) -> list[tuple[str, Any, list[Any]]]:
    """The names, paths and leaves of fields that hold a momentum of all parameters.

    Only a field of a named tuple counts whose value is a tree like the parameters, as
    one of them may be called "mu", too.
    """
    treedef = jax.tree.structure(params, is_leaf=is_quantized)
    fields = []
    for name in _NAMES:
        for path, value in tree_utils.tree_get_all_with_path(state, name):
            if isinstance(path[-1], tree_utils.NamedTupleKey):
                with contextlib.suppress(ValueError, TypeError):
                    fields.append((name, path, treedef.flatten_up_to(value)))
    return fields


def _by_momentum(
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    grads: Any,
    params: Any,
    places: Sequence[int],
    extra_args: dict[str, Any],
) -> Callable[[Sequence[Any]], tuple[Any, Any]]:
    """The update as a function of the momentum that leaves of codes had before."""

    def update(ms):
        before = _with_momentum(state, params, places, ms)
        return inner.update(grads, before, params, **extra_args)

    return update


def _places(params: Any) -> list[int]:
    """The places of the leaves of codes, in flatten order."""
    return [i for i, w in enumerate(flatten(params)[1]) if is_quantized(w)]


def _single(leaf: Any) -> jax.Array:
    """A one, as an array of the rank and dtype of a leaf."""
    return jnp.ones((1,) * leaf.ndim, leaf.dtype)


# --- which optimizers -----------------------------------------------------------------


def check_feedback(
    inner: optax.GradientTransformationExtraArgs, params: Any, extra_args: Any
) -> None:
    """Raises a ValueError if errors do not belong in the momentum of ``inner``.

    They do if an update is a linear function of the momentum, element by element, and
    nothing else that ``inner`` keeps depends on it.
    """
    paths, places = flatten(params)[0], _places(params)
    shapes = jax.eval_shape(lambda x: x, (dequantize_params(params), extra_args))
    shapes, treedef = jax.tree.flatten(shapes)
    # Shapes and dtypes alone: shardings need not be hashable.
    kinds = tuple((x.shape, x.dtype) for x in shapes)
    reason = _why_not(inner, treedef, kinds, tuple(places))
    if reason is not None:
        place, text = reason
        raise ValueError(
            f"error_feedback=True, but {leaf_name('params', paths[place])} {text}; "
            "leave error_feedback out, or use an optimizer whose updates are a linear "
            "function of its momentum, element by element, such as optax.adamw."
        )


@lru_cache(maxsize=64)
def _why_not(
    inner: Any, treedef: Any, kinds: Any, places: tuple[int, ...]
) -> tuple[int, str] | None:
    """The place of a leaf that may not get errors, and the reason; traced once."""
    params, extra_args = treedef.unflatten([jax.ShapeDtypeStruct(*x) for x in kinds])
    state = jax.eval_shape(inner.init, params)
    ms = find_momentum(state, params, places)
    count = len(jax.tree.leaves(params))

    def derivatives(ms, tangents, state, grads, params, extra_args):
        update = _by_momentum(inner, state, grads, params, places, extra_args)

        def step(ms):
            updates, after = update(ms)
            others = _with_momentum(after, params, places, [None] * len(places))
            us = jax.tree.structure(params).flatten_up_to(updates)
            new = find_momentum(after, params, places)
            return us, new, list(_inexact(others).values())

        return jax.jvp(step, (ms,), (tangents,))[1]

    found = dependences(derivatives, ms, ms, state, params, params, extra_args)
    updates, news = found[:count], found[count : count + len(places)]
    kept = _inexact(_with_momentum(state, params, places, [None] * len(places)))
    kept = dict(zip(kept, found[count + len(places) :], strict=True))
    # Inputs of derivatives are first the momenta, then their tangents.
    for k, i in enumerate(places):
        tangent, own = len(places) + k, (updates[i], news[k])
        if tangent not in updates[i]:
            return i, "has updates whose derivative by the momentum is 0"
        if not all(x.get(tangent, True) for x in own) or any(
            tangent in x for x in (*updates, *news) if not any(x is y for y in own)
        ):
            return i, "has elements whose momentum changes updates of others"
        if any(j < len(places) for j in updates[i]):
            return i, "has updates that are no linear function of the momentum"
        for path, x in kept.items():
            if tangent in x:
                return i, f"has a momentum on which {path!r} in the state depends, too"
    return None


def _inexact(state: Any) -> dict[str, Any]:
    """The leaves of a state that have derivatives, by their paths."""
    paths, leaves, _ = flatten_named(state)
    return {
        path: x
        for path, x in zip(paths, leaves, strict=True)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    }
