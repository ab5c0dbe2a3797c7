"""Simulated low precision of weights: floats whose values are on a grid."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import (
    Number,
    check_format,
    check_non_negative,
    check_seed,
    check_state,
)
from madax._core.numerics import divided, incremented, straight_through
from madax._core.rounding import Rounding, check_rounding, keys_per_leaf, rounding_bits
from madax.codes._array import Leaf
from madax.codes._leaves import flatten_both, max_weight, per_leaf, widen
from madax.codes._steps import moved_codes
from madax.formats._base import Format
from madax.optimizers._chain import from_direction
from madax.transforms._clip import check_p_scale
from madax.transforms._geometry import geometry_at_init, grid_scales
from madax.transforms._lns_quantize import rounded_update
from madax.transforms._second_moment import Direction


class QuantizeToGridState(NamedTuple):
    """State of :func:`quantize_to_grid`.

    Attributes:
      count: number of steps taken, int32 scalar.
      scale: value of the max code of each float leaf, float32 or wider, shape (number
        of float leaves,), or () if there are none.
    """

    count: jax.Array
    scale: jax.Array


def quantize_to_grid(
    format: Format,
    *,
    rounding: Rounding = "stochastic",
    seed: ArrayLike = 0,
    p_scale: ArrayLike | None = None,
    zero_init_scale: ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds updates so that weights stay on the grid of a number format.

    .. math:: w + u = \text{scale} \cdot \mathrm{decode}(c), \qquad
      \text{scale} = \max(3\, \mathrm{rms}_0, \max |w_0|) \text{ or }
      p_\text{scale} \cdot \mathrm{rms}_0

    It simulates, on floats, weights that are stored as codes. A weight lands on a grid
    point exactly if the step is less than a factor of two, and to within a rounding
    otherwise. No leaf, vectors included, grows beyond the scale. Leaves that are codes
    are rounded as by :func:`lns_quantize`.

    Args:
      format: the number format of float leaves.
      rounding: "stochastic", or "nearest" (halves to even).
      seed: seed of the stochastic rounding.
      p_scale: scale of the grid of a leaf, relative to the root mean square of the leaf
        at init; None for a scale that no weight exceeds at init.
      zero_init_scale: stands in for the root mean square of a leaf that is all zeros at
        init, in units of the weights.

    Returns:
      A gradient transformation from updates to updates that end on the grid.

    Raises:
      ValueError: if an argument is out of range, or ``params`` do not match.
      TypeError: if an argument is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> fmt = madax.LogFormat(bits=8, base_step=0.1)
      >>> tx = madax.papers.quantize_to_grid(fmt, rounding="nearest", p_scale=1.0)
      >>> w = jnp.array([1.0, -1.0])
      >>> updates, _ = tx.update(jnp.array([-0.12, 0.6]), tx.init(w), w)
      >>> print([f"{nats:.1f}" for nats in jnp.log(jnp.abs(w + updates))])
      ['-0.1', '-0.9']

    References:
      Zhao et al., `LNS-Madam: low-precision training in logarithmic number system
      using multiplicative weight update <https://arxiv.org/abs/2106.13914>`_, 2022,
      the quantised weight update.
    """
    check_format("format", format, Format, or_none=False)
    check_rounding(rounding)
    check_seed(seed)
    p_scale = check_p_scale(p_scale, finite=True)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init_fn(params):
        _, geometry = geometry_at_init(params, zero_init_scale)
        scale = grid_scales(p_scale, geometry)
        return QuantizeToGridState(jnp.zeros([], jnp.int32), scale)

    def update_fn(updates, state, params=None, *, madax_layer=None, **extra_args):
        del extra_args
        check_state(state, QuantizeToGridState)
        paths, ws, us, treedef = flatten_both(params, updates)
        keys = keys_per_leaf(seed, state.count, paths, madax_layer)
        leaves = zip(ws, us, keys, per_leaf(state.scale, ws), strict=True)
        us = [_update_to_grid(*leaf, format, rounding) for leaf in leaves]
        count = incremented(state.count)
        return treedef.unflatten(us), QuantizeToGridState(count, state.scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def grid_madam(
    learning_rate: optax.ScalarOrSchedule,
    format: Format,
    direction: Direction,
    *,
    p_scale: ArrayLike | None,
    **options: Number,
) -> optax.GradientTransformationExtraArgs:
    """Madam on a grid with nearest rounding; the learning rate is in nats."""
    to_grid = partial(_update_to_grid, format=format, rounding="nearest")
    options |= {"p_scale": check_p_scale(p_scale, finite=True), "floor": 0.0}
    options |= {"rounding": "nearest", "to_grid": to_grid}
    return from_direction(direction, learning_rate, **options)


def _update_to_grid(
    w: Leaf,
    u: jax.Array,
    key: jax.Array,
    scale: Number,
    format: Format,
    rounding: Rounding,
) -> Leaf:
    """The update of a leaf that ends on the grid, which codes have of their own."""
    if scale is None:
        return rounded_update(w, u, key, rounding)
    return _float_to_grid(w, u, key, scale, format, rounding)


@partial(jax.jit, static_argnums=(4, 5))
def _float_to_grid(
    w: Number,
    u: jax.Array,
    key: jax.Array,
    scale: jax.Array,
    format: Format,
    rounding: Rounding,
) -> jax.Array:
    """The update that takes ``w`` to a grid point near ``w + u``."""
    bits = rounding_bits(rounding, key, jnp.shape(u))
    dtype = jnp.result_type(w)
    limit = max_weight(dtype)  # float16 may not reach as far as the scale
    x = widen(w)
    u, scale = u.astype(x.dtype), scale.astype(x.dtype)
    x, step, moved = (divided(v, scale) for v in (x, u, x + u))
    code = format.nearest(x).astype(jnp.int32)
    value = format.decode(code)
    point = jnp.clip(scale * value, -limit, limit).astype(dtype)
    # A weight counts as on the grid if it is there to within float rounding. Its step
    # is counted from the grid point, as for a quantised leaf. Any other weight first
    # has to get to its grid point, which makes its step longer by that way.
    on_grid = jnp.abs(w - point) <= 8 * float(jnp.finfo(dtype).eps) * jnp.abs(point)
    steps = format.add_step(code, jnp.where(on_grid, step, moved - value))
    new = moved_codes(code, format, steps, jnp.sign(moved), bits)
    target = jnp.clip(scale * format.decode(new), -limit, limit).astype(dtype)
    to_target = jnp.where(scale == 0, u, jnp.clip(target - w, -limit, limit))
    # A NaN is no number of steps.
    to_target = jnp.where(jnp.isnan(u), u, to_target)
    return straight_through(u.astype(dtype), to_target.astype(dtype))
