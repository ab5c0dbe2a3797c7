"""The size of each float leaf at init, which determines its bound and its floor."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_state
from madax._core.leaf_kinds import read_leaves
from madax._core.names import Tree
from madax.codes._leaves import flatten_both, max_weight, places_of_floats
from madax.codes._scales import bound_on_weights, float_leaf_sizes


class Geometry(NamedTuple):
    """Sizes of the float leaves at init, in vectors with one entry per leaf.

    It is the state of :func:`scale_by_sign_log`, :func:`add_decayed_log_weights` and
    :func:`clip_log_weights`, and a part of the state of :func:`madam`. Vectors are in
    flatten order, float32 or wider, of shape (float leaves,), or () if there are none.

    Attributes:
      rms0: root mean square of each leaf at init, or ``zero_init_scale`` where the leaf
        was all zeros.
      peak0: max magnitude in each leaf at init; 0 if the leaf was all zeros.
      bound: the bound on the magnitudes of each leaf in the last step, which is the max
        of the dtype for a leaf without a bound; None in transforms without bounds.
    """

    rms0: jax.Array
    peak0: jax.Array
    bound: Tree = None


def geometry_at_init(
    params: Tree, zero_init_scale: ArrayLike
) -> tuple[list[str], Geometry]:
    """The paths of the float leaves, and their sizes; see ``float_leaf_sizes``."""
    paths, rms, peaks = float_leaf_sizes(params)
    zeros = rms == 0
    rms0 = jnp.where(zeros, jnp.asarray(zero_init_scale, rms.dtype), rms)
    # A leaf of subnormal numbers counts as zeros, too.
    return paths, Geometry(rms0, jnp.where(zeros, 0, peaks))


def additive_floors(floor: ArrayLike, geometry: Geometry) -> jax.Array:
    """The magnitudes up to which steps are additive, one per float leaf."""
    rms0 = geometry.rms0
    floors = jnp.where(geometry.peak0 == 0, 1.0, floor) * rms0
    # The product of a floor and the max log-step does not overflow.
    return jnp.minimum(floors, jnp.finfo(rms0.dtype).max / 128).astype(rms0.dtype)


def leaf_bounds(
    p_scale: ArrayLike | None, geometry: Geometry, paths: Sequence[str], leaves: list
) -> jax.Array:
    """The bound on the magnitudes of each float leaf, given all leaves of the tree."""
    floats = places_of_floats(geometry.rms0, leaves)
    bounds = bound_on_weights(p_scale, geometry.rms0, geometry.peak0)
    if not floats:
        return bounds
    if p_scale is None:
        readings = read_leaves(paths, map(np.shape, leaves))
        vectors = np.array([readings[i].kind == "vector" for i in floats])
        # The size of a vector at init, or of zeros, says nothing about the size to be.
        bounds = jnp.where(vectors | (geometry.peak0 == 0), jnp.inf, bounds)
    ends = [max_weight(jnp.result_type(leaves[i])) for i in floats]
    return jnp.minimum(bounds, np.array(ends, bounds.dtype))


def grid_scales(p_scale: ArrayLike | None, geometry: Geometry) -> jax.Array:
    """The value of the max code of each float leaf whose codes are simulated."""
    scales = bound_on_weights(p_scale, geometry.rms0, geometry.peak0)
    return jnp.minimum(scales, jnp.finfo(scales.dtype).max)


def with_geometry(
    init: optax.TransformInitFn,
    step: Callable[[list, list, list, Geometry], tuple[list, Geometry]],
) -> optax.GradientTransformationExtraArgs:
    """The transform whose state is a geometry.

    Args:
      init: the state for parameters.
      step: the updates of all leaves and the state, from the paths and values of the
        leaves, their updates and the state.
    """

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, Geometry)
        paths, ws, us, treedef = flatten_both(params, updates)
        us, state = step(paths, ws, us, state)
        return treedef.unflatten(us), state

    return optax.GradientTransformationExtraArgs(init, update_fn)
