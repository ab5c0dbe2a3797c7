"""The part that all optimizers share: the steps after the direction, and one state."""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from madax._core.checks import (
    Number,
    check_learning_rate,
    check_non_negative,
    check_positive,
    check_seed,
    check_state,
    warn_of_leaves,
)
from madax._core.names import Tree, is_part
from madax._core.numerics import incremented
from madax._core.rounding import Rounding, check_rounding, keys_per_leaf
from madax.codes._array import Leaf, is_quantized
from madax.codes._leaves import flatten, flatten_both, per_leaf
from madax.transforms._clip import check_p_scale, clipped, with_first_bound
from madax.transforms._geometry import (
    Geometry,
    additive_floors,
    grid_scales,
    leaf_bounds,
)
from madax.transforms._lns_quantize import rounded_update
from madax.transforms._second_moment import Direction
from madax.transforms._sign_log import log_updates, movable_geometry
from madax.transforms._weight_decay import Mask, decayed, decaying, relative_steps

_IGNORED = (
    "does nothing on codes, and all leaves of params are codes: their format decides "
    "how they behave near zero, and how large they become; leave it out."
)


class MadamState(NamedTuple):
    """State of :func:`madam`, :func:`muon_madam` and the optimizers of the papers.

    Attributes:
      count: number of steps taken, int32 scalar.
      direction: state of the direction, for :func:`madam` the moments and their window,
        with the fields ``mu``, ``nu`` and ``window`` of
        :class:`ScaleBySecondMomentState`.
      geometry: sizes of the float leaves at init, and their bounds.
    """

    count: jax.Array
    direction: Tree
    geometry: Geometry


# A learning rate, and the function of parameters that tells which leaves have it.
SecondRate = tuple[optax.ScalarOrSchedule, Callable[[Tree], Sequence[bool]]]


class Rates(NamedTuple):
    """The learning rate of all leaves, or of matrices and of all other leaves.

    Attributes:
      first: scales by the rate of matrices, or of all leaves.
      other: scales by the rate of other leaves; None without such a rate.
    """

    first: optax.GradientTransformation
    other: optax.GradientTransformation | None = None

    @classmethod
    def of(
        cls,
        learning_rate: optax.ScalarOrSchedule,
        other: optax.ScalarOrSchedule | None,
    ) -> "Rates":
        """The rates of arguments that were checked."""
        rates = [learning_rate] if other is None else [learning_rate, other]
        return cls(*map(optax.scale_by_learning_rate, rates))

    def scaled(
        self, ds: Sequence[jax.Array], are_others: Sequence[bool], count: jax.Array
    ) -> list[jax.Array]:
        """Directions times minus their rates, in the step that ``count`` gives.

        Without a rate of other leaves, ``are_others`` is not read.
        """

        def times(rate, ds):
            # optax.scale, for a number, ignores this state.
            updates, _ = rate.update(ds, optax.ScaleByScheduleState(count))
            return updates

        if self.other is None:
            return times(self.first, list(ds))
        pairs = list(zip(ds, are_others, strict=True))
        firsts = iter(times(self.first, [d for d, other in pairs if not other]))
        others = iter(times(self.other, [d for d, other in pairs if other]))
        return [next(others if other else firsts) for other in are_others]


def map_rate(
    fn: Callable[..., Number], learning_rate: optax.ScalarOrSchedule
) -> optax.ScalarOrSchedule:
    """A function of a learning rate, or of the rates of a schedule."""
    if not callable(learning_rate):
        return fn(learning_rate)
    return lambda count: fn(learning_rate(count))


