"""Direction: the gradient over the root of its second moment."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_decay, check_format, check_seed, check_state
from madax._core.names import Tree, flatten_named
from madax._core.numerics import decay_rate, exp, expm1, incremented, log1p, over_root
from madax._core.rounding import leaf_keys
from madax.codes._leaves import compute_dtype, flatten, flatten_like, zeros_like
from madax.formats._moment_format import MomentFormat, MomentWindow, check_made_for
from madax.formats._second_moment_codec import (
    CodedMoments,
    FloatMoments,
    SecondMomentCodec,
    coded_moments,
)


class ScaleBySecondMomentState(NamedTuple):
    """State of :func:`scale_by_second_moment`.

    Attributes:
      count: number of steps taken, int32 scalar.
      mu: first moment, a tree like the parameters: float32 or wider, or the codes of
        ``moment_format``; None unless ``b1`` is given.
      nu: second moment, likewise.
      window: a dict from the name of ``moment_format`` to a ``MomentWindow``; None
        without one. The key makes a checkpoint of another format an error.
    """

    count: jax.Array
    mu: Tree
    nu: Tree
    window: Tree


class Moments(NamedTuple):
    """The state without the count, for optimizers, which have one count."""

    mu: Tree
    nu: Tree
    window: Tree


class Direction(NamedTuple):
    """A transformation of gradients to directions, for a caller that counts steps.

    ``update`` gets the ``count`` before the step, by name. So optimizers have one
    count, and XLA sees that all roundings hash the same numbers.
    """

    init: Callable[..., Tree]
    update: Callable[..., Tree]


def scale_by_second_moment(
    b2: ArrayLike = 0.999,
    *,
    b1: ArrayLike | None = None,
    moment_format: MomentFormat | None = None,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Normalises each gradient element by the root of its second moment.

    .. math::

      \nu_t &= b_2 \nu_{t-1} + (1 - b_2) g_t^2, \qquad
        \hat\nu_t = \nu_t / (1 - b_2^t) \\
      \hat g_t &= g_t / \sqrt{\hat\nu_t}, \qquad 0/0 := 0

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
      TypeError: if a decay rate is not a number, or has less than 32 bits, in which
        0.999 may be 1; or if a leaf is not real floating.

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
    tx = second_moment(b2, b1=b1, moment_format=moment_format, seed=seed)

    def init_fn(params):
        return ScaleBySecondMomentState(jnp.zeros([], jnp.int32), *tx.init(params))

    def update_fn(updates, state, params=None, *, madax_layer=None, **extra_args):
        del extra_args
        check_state(state, ScaleBySecondMomentState)
        count, *moments = state
        directions, moments = tx.update(
            updates, Moments(*moments), params, count=count, madax_layer=madax_layer
        )
        count = incremented(count)
        return directions, ScaleBySecondMomentState(count, *moments)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def second_moment(
    b2: ArrayLike,
    *,
    b1: ArrayLike | None = None,
    moment_format: MomentFormat | None = None,
    seed: ArrayLike = 0,
) -> Direction:
    """Like :func:`scale_by_second_moment`, for a caller that counts steps."""
    b2, b1 = check_decay("b2", b2, 0.999), check_decay("b1", b1, None)
    check_seed(seed)
    check_format("moment_format", moment_format, MomentFormat)
    codec, name = None, None
    if moment_format is not None:
        codec, name = SecondMomentCodec(moment_format), repr(moment_format)

    def init_fn(params):
        _, leaves, treedef = flatten(params)
        nu_dtype, mu_dtype, window = None, None, None
        if codec is not None:
            nu_dtype, mu_dtype = codec.format.dtype, codec.mu_dtype
            window = {name: codec.start(len(leaves))}

        def zeros(dtype):
            return treedef.unflatten([zeros_like(w, dtype) for w in leaves])

        mu = None if b1 is None else zeros(mu_dtype)
        return Moments(mu, zeros(nu_dtype), window)

    def update_fn(updates, state, params=None, *, count, madax_layer=None):
        del params
        check_state(state, Moments)
        paths, nus, treedef = flatten_named(state.nu)
        gs = flatten_like(updates, treedef, "state.nu", paths, nus)
        mus = [None] * len(nus) if b1 is None else treedef.flatten_up_to(state.mu)
        ((made_for, window),) = (state.window or {None: None}).items()
        check_made_for(name, made_for)
        steps = incremented(count)
        rate, bias = decay_rate(b2), bias_correction(b2, steps)
        # The root of nu is still to be divided by its own correction and by the
        # correction of its unit.
        correction = jnp.sqrt(bias)
        if b1 is not None:
            correction /= bias_correction(b1, steps)
        storages = [FloatMoments()] * len(nus)
        if codec is not None and nus:
            # Random bits depend on the name "m".
            names = [paths] if b1 is None else [paths, [f"{path}/m" for path in paths]]
            keys = [leaf_keys(seed, count, each, madax_layer) for each in names]
            storages, window = coded_moments(codec, window, nus, rate, count, keys)
            correction *= _code_correction(codec, window, rate / bias)
        b1_rate = None if b1 is None else decay_rate(b1)
        leaves = zip(storages, nus, mus, gs, strict=True)
        stepped = [_step(*leaf, rate, b1_rate, correction) for leaf in leaves]
        directions, nus, mus = ([leaf[i] for leaf in stepped] for i in range(3))
        if codec is not None:
            window = {name: window}
        nu = treedef.unflatten(nus)
        mu = None if b1 is None else treedef.unflatten(mus)
        return treedef.unflatten(directions), Moments(mu, nu, window)

    return Direction(init_fn, update_fn)


# Leaves of the same shape share a program, which is traced and lowered once.
@jax.jit
def _step(
    storage: FloatMoments | CodedMoments,
    nu: jax.Array,
    mu: jax.Array | None,
    g: jax.Array,
    rate: jax.Array,
    b1_rate: Tree,
    correction: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The direction of a leaf, and its moments as they are stored from then on."""
    g = jnp.asarray(g, compute_dtype(nu))
    nu, value, counted, moved = storage.add_square(nu, g, rate)
    if mu is not None:
        mu, g = storage.add(mu, g, counted, b1_rate)
    # This is not g / sqrt(nu / correction**2), a quotient that can overflow.
    # If a decay rate is NaN, so is the whole direction.
    correction = correction.astype(g.dtype)
    g = jnp.where(moved, g * correction, 0 * correction)
    return over_root(g, value), nu, mu


def _code_correction(
    codec: SecondMomentCodec, window: MomentWindow, newest: jax.Array
) -> jax.Array:
    """The factor of directions that makes up for the rounding of nu, and for its unit.

    A fraction of nu is the newest part, which has not been rounded yet.
    """
    # E[1 / sqrt(nu)] is (1 + 3/8 of the relative variance of nu) / sqrt(E[nu]).
    noise = codec.rounding_variance * (1 - newest) ** 2
    return exp(-0.375 * noise) / jnp.sqrt(window.scale)


def bias_correction(decay: ArrayLike, count: jax.Array) -> jax.Array:
    """``1 - decay**count``, without the cancellation that loses digits near 1."""
    rate = decay_rate(decay)
    return jnp.where(jnp.isnan(rate), rate, -expm1(count * log1p(-rate)))
