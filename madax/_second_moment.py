"""Layer 1, direction: the gradient over the root of its second moment."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._checks import check_b1, check_decay, check_instance, check_seed
from madax._leaves import entries, flatten, flatten_like, path_names, zeros_like
from madax._moments import MomentFormat
from madax._numerics import expm1, log1p, rounded
from madax._rounding import leaf_keys, random_bits


class ScaleBySecondMomentState(NamedTuple):
    """State of :func:`scale_by_second_moment`.

    Attributes:
      count: number of steps taken, int32 scalar.
      v: second moment, a tree like the parameters: float32 or wider, or the codes
        of ``moment_format``.
      m: first moment, likewise; None unless ``b1`` is given.
      window: ``{moment_format: where each leaf's codes were placed}``, int32, shape
        (number of leaves,), or () if there are none; None without
        ``moment_format``. The key is there so that a checkpoint of other codes does
        not fit.
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
            window = {repr(moment_format): jnp.zeros(entries(len(leaves)), jnp.int32)}
        v = treedef.unflatten([zeros_like(w, v_dtype) for w in leaves])
        m = None
        if b1 is not None:
            m = treedef.unflatten([zeros_like(w, m_dtype) for w in leaves])
        return ScaleBySecondMomentState(jnp.zeros([], jnp.int32), v, m, window)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        with_path, treedef = jax.tree_util.tree_flatten_with_path(state.v)
        paths, vs = path_names([p for p, _ in with_path]), [v for _, v in with_path]
        gs = flatten_like(updates, treedef, "state.v", paths, vs)
        ms = None if b1 is None else treedef.flatten_up_to(state.m)
        window = _check_window(moment_format, state.window)
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = jnp.sqrt(_bias_correction(b2, count))
        if b1 is not None:
            correction /= _bias_correction(b1, count)

        directions = []
        v_codecs, m_codecs, window = _codecs(
            moment_format, vs, window, seed, state.count
        )
        for i, g in enumerate(gs):
            g = jnp.asarray(g).astype(v_codecs[i].dtype)
            ok = g * g < jnp.inf
            vs[i], v = _advance(vs[i], g * g, b2, ok, v_codecs[i])
            if ms is not None:
                ms[i], g = _advance(ms[i], g, b1, ok, m_codecs[i])
            # Not g / sqrt(v / correction**2): that quotient can overflow. The bound is
            # none to roots that are used, but keeps XLA from rsqrt, slower on CPU.
            root = jnp.maximum(jnp.sqrt(v), jnp.finfo(v.dtype).tiny)
            direction = g * correction.astype(v.dtype) / root
            directions.append(jnp.where(ok & (v > 0), direction, 0))

        if moment_format is not None:
            window = {repr(moment_format): window}
        v = treedef.unflatten(vs)
        m = None if ms is None else treedef.unflatten(ms)
        new_state = ScaleBySecondMomentState(count, v, m, window)
        return treedef.unflatten(directions), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Codec(NamedTuple):
    """How one moment of one leaf is stored.

    Attributes:
      dtype: what it is decoded to.
      decode: from what is stored before the step to values.
      encode: from values to what is stored after it.
      decode_new: from that to values.
      moved: whether the same value is stored differently after the step.
    """

    dtype: Any
    decode: Callable[[jax.Array], jax.Array]
    encode: Callable[[jax.Array], jax.Array]
    decode_new: Callable[[jax.Array], jax.Array]
    moved: jax.typing.ArrayLike


def _same(x: jax.Array) -> jax.Array:
    return x


def _codecs(
    moment_format: MomentFormat | None,
    vs: Sequence[jax.Array],
    window: jax.Array | None,
    seed: jax.typing.ArrayLike,
    count: jax.Array,
) -> tuple[list[_Codec], list[_Codec], jax.Array | None]:
    """How v and m of every leaf are stored, and the windows from now on."""
    if moment_format is None or window is None or not vs:
        same = [_Codec(v.dtype, _same, _same, _same, False) for v in vs]
        return same, same, window

    def place():
        return jnp.stack(list(map(moment_format.place, window, vs)))

    # Behind a branch, as it reads every code, and once is enough. Codes, not gradients:
    # those would all have to be there before the first of them could be used up.
    placed = jax.lax.cond(jnp.all(window > 0), lambda: window, place)

    def codec(decode, encode, i, key):
        before, after, bits = window[i], placed[i], random_bits(key, vs[i].shape)
        return _Codec(
            jnp.float32,
            partial(decode, window=before),
            partial(encode, window=after, bits=bits),
            partial(decode, window=after),
            before != after,
        )

    keys = enumerate(leaf_keys(seed, count, 2 * len(vs)))
    v_functions = moment_format.decode_v, moment_format.encode_v
    m_functions = moment_format.decode_m, moment_format.encode_m
    v_codecs = [codec(*v_functions, i, key) for i, key in islice(keys, len(vs))]
    m_codecs = [codec(*m_functions, i - len(vs), key) for i, key in keys]
    return v_codecs, m_codecs, placed


def _advance(
    stored: jax.Array, x: jax.Array, decay: Any, ok: jax.Array, codec: _Codec
) -> tuple[jax.Array, jax.Array]:
    """``decay * moment + (1 - decay) * x`` where ``ok``: as stored, and its value."""
    old = codec.decode(stored)
    rate = jnp.asarray(1 - decay, old.dtype)
    rate = jnp.where(jnp.isfinite(rate), rate, 0)  # a traced decay may be anything
    # In float32, decay and 1 - decay do not add up to 1; these coefficients do.
    new = old - rounded(rate * old) + rounded(rate * x)
    new = codec.encode(jnp.where(ok, new, old))
    # What is skipped is not rounded once more. That this choice is among stored values
    # also keeps XLA on CPU from computing them twice, for the state and the direction.
    new = jnp.where(ok | codec.moved, new, stored)
    return new, codec.decode_new(new)


def _bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count``, without the cancellation that loses digits near 1."""
    rate = jnp.asarray(1 - decay, jnp.result_type(float))
    return -expm1(count * log1p(-rate))


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
