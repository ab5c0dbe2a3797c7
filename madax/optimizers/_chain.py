"""What the optimizers share: all that comes after the direction, and one state."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._core.checks import (
    check_learning_rate,
    check_non_negative,
    check_positive,
    check_seed,
    check_state,
    warn_of_leaves,
)
from madax._core.names import is_part
from madax._core.rounding import Rounding, check_rounding, leaf_keys
from madax._core.vectors import known_values, one_a_leaf
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten, flatten_both, per_leaf
from madax.transforms._clip import check_p_scale, clipped, with_first_bound
from madax.transforms._geometry import (
    Geometry,
    Leaf,
    additive_floors,
    check_geometry,
    grid_scales,
    leaf_bounds,
)
from madax.transforms._lns_quantize import rounded_update
from madax.transforms._second_moment import Direction
from madax.transforms._sign_log import log_updates, movable_geometry
from madax.transforms._weight_decay import Mask, decayed, relative_steps

_IGNORED = (
    "does nothing on codes, and all leaves of params are codes: their format decides "
    "how they behave near zero, and how large they become; leave it out."
)


class MadamState(NamedTuple):
    """State of :func:`madam`, :func:`muon_madam` and the optimizers of the papers.

    Attributes:
      count: number of steps taken, int32 scalar.
      direction: state of the direction, for :func:`madam` a
        :class:`ScaleBySecondMomentState`.
      geometry: sizes of the float leaves at init, and their bounds.
    """

    count: jax.Array
    direction: optax.OptState
    geometry: Geometry


def map_rate(
    fn: Callable[..., float | jax.Array],
    learning_rate: optax.ScalarOrSchedule,
) -> optax.ScalarOrSchedule:
    """A function of a learning rate, or of the rates of a schedule."""
    if callable(learning_rate):
        schedule = learning_rate
        return lambda count: fn(schedule(count))
    return fn(learning_rate)


def from_direction(
    direction: Direction,
    learning_rate: optax.ScalarOrSchedule,
    *,
    p_scale: jax.typing.ArrayLike | None,
    g_bound: jax.typing.ArrayLike,
    floor: jax.typing.ArrayLike,
    zero_init_scale: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    rounding: Rounding,
    seed: jax.typing.ArrayLike = 0,
    alias: Callable[..., optax.GradientTransformation],
    to_grid: Callable[..., Leaf] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of multiplicative steps along a direction.

    It gives the bits that ``optax.chain`` of the public transforms gives, with one
    count and one geometry in its state. Arguments are those of :func:`madam`, and
    ``alias``, the function that users call, whose defaults are no cause for a warning.
    Where codes are simulated, ``to_grid`` takes the place of :func:`rounded_update`,
    and is also given the value of the max code.
    """
    learning_rate = check_learning_rate(learning_rate, 0.01)
    g_bound = check_positive("g_bound", g_bound, 10.0)
    weight_decay = check_non_negative("weight_decay", weight_decay, 0.0)
    floor, zero_init_scale = check_geometry(floor, zero_init_scale)
    p_scale = check_p_scale(p_scale)
    check_rounding(rounding)
    check_seed(seed)
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)
    clip, rate = optax.clip(g_bound), optax.scale_by_learning_rate(learning_rate)
    ignored = _not_default(
        alias, floor=floor, p_scale=p_scale, zero_init_scale=zero_init_scale
    )

    def add_decay(ds, steps):
        return jax.tree.map(lambda d, step: decayed(weight_decay, d, step), ds, steps)

    decay = optax.stateless(add_decay)
    decay = decay if mask is None else optax.masked(decay, mask)

    def init_fn(params):
        geometry = movable_geometry(params, zero_init_scale, stacklevel=2)
        geometry = with_first_bound(p_scale, geometry, params, stacklevel=2)
        if to_grid is not None:
            geometry = geometry._replace(bound=grid_scales(p_scale, geometry))
        _warn_of_ignored(params, ignored, stacklevel=2)
        decay.init(params)  # refuses a mask that does not fit
        count = jnp.zeros([], jnp.int32)
        return MadamState(count, direction.init(params), geometry)

    def update_fn(updates, state, params=None, *, madax_layer=None, **extra_args):
        del extra_args
        check_state(state, MadamState)
        count, geometry = state.count, state.geometry
        ds, direction_state = direction.update(
            updates, state.direction, params, count=count, madax_layer=madax_layer
        )
        ds, _ = clip.update(ds, optax.EmptyState())
        paths, ws, leaves, treedef = flatten_both(params, ds)
        floors = additive_floors(floor, geometry)
        if decays:
            steps = treedef.unflatten(relative_steps(ws, floors))
            ds, _ = decay.update(ds, decay.init(ds), steps)
        ds, _ = rate.update(ds, optax.ScaleByScheduleState(count))
        us = log_updates(ws, treedef.flatten_up_to(ds), floors, skips=False)
        bounds = leaf_bounds(p_scale, geometry, paths, ws)
        us = clipped(ws, us, bounds)
        # The direction may hash the same seed, count and paths: XLA does it once.
        keys = one_a_leaf(leaf_keys(seed, count, paths, madax_layer), len(ws))
        leaves = zip(ws, us, keys, strict=True)
        if to_grid is None:
            geometry = geometry._replace(bound=bounds)
            us = [rounded_update(*leaf, rounding) for leaf in leaves]
        else:
            scales = per_leaf(geometry.bound, ws)
            us = [to_grid(*x, scale) for x, scale in zip(leaves, scales, strict=True)]
        count = jnp.asarray(optax.safe_increment(count))
        return treedef.unflatten(us), MadamState(count, direction_state, geometry)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _not_default(
    alias: Callable[..., optax.GradientTransformation],
    **given: jax.typing.ArrayLike | None,
) -> list[str]:
    """The names of arguments that are known to differ from the defaults of an alias."""
    names = []
    for name, value in given.items():
        parameter = inspect.signature(alias).parameters.get(name)
        if parameter is None or value is None:
            continue
        known = known_values(jnp.asarray(value, jnp.float32))
        default = parameter.default
        if known.size and (default is None or known != np.float32(default)):
            names.append(name)
    return names


def _warn_of_ignored(
    params: optax.Params, ignored: list[str], *, stacklevel: int
) -> None:
    paths, leaves, _ = flatten(params)
    if leaves and all(map(is_quantized, leaves)) and not is_part(paths):
        warn_of_leaves(ignored, _IGNORED, stacklevel=stacklevel + 1)
