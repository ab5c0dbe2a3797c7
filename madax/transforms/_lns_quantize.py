"""Rounding of steps of codes, and of weights in 16-bit floats."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_seed, check_state
from madax._core.moved import by_name
from madax._core.numerics import from_pattern, incremented, straight_through, to_pattern
from madax._core.rounding import (
    Rounding,
    check_rounding,
    keys_per_leaf,
    round_steps,
    rounding_bits,
)
from madax.codes._array import Leaf, QuantizedArray
from madax.codes._leaves import flatten_both, max_weight, widen
from madax.codes._scales import float_leaf_sizes
from madax.codes._steps import as_steps, step_codes


class LnsQuantizeState(NamedTuple):
    """State of :func:`lns_quantize`.

    Attributes:
      count: number of steps taken, int32 scalar.
    """

    count: jax.Array


_GRID = "use madax.papers.quantize_to_grid, which simulates codes of floats"


@by_name("format", format=_GRID, p_scale=_GRID, zero_init_scale=_GRID)
def lns_quantize(
    *, rounding: Rounding = "stochastic", seed: ArrayLike = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds updates so that weights stay on the grid of their codes or their dtype.

    The update of a quantised leaf arrives as a real-valued number of codes (from
    :func:`scale_by_sign_log`); it is rounded to an integer, clamped to the range of the
    codes, and returned as a :class:`QuantizedArray` of code steps, which
    ``optax.apply_updates`` adds to the parameters. Float leaves in bfloat16 and float16
    are moved to a number of their dtype, and wider leaves pass through.

    Stochastic rounding is unbiased in code space: a step of 0.2 codes moves one code,
    one time in five. Steps below 1e-7 of a code, or of the spacing of a dtype, are
    lost. Nearest rounding loses steps below 0.5.

    The random numbers are a hash of the seed, the step, the path of a leaf and the
    index of the weight in it. Under ``jax.vmap`` over models, all models share them,
    unless the seed is mapped, too. To train one layer of a stack at a time, as
    :func:`layerwise` does, pass its index to ``update`` as ``madax_layer``.

    The derivative of a step, for example by the learning rate, is the derivative of the
    step before rounding. Codes are integers and have no derivative.

    .. warning::
      It comes last in a chain, after :func:`clip_log_weights`.

    Args:
      rounding: "stochastic", or "nearest" (halves to even).
      seed: seed of the stochastic rounding.

    Returns:
      A gradient transformation from updates to updates that end on the grid.

    Raises:
      ValueError: if ``rounding`` is unknown, ``params`` are missing or do not match.
      TypeError: if an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> fmt = madax.UniformFormat(bits=4)
      >>> w = madax.quantize_params({"w": jnp.eye(4)}, fmt, p_scale=2.0)
      >>> tx = madax.lns_quantize(rounding="nearest")
      >>> updates, _ = tx.update({"w": jnp.full((4, 4), -1.4)}, tx.init(w), w)
      >>> print(optax.apply_updates(w, updates)["w"].codes[0])
      [ 6 -1 -1 -1]

    References:
      Zhao et al., `LNS-Madam: low-precision training in logarithmic number system
      using multiplicative weight update <https://arxiv.org/abs/2106.13914>`_, 2022,
      the quantised weight update.
    """
    check_rounding(rounding)
    check_seed(seed)

    def init_fn(params):
        float_leaf_sizes(params)  # refuses leaves that are not finite
        return LnsQuantizeState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, madax_layer=None, **extra_args):
        del extra_args
        check_state(state, LnsQuantizeState)
        paths, ws, us, treedef = flatten_both(params, updates)
        keys = keys_per_leaf(seed, state.count, paths, madax_layer)
        leaves = zip(ws, us, keys, strict=True)
        us = [rounded_update(*leaf, rounding) for leaf in leaves]
        count = incremented(state.count)
        return treedef.unflatten(us), LnsQuantizeState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rounded_update(w: Leaf, u: jax.Array, key: jax.Array, rounding: Rounding) -> Leaf:
    """Returns the update of a leaf that ends on its grid, given its key."""
    return as_steps(w, _rounded(w, u, key, rounding))


@partial(jax.jit, static_argnums=3)
def _rounded(w: Leaf, u: jax.Array, key: jax.Array, rounding: Rounding) -> jax.Array:
    bits = rounding_bits(rounding, key, jnp.shape(u))
    if isinstance(w, QuantizedArray):
        return step_codes(w, u, w.codes.astype(jnp.int32), bits)
    return _step_in_dtype(w, u, bits)


def _step_in_dtype(w: jax.Array, u: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Returns the update that takes ``w`` to a number of its dtype next to ``w + u``.

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
    pattern = to_pattern(jnp.maximum(jnp.abs(x + u), finest))
    # The pattern of a power of two, lowered to the spacing. The pattern of the
    # reciprocal then takes no division.
    spacing = (pattern & 0x7F800000) - (info.nmant << 23)
    per_unit = from_pattern((254 << 23) - spacing)
    spacing = from_pattern(spacing)
    # The whole part is kept apart: beside it there is no room for all digits of the
    # rest, and a weight without an update is all whole.
    steps = (x + u) * per_unit
    whole = jnp.floor(steps)
    if bits is None:
        steps = jnp.round(steps)
    else:
        steps = whole + round_steps(steps - whole, bits).astype(x.dtype)
    limit = max_weight(dtype)
    target = jnp.clip(steps * spacing, -limit, limit)
    to_target = jnp.clip(target - x, -limit, limit)
    return straight_through(u, to_target).astype(dtype)
