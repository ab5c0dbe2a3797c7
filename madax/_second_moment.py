"""Layer 1, direction: the gradient over the root of its second moment."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._checks import check_b1, check_decay, check_instance, check_seed
from madax._leaves import flatten, flatten_like, path_name, widen, zeros_like
from madax._moments import MomentFormat
from madax._rounding import leaf_keys, random_bits


class ScaleBySecondMomentState(NamedTuple):
    """State of :func:`scale_by_second_moment`.

    Attributes:
      count: number of steps taken, int32 scalar.
      v: second moment, a tree like the parameters: float32 or wider, or the codes
        of ``moment_format``.
      m: first moment, likewise; None unless ``b1`` is given.
      window: ``{moment_format: where each leaf's codes were placed}``, int32, shape
        (number of leaves,); None without ``moment_format``. The key is there so that
        a checkpoint of other codes does not fit.
    """

    count: jax.Array
    v: Any
    m: Any
    window: Any


def scale_by_second_moment(
    b2: jax.typing.ArrayLike = 0.999,
    *,
    b1: jax.typing.ArrayLike | None = None,
    moment_format: MomentFormat | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Normalises each gradient element by the root of its second moment.

    .. math::

      v_t &= b_2 v_{t-1} + (1 - b_2) g_t^2, \qquad \hat v_t = v_t / (1 - b_2^t) \\
      \hat g_t &= g_t / \sqrt{\hat v_t}, \qquad 0/0 := 0

    There is no epsilon: :math:`\hat g` does not depend on the gradient's scale,
    and :math:`|\hat g| \le 1/\sqrt{1 - b_2}` (31.6 by default). With ``b1``, a
    bias-corrected first moment takes the place of :math:`g_t` in the numerator.

    A gradient element that is not finite, or whose square overflows, changes
    neither its moments nor its weight in that step. An element whose second
    moment is zero, or underflows to it, gives :math:`\hat g = 0`.

    Args:
      b2: decay rate of the second moment, in [0, 1).
      b1: decay rate of the first moment, in [0, 1); None for no first moment.
      moment_format: how moments are stored; None for float32 or wider.
      seed: seed of the stochastic rounding of stored moments.

    Returns:
      A gradient transformation from gradients to :math:`\hat g`, in float32 or
      wider whatever the dtype of the gradients.

    Raises:
      ValueError: if a decay rate is out of range, or gradients do not match.
      TypeError: if a decay rate is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.scale_by_second_moment()
      >>> state = tx.init(jnp.ones(3))
      >>> direction, state = tx.update(jnp.array([1e-6, 0.0, -300.0]), state)
      >>> print(direction.round(3))
      [ 1.  0. -1.]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
      With ``b1``, the direction of Cornford et al., `Brain-like learning with
      exponentiated gradients <https://doi.org/10.1101/2024.10.25.620272>`_, 2024.
    """
    check_decay("b2", b2, 0.999)
    check_b1(b1)
    check_seed(seed)
    check_instance("moment_format", moment_format, MomentFormat)

    def init_fn(params):
        _, leaves, treedef = flatten(params)
        v_dtype, m_dtype, window = None, None, None
        if moment_format is not None:
            v_dtype, m_dtype = moment_format.v_dtype, moment_format.m_dtype
            window = {repr(moment_format): jnp.zeros(len(leaves), jnp.int32)}
        v = treedef.unflatten([zeros_like(w, v_dtype) for w in leaves])
        m = None
        if b1 is not None:
            m = treedef.unflatten([zeros_like(w, m_dtype) for w in leaves])
        return ScaleBySecondMomentState(jnp.zeros([], jnp.int32), v, m, window)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        with_path, treedef = jax.tree_util.tree_flatten_with_path(state.v)
        paths, vs = [path_name(p) for p, _ in with_path], [v for _, v in with_path]
        gs = flatten_like(updates, treedef, "state.v", paths, vs)
        ms = None if b1 is None else treedef.flatten_up_to(state.m)
        window = _check_window(moment_format, state.window)
        if moment_format is not None:
            window = _place(moment_format, window, gs)
            vs, ms = _decode(moment_format, vs, ms, window)

        count = jnp.asarray(optax.safe_increment(state.count))
        correction = jnp.sqrt(_bias_correction(b2, count))
        if b1 is not None:
            correction /= _bias_correction(b1, count)

        directions = []
        for i, (g, v) in enumerate(zip(gs, vs, strict=True)):
            g = jnp.asarray(g).astype(v.dtype)
            ok = jnp.isfinite(g * g)
            vs[i] = v = _moment(v, g * g, b2, ok)
            if ms is not None:
                ms[i] = g = _moment(ms[i], g, b1, ok)
            # Not g / sqrt(v / correction**2): that quotient can overflow.
            direction = g * (correction.astype(v.dtype) / jnp.sqrt(v))
            directions.append(jnp.where(ok & (v > 0), direction, 0))

        if moment_format is not None:
            vs, ms = _encode(moment_format, vs, ms, window, seed, state.count)
            window = {repr(moment_format): window}
        v = treedef.unflatten(vs)
        m = None if ms is None else treedef.unflatten(ms)
        new_state = ScaleBySecondMomentState(count, v, m, window)
        return treedef.unflatten(directions), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moment(moment: jax.Array, x: jax.Array, decay: Any, ok: jax.Array) -> jax.Array:
    """``decay * moment + (1 - decay) * x`` where ``ok``, else unchanged."""
    rate = jnp.asarray(1 - decay, moment.dtype)
    # In float32, decay and 1 - decay do not add up to 1; these coefficients do.
    return jnp.where(ok, moment - rate * moment + rate * x, moment)


def _bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count``, without the cancellation that loses digits near 1."""
    rate = jnp.asarray(1 - decay, jnp.result_type(float))
    return -jnp.expm1(count * jnp.log1p(-rate))


def _check_window(moment_format: MomentFormat | None, window: Any) -> Any:
    """The window of that format, which must be the one that the state was made for."""
    made_for = None if window is None else next(iter(window))
    wanted = None if moment_format is None else repr(moment_format)
    if made_for != wanted:
        raise ValueError(
            f"moment_format is {wanted}, but the optimizer state was made for "
            f"{made_for}; call init again, or use the state's moment_format."
        )
    return None if window is None else window[made_for]


def _place(
    moment_format: MomentFormat, window: jax.Array, gs: Sequence[jax.Array]
) -> jax.Array:
    """Places the windows of leaves that see their first non-zero gradient."""

    def place():
        g2s = [jnp.square(widen(g)) for g in gs]
        usable = [jnp.where(jnp.isfinite(g2), g2, 0) for g2 in g2s]
        return jnp.stack(list(map(moment_format.place, window, usable)))

    # Behind a branch, as it reads every gradient, and once is enough.
    return jax.lax.cond(jnp.all(window > 0), lambda: window, place) if gs else window


def _decode(
    moment_format: MomentFormat,
    vs: list[jax.Array],
    ms: list[jax.Array] | None,
    window: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array] | None]:
    """The float moments of the leaves' codes."""
    vs = list(map(moment_format.decode_v, vs, window))
    return vs, None if ms is None else list(map(moment_format.decode_m, ms, window))


def _encode(
    moment_format: MomentFormat,
    vs: list[jax.Array],
    ms: list[jax.Array] | None,
    window: jax.Array,
    seed: jax.typing.ArrayLike,
    count: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array] | None]:
    """The codes of the leaves' moments; each moment has random bits of its own."""
    keys = leaf_keys(seed, count, 2 * len(vs))
    bits = [random_bits(k, x.shape) for k, x in zip(keys, [*vs, *vs], strict=True)]
    codes = list(map(moment_format.encode_v, vs, window, bits))
    if ms is None:
        return codes, None
    return codes, list(map(moment_format.encode_m, ms, window, bits[len(vs) :]))
