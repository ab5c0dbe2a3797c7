"""Geometry: the bound on |w|."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import (
    CLIPPED,
    check_non_negative,
    check_positive,
    check_state,
    in_percent,
    leaf_name,
    warn_of_leaves,
)
from madax._core.numerics import within
from madax._core.vectors import awaited, known_values
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten, flatten_both, per_leaf, widen
from madax.codes._scales import fraction_above
from madax.transforms._geometry import Geometry, Leaf, geometry_at_init, leaf_bounds


def clip_log_weights(
    p_scale: jax.typing.ArrayLike | None = None,
    *,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps weights within a bound frozen at init.

    .. math:: |w + u| \le \max(3\, \mathrm{rms}_0, \max |w_0|)

    where :math:`\mathrm{rms}_0` is the root mean square of the weight's leaf at init,
    and :math:`\max |w_0|` the max magnitude in the leaf. This bound keeps matrices from
    running away at a high rate. All other leaves are free to grow up to the max of
    their dtype, because their size at init says nothing about the size they need: a
    gain of a residual branch starts at 1e-6, a bias at zero. Free are leaves of rank
    below 2, leaves that are called a norm, a scale, a gain or a bias (of any rank, as
    in stacked layers), and leaves that are all zeros at init.

    With a number for ``p_scale`` every leaf has the bound of the paper,
    :math:`p_\text{scale}\, \mathrm{rms}_0`. Weights that are beyond it at init, such
    as outliers of pretrained weights, are clipped by the first step, and a warning says
    so. :func:`madax.diagnostics.fraction_at_bound` tells which leaves are at their
    bound during training.

    An update that stays within the bound passes through bit for bit. Any other lands on
    the bound, to within a rounding of the parameters' dtype. On codes this transform
    does nothing: the range of the codes is the bound.

    .. warning::
      It comes after :func:`scale_by_sign_log`; only storage may follow.

    Args:
      p_scale: the bound on every float leaf, relative to its root mean square at init;
        None for a bound on matrices alone, which clips no weight at init; ``inf`` for
        no bound except the max of the dtype.
      zero_init_scale: stands in for the root mean square of a float leaf that is all
        zeros at init, in units of the weights, where ``p_scale`` is a number; with 0,
        the paper, such a leaf stays at zero.

    Returns:
      A gradient transformation from updates to updates, float32 or wider, which
      :func:`lns_quantize` rounds to the parameters' dtype. Its state is a
      :class:`Geometry`.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> tx = madax.clip_log_weights(p_scale=2.0)
      >>> w = jnp.array([1.0, -1.0])
      >>> updates, _ = tx.update(jnp.array([0.5, -7.0]), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates))
      [ 1.5 -2. ]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    p_scale = check_p_scale(p_scale)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init_fn(params):
        _, geometry = geometry_at_init(params, zero_init_scale)
        return with_first_bound(p_scale, geometry, params, stacklevel=2)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, Geometry)
        paths, ws, us, treedef = flatten_both(params, updates)
        state = state._replace(bound=leaf_bounds(p_scale, state, paths, ws))
        return treedef.unflatten(clipped(ws, us, state.bound)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_p_scale(p_scale: jax.typing.ArrayLike | None) -> jax.typing.ArrayLike | None:
    """Raises unless ``p_scale`` is None or a positive number, which it returns."""
    return None if p_scale is None else check_positive("p_scale", p_scale, None)


def with_first_bound(
    p_scale: jax.typing.ArrayLike | None,
    geometry: Geometry,
    params: optax.Params,
    *,
    stacklevel: int,
) -> Geometry:
    """The geometry with the bounds of the first step; warns of weights beyond them."""
    paths, leaves, _ = flatten(params)
    bounds = leaf_bounds(p_scale, geometry, paths, leaves)
    if p_scale is None:
        return geometry._replace(bound=bounds)
    beyond = known_values(geometry.peak0 > bounds * (1 + 1e-5))  # not by a rounding
    floats = [x for x in zip(paths, leaves, strict=True) if not is_quantized(x[1])]
    clipped = [
        (leaf_name("params", path), awaited(fraction_above(w, bound)))
        for (path, w), bound, too_far in zip(
            floats, known_values(bounds), beyond, strict=False
        )
        if too_far
    ]
    warn_of_leaves(in_percent(clipped), CLIPPED, stacklevel=stacklevel + 1)
    return geometry._replace(bound=bounds)


def clipped(
    ws: Sequence[Leaf], us: Sequence[jax.Array], bounds: jax.Array
) -> list[jax.Array]:
    """The updates that keep float weights within their bounds; steps of codes pass."""
    return [
        u if bound is None else clip_update(w, u, bound)
        for w, u, bound in zip(ws, us, per_leaf(bounds, ws), strict=True)
    ]


@jax.jit
def clip_update(w: jax.Array, u: jax.Array, bound: jax.Array) -> jax.Array:
    """Shortens ``u`` so that ``|w + u| <= bound``; otherwise leaves it alone."""
    x = widen(w)
    bound = bound.astype(x.dtype)
    # A bound is NaN if a traced p_scale is out of range. The weights show it.
    u = jnp.where(bound >= 0, u.astype(x.dtype), jnp.nan)
    return within(u, -bound - x, bound - x)