def from_direction(
    direction: Direction,
    learning_rate: optax.ScalarOrSchedule,
    *,
    p_scale: ArrayLike | None,
    g_bound: ArrayLike,
    floor: ArrayLike,
    zero_init_scale: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    mask: Mask | None = None,
    rounding: Rounding,
    seed: ArrayLike = 0,
    alias: Callable,
    second_rate: SecondRate | None = None,
    to_grid: Callable[..., Leaf] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of multiplicative steps along a direction.

    It gives the same bits as an ``optax.chain`` of the public transforms, with one
    count and one geometry in its state. Arguments are as for :func:`madam`, and

    - ``alias``, the function that users call, whose defaults cause no warnings;
    - ``second_rate``, the rate of some leaves, and which they are; None for one rate;
    - ``to_grid``, which replaces :func:`rounded_update` where codes are simulated, and
      also gets the value of the max code.
    """
    learning_rate = check_learning_rate(learning_rate, 0.01)
    g_bound = check_positive("g_bound", g_bound, 10.0)
    weight_decay = check_non_negative("weight_decay", weight_decay, 0.0)
    floor = check_non_negative("floor", floor, 0.0)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)
    p_scale = check_p_scale(p_scale)
    check_rounding(rounding)
    check_seed(seed)
    clip = optax.clip(g_bound)
    decays = not is_zero(weight_decay)
    second, are_others = second_rate or (None, lambda params: ())
    rates = Rates.of(learning_rate, second)
    on_floats = {"floor": floor, "p_scale": p_scale, "zero_init_scale": zero_init_scale}

    def init_fn(params):
        geometry = movable_geometry(params, zero_init_scale, stacklevel=2)
        geometry = with_first_bound(p_scale, geometry, params, stacklevel=2)
        if to_grid is not None:
            geometry = geometry._replace(bound=grid_scales(p_scale, geometry))
        paths, ws, _ = flatten(params)
        if ws and all(map(is_quantized, ws)) and not is_part(paths):
            warn_of_leaves(_not_default(alias, on_floats), _IGNORED, stacklevel=2)
        decaying(mask, params)  # refuses a mask that does not fit
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
        paths, ws, ds, treedef = flatten_both(params, ds)
        floors = additive_floors(floor, geometry)
        if decays:
            steps = relative_steps(ws, floors)
            ds = decayed_leaves(weight_decay, mask, params, ds, steps)
        ds = rates.scaled(ds, are_others(params), count)
        us = log_updates(ws, ds, floors, skips=False)
        bounds = leaf_bounds(p_scale, geometry, paths, ws)
        us = clipped(ws, us, bounds)
        # The direction may hash the same seed, count and paths; XLA merges the two.
        keys = keys_per_leaf(seed, count, paths, madax_layer)
        leaves = zip(ws, us, keys, strict=True)
        if to_grid is None:
            geometry = geometry._replace(bound=bounds)
            us = [rounded_update(*leaf, rounding) for leaf in leaves]
        else:
            scales = per_leaf(geometry.bound, ws)
            us = [to_grid(*x, scale) for x, scale in zip(leaves, scales, strict=True)]
        count = incremented(count)
        return treedef.unflatten(us), MadamState(count, direction_state, geometry)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def is_zero(weight_decay: ArrayLike) -> bool:
    """Whether the decay is the number 0; a traced or injected 0 may change later."""
    return isinstance(weight_decay, (int, float)) and weight_decay == 0


def decayed_leaves(
    weight_decay: ArrayLike,
    mask: Mask | None,
    params: Tree,
    ds: Sequence[jax.Array],
    steps: Sequence[jax.Array],
) -> list[jax.Array]:
    """Adds the decay, in relative steps or in weights, to directions of all leaves."""
    leaves = zip(decaying(mask, params), ds, steps, strict=True)
    return [decayed(weight_decay, d, x) if decays else d for decays, d, x in leaves]


def _not_default(alias: Callable, given: dict[str, Number]) -> list[str]:
    """Returns the names of arguments that differ from the defaults of an alias."""
    defaults = {k: p.default for k, p in inspect.signature(alias).parameters.items()}

    # inject_hyperparams makes arrays of numbers, of the dtype of the parameters.
    def differs(value, default):
        dtype = getattr(value, "dtype", np.float32)
        return default is None or np.asarray(value, dtype) != np.asarray(default, dtype)

    return [
        name
        for name, value in given.items()
        if name in defaults and not isinstance(value, jax.core.Tracer | None)
        if differs(value, defaults[name])
    ]
