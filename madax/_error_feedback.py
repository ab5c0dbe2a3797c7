"""Error feedback: a momentum makes up for what the rounding of codes lost.

In each element, an update depends on the momentum before it by a slope, and the new
momentum on that by a decay. So what is added to a momentum adds slope * (1 + decay +
decay**2 + ...) times that to the updates that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils

from madax._leaves import entries, flatten, one_a_leaf, widen
from madax._lns_quantize import real_steps
from madax._numerics import rounded
from madax._quantized_array import QuantizedArray, is_quantized

# What optax calls the momentum of an optimizer.
_NAMES = ("mu", "trace")
# So many elements of a leaf tell whether the rate has risen.
_SAMPLE = 8

# A step of an optimizer: from its state, gradients and parameters, of which some are
# codes, to updates and the new state.
Update = Callable[[Any, Any, Any], tuple[Any, Any]]


def start(state: Any, params: Any) -> jax.Array:
    """The slopes before any step: zeros, one for each leaf."""
    _find_momentum(state)  # refuses what it has to
    return jnp.zeros(entries(len(flatten(params)[1])), jnp.float32)


def calmed(
    update: Update, state: Any, grads: Any, params: Any, before: jax.Array
) -> tuple[Any, jax.Array]:
    """The state, with a momentum that does not grow with the rate.

    A momentum that makes up for errors at a low rate would be a catastrophe at a high
    one, as where a schedule starts again. So it falls by as much as slopes rise.

    Args:
      update: the step to be taken.
      state: the state before it.
      grads: the gradients.
      params: the parameters.
      before: for each leaf, the largest magnitude of some slopes when they were last
        not zero, as of :func:`start`.

    Returns:
      The state to take the step from, and the slopes of this step.
    """
    _, leaves, treedef = flatten(params)
    if before is None or before.shape != entries(len(leaves)):
        made = "without" if before is None else f"for {sum(before.shape)} leaves"
        raise ValueError(
            f"error_feedback=True and params has {len(leaves)} leaves, but the "
            f"optimizer state was made {made}; call init again."
        )
    # A few elements are a step of their own, or all slopes would be kept for them.
    shapes = {w.shape for w in leaves}
    some = jax.tree.map(lambda x: _few(x) if jnp.shape(x) in shapes else x, state)
    few = jax.tree.map(_few, (grads, params))
    _, _, (slopes, _) = step_with_slopes(update, some, *few)
    slopes = treedef.flatten_up_to(slopes)
    ms = treedef.flatten_up_to(_find_momentum(state)[1])
    after = one_a_leaf(before, len(ms), apart=True)
    for i, (m, slope, last) in enumerate(zip(ms, slopes, after, strict=True)):
        if not isinstance(m, optax.MaskedNode):
            now = jnp.max(jnp.abs(slope), initial=0).astype(last.dtype)
            rises = (last > 0) & (now > last)
            factor = jnp.where(rises, last / jnp.where(rises, now, 1), 1)
            ms[i] = rounded(widen(m) * factor).astype(m.dtype)
            after[i] = jnp.where(now > 0, now, last)
    state = _replace_momentum(state, treedef.unflatten(ms))
    return state, jnp.stack(after) if after else before


def step_with_slopes(
    update: Update, state: Any, grads: Any, params: Any
) -> tuple[Any, Any, tuple[Any, Any]]:
    """Takes a step; and its derivatives with respect to the momentum before it.

    Args:
      update: the step, whose momentum acts on each element by itself.
      state: the state before it.
      grads: the gradients.
      params: the parameters.

    Returns:
      Updates, the new state, and two trees like the momentum: the derivatives of the
      updates, the slopes, and those of the new momentum, the decays.
    """
    _, momentum = _find_momentum(state)

    def step(momentum):
        out = update(_replace_momentum(state, momentum), grads, params)
        return (out[0], _find_momentum(out[1])[1]), out

    ones = jax.tree.map(jnp.ones_like, momentum)
    _, derivatives, out = jax.jvp(step, (momentum,), (ones,), has_aux=True)
    return *out, derivatives


def fed_back(
    state: Any,
    derivatives: tuple[Any, Any],
    params: Any,
    updates: Any,
    steps: list[Any],
) -> Any:
    """The state after a step, with what its rounding lost in the momentum.

    Args:
      state: that of :func:`step_with_slopes`, where the momentum acts on each element
        by itself.
      derivatives: its slopes and decays.
      params: the parameters before the step.
      updates: the updates, before they were rounded.
      steps: for each leaf, the codes that it moves by; None for floats.

    Returns:
      The state.
    """
    _, ws, treedef = flatten(params)
    trees = updates, _find_momentum(state)[1], *derivatives
    us, ms, slopes, decays = map(treedef.flatten_up_to, trees)
    for i, w in enumerate(ws):
        if is_quantized(w) and not isinstance(ms[i], optax.MaskedNode):
            ms[i] = _given_back(w, us[i], steps[i], ms[i], slopes[i], decays[i])
    return _replace_momentum(state, treedef.unflatten(ms))


@jax.jit
def _given_back(
    w: QuantizedArray,
    u: jax.Array,
    step: jax.Array,
    m: jax.Array,
    slope: jax.Array,
    decay: jax.Array,
) -> jax.Array:
    """The momentum ``m`` after an update ``u`` that was rounded to ``step`` codes.

    To it is added ``(1 - decay) / slope`` times the error.
    """
    steps, _ = real_steps(w, u)
    # What would have gone beyond the greatest code is no error of rounding.
    code, levels = w.codes.astype(jnp.float32), w.format.levels
    lost = jnp.clip(steps, -levels - code, levels - code) - step
    rise = steps * widen(slope)
    value = widen(u) / jnp.where(rise == 0, 1, rise)
    after = widen(m) + rounded(lost * (1 - widen(decay)) * value)
    after = after.astype(m.dtype)
    return jnp.where((rise != 0) & jnp.isfinite(after), after, m)


def _few(x: Any) -> Any:
    """The first elements of an array."""
    ndim = jnp.ndim(x)
    return x[(slice(1),) * (ndim - 1) + (slice(_SAMPLE),)] if ndim else x


def _find_momentum(state: Any) -> tuple[str, Any]:
    """The name of the momentum in the state of an optimizer, and its tree.

    Raises:
      ValueError: if there is none, more than one, or one of codes.
    """
    found = [
        (name, tree)
        for name in _NAMES
        for _, tree in tree_utils.tree_get_all_with_path(state, name, _is_field)
    ]
    if len(found) != 1:
        raise ValueError(
            f"error_feedback=True needs one momentum in the state of inner, called "
            f"{' or '.join(_NAMES)} as that of optax.adam and of optax.sgd with "
            f"momentum, but there are {len(found)}; leave error_feedback out."
        )
    ((name, momentum),) = found
    for leaf in jax.tree.leaves(momentum):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"error_feedback=True needs a momentum of floats, but {name} in the "
                f"state of inner has dtype {leaf.dtype}; put with_quantized_state "
                "around with_quantized_params, not inside it."
            )
    return name, momentum


def _replace_momentum(state: Any, momentum: Any) -> Any:
    """The state of an optimizer with another momentum."""
    name, _ = _find_momentum(state)
    return tree_utils.tree_set(state, _is_field, **{name: momentum})


def _is_field(path: Any, value: Any) -> bool:
    """Whether a node is a field of a state: a parameter may be called "mu", too."""
    del value
    return isinstance(path[-1], tree_utils.NamedTupleKey)
