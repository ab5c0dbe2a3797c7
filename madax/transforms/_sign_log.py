"""Geometry: an additive step in log|w|."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_non_negative, warn_of_leaves
from madax._core.names import Tree
from madax._core.numerics import fast_expm1, within
from madax._core.vectors import known_values
from madax.codes._array import Leaf, QuantizedArray
from madax.codes._leaves import compute_dtype, per_leaf, widen
from madax.codes._scales import check_code_scales
from madax.transforms._geometry import (
    Geometry,
    additive_floors,
    geometry_at_init,
    with_geometry,
)

_STUCK = (
    "all zeros at init, so a multiplicative update with zero_init_scale=0 can never "
    "move them; initialise them with non-zero values, leave zero_init_scale at its "
    "default, or train them with another optimizer through optax.partition."
)
_MAX_STEP = 80.0  # a log-step that takes any weight to its bound


def scale_by_sign_log(
    *, floor: ArrayLike = 0.0, zero_init_scale: ArrayLike = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Turns log-steps into additive updates that multiply the weights.

    .. math::

      u = w \,\mathrm{expm1}(\mathrm{sign}(w)\, d)
      \qquad\Longrightarrow\qquad
      w + u = w \, e^{\mathrm{sign}(w)\, d}

    A positive log-step ``d`` (nats) moves the weight upwards: it grows a positive
    weight and shrinks a negative one. A weight keeps its sign and never leaves 0.

    But some leaves must leave 0: biases, gates and last layers that start there. So up
    to a magnitude :math:`f` the step is additive,

    .. math:: u = f d \quad\text{where}\quad |w| \le f = \text{floor} \cdot
        \mathrm{rms}_0

    and the step in weight space is :math:`\max(|w|, f)` times the log-step. A leaf
    that is all zeros at init gets :math:`\mathrm{rms}_0` := ``zero_init_scale`` and
    floor 1. With ``floor=0`` an exact zero in any other leaf stays zero, so pruning
    masks survive; ``floor=0, zero_init_scale=0`` is the paper's rule to the letter.

    A quantised leaf needs no exponential: the step becomes a real number of codes, ``d
    / base_step`` for a ``LogFormat``, which :func:`lns_quantize` rounds. The format
    decides what happens near zero.

    A log-step that is not finite leaves its weight unchanged; in :func:`madam`, where
    it can only come from a hyperparameter, it makes float weights NaN. Log-steps of
    float weights saturate at 80 nats. Codes ignore both arguments.

    .. warning::
      Only :func:`clip_log_weights` and storage transforms may come after this one:
      anything that rescales ``u`` breaks the exponential law. Scale the log-step.

    Args:
      floor: magnitude below which steps are additive, relative to the root mean
        square of the float leaf at init; 0 is the paper.
      zero_init_scale: the scale given to a float leaf of zeros, in units of the
        weights.

    Returns:
      A gradient transformation from log-steps to updates, float32 or wider, which
      :func:`lns_quantize` rounds to the parameters' dtype. Its state is a
      :class:`Geometry`.

    Raises:
      ValueError: if an argument is negative or not finite, ``params`` are missing
        or do not match, or codes have no scale.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> tx = madax.scale_by_sign_log()
      >>> w = jnp.array([2.0, -2.0, 0.0])
      >>> log_step = jnp.full(3, jnp.log(1.5))
      >>> updates, _ = tx.update(log_step, tx.init(w), w)
      >>> print(optax.apply_updates(w, updates))
      [ 3.        -1.3333334  0.       ]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    floor = check_non_negative("floor", floor, 0.0)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init(params):
        return movable_geometry(params, zero_init_scale, stacklevel=2)

    def step(paths, ws, ds, state):
        del paths
        return log_updates(ws, ds, additive_floors(floor, state), skips=True), state

    return with_geometry(init, step)


def movable_geometry(
    params: Tree, zero_init_scale: ArrayLike, *, stacklevel: int
) -> Geometry:
    """Returns the geometry at init; warns of leaves that steps cannot move."""
    check_code_scales(params)
    paths, geometry = geometry_at_init(params, zero_init_scale)
    scales = zip(paths, known_values(geometry.rms0), strict=False)
    stuck = [path or "params" for path, scale in scales if scale == 0]
    warn_of_leaves(stuck, _STUCK, stacklevel=stacklevel + 1)
    return geometry


def log_updates(
    ws: list[Leaf], ds: list[jax.Array], floors: jax.Array, *, skips: bool
) -> list[jax.Array]:
    """The updates that take log-steps, in nats, from weights; steps of codes for codes.

    If it ``skips``, a log-step that is not finite leaves a float weight unchanged. In
    the optimizers it comes from a hyperparameter, and makes the weight NaN.
    """
    leaves = zip(ws, ds, per_leaf(floors, ws), strict=True)
    return [_update(*leaf, skips) for leaf in leaves]


@partial(jax.jit, static_argnums=3)
def _update(w: Leaf, d: jax.Array, floor: jax.Array | None, skips: bool) -> jax.Array:
    d = jnp.asarray(d, compute_dtype(w))
    if isinstance(w, QuantizedArray):
        return w.format.log_step(w.codes, d)
    d = within(jnp.where(jnp.isfinite(d), d, 0) if skips else d, -_MAX_STEP, _MAX_STEP)
    x = widen(w)
    floor = jnp.asarray(floor, x.dtype)
    # Floats, unlike codes, need not be the same bits everywhere. So GPUs and TPUs take
    # their instruction, and CPUs a polynomial without a division.
    growth = jax.lax.platform_dependent(
        jnp.where(x < 0, -d, d), cpu=fast_expm1, default=jnp.expm1
    )
    return jnp.where(jnp.abs(x) > floor, x * growth, floor * d)
