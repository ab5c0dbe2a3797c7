"""Error feedback: a momentum makes up for what the rounding of codes lost.

In each element, an update depends on the momentum before it by a slope, and the new
momentum on that by a decay. So what is added to a momentum adds slope * (1 + decay +
decay**2 + ...) times that to the updates that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils

from madax._leaves import widen
from madax._numerics import rounded
from madax._quantized_array import QuantizedArray

# What optax calls the momentum of an optimizer.
_NAMES = ("mu", "trace")
# So many elements of a leaf tell whether the rate has risen.
_SAMPLE = 8


class Feedback(NamedTuple):
    """The momentum of a leaf in a step.

    Attributes:
      before: that before the step, an array like the leaf.
      after: that after it, same shape.
      slope: the derivatives of the update with respect to ``before``, same shape.
      decay: those of ``after``, same shape.
      peak: greatest magnitude of a sample of the slopes in the last step in which they
        were not all zero; 0 if there was none. A scalar.
    """

    before: jax.Array
    after: jax.Array
    slope: jax.Array
    decay: jax.Array
    peak: jax.Array


def find_momentum(state: Any) -> tuple[str, Any]:
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


def replace_momentum(state: Any, momentum: Any) -> Any:
    """The state of an optimizer with another momentum."""
    name, _ = find_momentum(state)
    return tree_utils.tree_set(state, _is_field, **{name: momentum})


def with_momenta(state: Any, treedef: Any, leaves: Sequence[Feedback | None]) -> Any:
    """The state of an optimizer with the momentum of each leaf; None to keep it."""
    _, momentum = find_momentum(state)
    found = zip(treedef.flatten_up_to(momentum), leaves, strict=True)
    new = [m if leaf is None else leaf.after for m, leaf in found]
    return replace_momentum(state, treedef.unflatten(new))


def _is_field(path: Any, value: Any) -> bool:
    """Whether a node is a field of a state: a parameter may be called "mu", too."""
    del value
    return isinstance(path[-1], tree_utils.NamedTupleKey)


def step_with_slopes(
    update: Callable[[Any], tuple[Any, Any]], state: Any, treedef: Any, peaks: list[Any]
) -> tuple[Any, Any, list[Feedback | None]]:
    """Takes a step of an optimizer whose momentum acts on each element by itself.

    Args:
      update: the step, a function of the state to the updates and the new state.
      state: the state.
      treedef: of the parameters.
      peaks: those of all leaves, as of :class:`Feedback`.

    Returns:
      The updates, the new state, and the momentum of each leaf; None for leaves that
      are masked in it.
    """
    _, before = find_momentum(state)

    def step(momentum):
        updates, new_state = update(replace_momentum(state, momentum))
        _, after = find_momentum(new_state)
        return (updates, after), (after, updates, new_state)

    ones = jax.tree.map(jnp.ones_like, before)
    _, slopes, (after, updates, new_state) = jax.jvp(
        step, (before,), (ones,), has_aux=True
    )
    slope, decay = slopes
    trees = map(treedef.flatten_up_to, (before, after, slope, decay))
    leaves = [
        None if isinstance(leaf[0], optax.MaskedNode) else Feedback(*leaf)
        for leaf in zip(*trees, peaks, strict=True)
    ]
    return updates, new_state, leaves


def calmed(u: jax.Array, momentum: Feedback) -> tuple[jax.Array, Feedback]:
    """The update and the momentum, had this not grown in units of the weights.

    A momentum that makes up for errors at a low rate would be a catastrophe at a high
    one, as where a schedule starts again. So it falls by as much as slopes rise.
    """
    slope = widen(momentum.slope)
    sample = slope[(slice(1),) * (slope.ndim - 1) + (slice(_SAMPLE),)]
    peak = jnp.max(jnp.abs(sample), initial=0)
    rises = (momentum.peak > 0) & (peak > momentum.peak)
    excess = jnp.where(rises, 1 - momentum.peak / jnp.where(rises, peak, 1), 0)
    excess = excess * widen(momentum.before)
    after = widen(momentum.after) - rounded(widen(momentum.decay) * excess)
    return widen(u) - rounded(slope * excess), momentum._replace(
        after=after.astype(momentum.after.dtype),
        peak=jnp.where(peak > 0, peak, momentum.peak),
    )


def given_back(
    w: QuantizedArray,
    u: jax.Array,
    steps: jax.Array,
    step: jax.Array,
    momentum: Feedback,
) -> Feedback:
    r"""The momentum that makes up for the error of a rounding, in later updates.

    .. math:: m' = m + (1 - \beta)\, e / s

    with the slope :math:`s`, the decay :math:`\beta` and the error :math:`e`.

    Args:
      w: the quantised leaf before the step.
      u: its update, as proposed.
      steps: that in codes, real-valued.
      step: the codes it was rounded to.
      momentum: that of the step.

    Returns:
      The momentum, with :math:`m'` in the place of :math:`m` after the step.
    """
    # What would have gone beyond the greatest code is no error of rounding.
    code, levels = w.codes.astype(jnp.float32), w.format.levels
    lost = jnp.clip(steps, -levels - code, levels - code) - step
    slope, decay = widen(momentum.slope), widen(momentum.decay)
    share = lost / jnp.where(steps == 0, 1, steps)
    x = share * (1 - decay) * (u / jnp.where(slope == 0, 1, slope))
    after = (widen(momentum.after) + rounded(x)).astype(momentum.after.dtype)
    usable = (slope != 0) & jnp.isfinite(after)
    return momentum._replace(after=jnp.where(usable, after, momentum.after))
