"""Storage: the transform that moves weights onto a grid of codes."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import (
    check_instance,
    check_non_negative,
    check_positive,
    check_seed,
    check_state,
)
from madax._core.numerics import relative_to, straight_through
from madax._core.rounding import (
    Rounding,
    check_rounding,
    leaf_keys,
    round_steps,
    rounding_bits,
)
from madax._core.vectors import one_a_leaf
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten_both, largest_weight, per_leaf, widen
from madax.codes._scales import initial_scales
from madax.codes._steps import as_steps, moved_codes, step_codes
from madax.formats._base import Format
from madax.transforms._clip import weight_bounds


class LnsQuantizeState(NamedTuple):
    """State of :func:`lns_quantize`.

    Attributes:
      count: number of steps taken, int32 scalar.
      scale: value of the largest code of each float leaf, float32, shape (number of
        float leaves,), or () if there are none; None without a format for them.
    """

    count: jax.Array
    scale: Any


def lns_quantize(
    format: Format | None = None,
    *,
    rounding: Rounding = "stochastic",
    seed: jax.typing.ArrayLike = 0,
    p_scale: jax.typing.ArrayLike | None = None,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds updates so that weights stay on the grid of a number format.

    A quantised leaf has a format of its own. Its update arrives as a real-valued
    number of codes (from :func:`scale_by_sign_log`); it is rounded to an integer,
    kept within the range of the codes, and leaves as a :class:`QuantizedArray` of
    code steps, which adds to the parameters under ``optax.apply_updates``.

    A float leaf, where ``format`` is given, is moved onto the format's grid:

    .. math:: w + u = \text{scale} \cdot \mathrm{decode}(c), \qquad
      \text{scale} = \max(3\, \mathrm{rms}_0, \max |w_0|) \text{ or }
      p_\text{scale} \cdot \mathrm{rms}_0

    It lands on a grid point exactly if the step is less than a factor of two, and to
    within a rounding otherwise. Without ``format``, leaves of bfloat16 and
    float16 are moved to a number of their dtype, and wider ones pass through.

    Stochastic rounding is unbiased in code space: a step of 0.2 codes is one code,
    one time in five. Steps below 1e-7 of a code, or of the spacing of a dtype, are
    lost. Nearest rounding loses those below a half.

    The random numbers are a hash of the seed, the step, the path of a leaf and the
    place of the weight in it. Under ``jax.vmap`` over models, all models share
    them, unless the seed is mapped over, too.

    JAX's derivative of a step, as for a learned learning rate, is that of the step
    before it was rounded. Codes are integers and have no derivative.

    .. warning::
      It comes last in a chain, after :func:`clip_log_weights`.

    Args:
      format: the number format of float leaves; None to leave them alone.
      rounding: "stochastic", or "nearest" (halves to even).
      seed: seed of the stochastic rounding.
      p_scale: scale of a float leaf's grid, relative to the root mean square of
        the leaf at init, as of :func:`clip_log_weights`; None for one that reaches
        all weights there are at init.
      zero_init_scale: stands in for the root mean square of a float leaf that is
        all zeros at init, in units of the weights.

    Returns:
      A gradient transformation from updates to updates that end on the grid.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match.
      TypeError: if an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> fmt = madax.LogFormat(bits=8, base_step=0.1)
      >>> tx = madax.lns_quantize(fmt, rounding="nearest", p_scale=1.0)
      >>> w = jnp.array([1.0, -1.0])
      >>> updates, _ = tx.update(jnp.array([-0.12, 0.6]), tx.init(w), w)
      >>> on_grid = optax.apply_updates(w, updates)
      >>> print([f"{code_nats:.1f}" for code_nats in jnp.log(jnp.abs(on_grid))])
      ['-0.1', '-0.9']

    References:
      Zhao et al., `LNS-Madam: low-precision training in logarithmic number system
      using multiplicative weight update <https://arxiv.org/abs/2106.13914>`_, 2022,
      the quantised weight update.
    """
    check_instance("format", format, Format)
    check_rounding(rounding)
    check_seed(seed)
    if p_scale is not None:
        p_scale = check_positive("p_scale", p_scale, None, finite=True)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        first = initial_scales(params, zero_init_scale)  # refuses what it has to
        if format is None:
            return LnsQuantizeState(count, None)
        scale = weight_bounds(p_scale, first.rms0, first.peak0)
        scale = jnp.minimum(scale, jnp.finfo(scale.dtype).max)
        return LnsQuantizeState(count, scale)

    def update_fn(
        updates, state, params=None, *, madax_layer=None, count=None, **extra_args
    ):
        del extra_args
        check_state(state, LnsQuantizeState)
        paths, ws, us, treedef = flatten_both(params, updates)
        steps = state.count if count is None else count
        keys = one_a_leaf(leaf_keys(seed, steps, paths, madax_layer), len(ws))
        scales = _scales(state, format, ws)
        leaves = zip(ws, us, scales, keys, strict=True)
        out = [_step_leaf(*leaf, format, rounding) for leaf in leaves]
        out = list(map(as_steps, ws, out))
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten(out), LnsQuantizeState(count, state.scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scales(state: LnsQuantizeState, format: Format | None, ws: list[Any]) -> list[Any]:
    """The scale of each leaf's grid; None for those that have none."""
    if format is None:
        return [None] * len(ws)
    if state.scale is None:
        raise ValueError(
            f"format is {format}, but the optimizer state was made without; call init "
            "again."
        )
    return per_leaf(state.scale, ws)


@partial(jax.jit, static_argnums=(4, 5))
def _step_leaf(
    w: Any,
    u: jax.Array,
    scale: Any,
    key: jax.Array,
    format: Format | None,
    rounding: Rounding,
) -> Any:
    """The update of a leaf that ends on the grid; an integer for codes."""
    bits = rounding_bits(rounding, key, jnp.shape(u))
    if is_quantized(w):
        return step_codes(w, u, w.codes.astype(jnp.int32), bits)
    if format is not None:
        return _step_on_grid(w, u, scale, format, bits)
    return _step_in_dtype(w, u, bits)


def _step_in_dtype(w: jax.Array, u: jax.Array, bits: jax.Array | None) -> jax.Array:
    """The update that takes ``w`` to a number of its dtype next to ``w + u``.

    It is exact if that is less than a factor of two away. Then ``w + u`` needs no
    rounding, and no step is lost, however small.
    """
    dtype = jnp.result_type(w)
    if dtype.itemsize > 2:
        return u
    info, x = jnp.finfo(dtype), widen(w)
    u = u.astype(x.dtype)
    # This is the power of two below |w + u|, or below the finest spacing of the dtype,
    # which must be a normal float32 itself.
    finest = max(float(info.tiny), float(jnp.finfo(x.dtype).tiny) * 2.0**info.nmant)
    pattern = jax.lax.bitcast_convert_type(
        jnp.maximum(jnp.abs(x + u), finest), jnp.int32
    )
    # The pattern of a power of two, lowered to the spacing; that of its reciprocal then
    # takes no division.
    spacing = (pattern & 0x7F800000) - (info.nmant << 23)
    per_unit = jax.lax.bitcast_convert_type((254 << 23) - spacing, x.dtype)
    spacing = jax.lax.bitcast_convert_type(spacing, x.dtype)
    # The whole part is kept apart: beside it there is no room for all digits of the
    # rest, and a weight without an update is all whole.
    steps = (x + u) * per_unit
    whole = jnp.floor(steps)
    steps = whole + round_steps(steps - whole, bits).astype(x.dtype)
    largest = largest_weight(dtype)
    target = jnp.clip(steps * spacing, -largest, largest)
    to_target = jnp.clip(target - x, -largest, largest)
    return straight_through(u, to_target).astype(dtype)


def _step_on_grid(
    w: jax.Array,
    u: jax.Array,
    scale: jax.Array,
    format: Format,
    bits: jax.Array | None,
) -> jax.Array:
    """The update that takes ``w`` to a grid point near ``w + u``."""
    dtype = jnp.result_type(w)
    largest = largest_weight(dtype)  # float16 may not reach as far as the scale
    x = widen(w)
    u, scale = u.astype(x.dtype), scale.astype(x.dtype)
    x, step, moved = (relative_to(scale, v) for v in (x, u, x + u))
    code = format.nearest(x).astype(jnp.int32)
    value = format.decode(code)
    point = jnp.clip(scale * value, -largest, largest).astype(dtype)
    # A weight counts as on the grid if it is there to within float rounding. Its step
    # is counted from the grid point, as for a quantised leaf. Any other weight first
    # has to get to its grid point, which makes its step longer by that way.
    on_grid = jnp.abs(w - point) <= 8 * float(jnp.finfo(dtype).eps) * jnp.abs(point)
    steps = format.add_step(code, jnp.where(on_grid, step, moved - value))
    new = moved_codes(code, format, steps, jnp.sign(moved), bits)
    target = jnp.clip(scale * format.decode(new), -largest, largest).astype(dtype)
    to_target = jnp.where(scale == 0, u, jnp.clip(target - w, -largest, largest))
    # A NaN is no number of steps.
    to_target = jnp.where(jnp.isnan(u), u, to_target)
    return straight_through(u.astype(dtype), to_target.astype(dtype))
