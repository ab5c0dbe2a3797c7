"""Geometry: the bound on |w|."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import (
    CLIPPED,
    Number,
    check_non_negative,
    check_positive,
    in_percent,
    leaf_name,
    warn_of_leaves,
)
from madax._core.names import Tree
from madax._core.numerics import within
from madax._core.vectors import awaited, known_values
from madax.codes._array import Leaf, is_quantized
from madax.codes._leaves import flatten, per_leaf, widen
from madax.codes._scales import bound_on_weights, fraction_above
from madax.transforms._geometry import (
    Geometry,
    geometry_at_init,
    leaf_bounds,
    with_geometry,
)


def clip_log_weights(
    p_scale: ArrayLike | None = None, *, zero_init_scale: ArrayLike = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps weights within a bound frozen at init.

    .. math:: |w + u| \le \max(3\, \mathrm{rms}_0, \max |w_0|)

    where :math:`\mathrm{rms}_0` is the root mean square of the weight's leaf at init,
    and :math:`\max |w_0|` the max magnitude in the leaf. This bound keeps matrices from
    growing without limit at a high rate. Other leaves have no bound but the max of
    their dtype, because their size at init says nothing about the size they need: a
    gain of a residual branch starts at 1e-6, a bias at zero. These are leaves of rank
    below 2, leaves that are called a norm, a scale, a gain or a bias (of any rank, as
    in stacked layers), and leaves that are all zeros at init.

    With a number for ``p_scale`` every leaf has the bound of the paper,
    :math:`p_\text{scale}\, \mathrm{rms}_0`, which clips weights beyond it in the first
    step; a warning says so. :func:`madax.diagnostics.fraction_at_bound` shows which
    leaves are at their bound during training.

    An update that stays within the bound passes through bit for bit. Any other ends at
    the bound, to within a rounding of the parameters' dtype. This transform does
    nothing to codes, whose range is their bound.

    .. warning::
      It comes after :func:`scale_by_sign_log`; only storage may follow.

    Args:
      p_scale: the bound on every float leaf, relative to its root mean square at init;
        None for a bound on matrices alone, which clips no weight at init; ``inf`` for
        no bound except the max of the dtype.
      zero_init_scale: the root mean square assumed for a float leaf that is all zeros
        at init, in units of the weights, if ``p_scale`` is a number; with 0, as in the
        paper, such a leaf stays at zero.

    Returns:
      A gradient transformation from updates to updates, float32 or wider, which
      :func:`lns_quantize` rounds to the parameters' dtype. Its state is a
      :class:`Geometry`.

    Raises:
      ValueError: if an argument is out of range, or ``params`` do not match.
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

    def init(params):
        _, geometry = geometry_at_init(params, zero_init_scale)
        return with_first_bound(p_scale, geometry, params, stacklevel=2)

    def step(paths, ws, us, state):
        state = state._replace(bound=leaf_bounds(p_scale, state, paths, ws))
        return clipped(ws, us, state.bound), state

    return with_geometry(init, step)


def check_p_scale(p_scale: ArrayLike | None, *, finite: bool = False) -> Number:
    """Raises unless ``p_scale`` is None or a positive number; returns it."""
    if p_scale is None:
        return None
    return check_positive("p_scale", p_scale, None, finite=finite)


def with_first_bound(
    p_scale: ArrayLike | None, geometry: Geometry, params: Tree, *, stacklevel: int
) -> Geometry:
    """Returns the geometry with its first bounds; warns of weights beyond them."""
    paths, leaves, _ = flatten(params)
    bounds = leaf_bounds(p_scale, geometry, paths, leaves)
    if p_scale is not None:
        # Beyond by more than a rounding error, and not only by the max of the dtype.
        limits = bound_on_weights(p_scale, geometry.rms0, geometry.peak0) * (1 + 1e-5)
        beyond = known_values(geometry.peak0 > limits)
        floats = [x for x in zip(paths, leaves, strict=True) if not is_quantized(x[1])]
        each = zip(floats, known_values(bounds), beyond, strict=False)
        found = [
            (leaf_name("params", path), awaited(fraction_above(w, bound)))
            for (path, w), bound, clips in each
            if clips
        ]
        warn_of_leaves(in_percent(found), CLIPPED, stacklevel=stacklevel + 1)
    return geometry._replace(bound=bounds)


def clipped(ws: list[Leaf], us: list[jax.Array], bounds: jax.Array) -> list[jax.Array]:
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
    # If a traced p_scale is out of range, the bound is NaN, and so are the weights.
    u = jnp.where(bound >= 0, u.astype(x.dtype), jnp.nan)
    return within(u, -bound - x, bound - x)
