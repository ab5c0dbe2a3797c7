"""Direction: decay of the weights, as a part of the log-step."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import Number, check_non_negative
from madax._core.moved import by_name
from madax._core.names import Tree
from madax._core.numerics import divided_or_same, plus_product
from madax.codes._array import Leaf, QuantizedArray, is_quantized
from madax.codes._leaves import flatten_both, per_leaf, widen
from madax.codes._quantize import dequantize_params
from madax.transforms._geometry import additive_floors, geometry_at_init, with_geometry

# A tree of booleans like the parameters, or a function from parameters to such a tree.
Mask = Tree | Callable[[Tree], Tree]


@by_name("mask")
def add_decayed_log_weights(
    weight_decay: ArrayLike = 0.0,
    *,
    mask: Mask | None = None,
    floor: ArrayLike = 0.0,
    zero_init_scale: ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds decoupled weight decay, as in AdamW, to a direction.

    .. math:: \hat g \leftarrow \hat g + \lambda\, \frac{w}{\max(|w|, f)}

    where :math:`f` is the magnitude up to which :func:`scale_by_sign_log` steps
    additively. After a learning rate :math:`\eta` and that transform this is
    :math:`w \leftarrow w - \eta \lambda w`, exactly where steps are additive, and
    :math:`w \leftarrow w\, e^{-\eta\lambda}` where they multiply. Codes decay by the
    same fraction, whatever their format: no weight is decoded.

    .. warning::
      It comes after :func:`scale_by_second_moment` and any clip of its direction, and
      before the learning rate. Decay that ``optax.add_decayed_weights`` adds to the
      gradient before :func:`madam` is normalised away: without any other gradient, a
      decay of 1e-6 and a decay of 0.1 do the same.

    Args:
      weight_decay: :math:`\lambda`, the fraction that a step of rate 1 takes.
      mask: which leaves decay, as in optax: a tree of booleans like the parameters,
        or a function from them to one; None for all.
      floor: as for :func:`scale_by_sign_log`.
      zero_init_scale: as for :func:`scale_by_sign_log`.

    Returns:
      A gradient transformation from directions to directions, float32 or wider. Its
      state is a :class:`Geometry`, inside an ``optax.MaskedState`` if there is a mask.

    Raises:
      ValueError: if an argument is negative or not finite, ``params`` are missing or
        do not match.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> tx = madax.transforms.add_decayed_log_weights(0.1)
      >>> w = jnp.array([2.0, -0.5, 0.0])
      >>> direction, _ = tx.update(jnp.zeros(3), tx.init(w), w)
      >>> print(direction)
      [ 0.1 -0.1  0. ]

    References:
      Loshchilov and Hutter, `Decoupled weight decay regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    weight_decay = check_non_negative("weight_decay", weight_decay, 0.0)
    floor = check_non_negative("floor", floor, 0.0)
    zero_init_scale = check_non_negative("zero_init_scale", zero_init_scale, 0.1)

    def init(params):
        return geometry_at_init(params, zero_init_scale)[1]

    def step(paths, ws, ds, state):
        del paths
        steps = relative_steps(ws, additive_floors(floor, state))
        return list(map(partial(decayed, weight_decay), ds, steps)), state

    tx = with_geometry(init, step)
    return tx if mask is None else _masked(tx, mask)


def _masked(
    tx: optax.GradientTransformationExtraArgs, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """``optax.masked``, whose mask may be a function of the parameters."""

    def masked(params):
        treedef = jax.tree.structure(params, is_leaf=is_quantized)
        return optax.masked(tx, treedef.unflatten(decaying(mask, params)))

    def init_fn(params):
        return masked(params).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        flatten_both(params, updates)  # refuses missing params, and trees that differ
        return masked(params).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decaying(mask: Mask | None, params: Tree) -> list[bool]:
    """Returns which leaves of ``params`` decay.

    A function gets ``params``. If it fails on codes, or looks into them, as
    ``jax.tree.map`` does, it gets the shapes of their values.
    """
    leaves = _leaves(params)
    if mask is None:
        return [True] * len(leaves)
    tree = mask
    if callable(mask):
        try:
            tree = mask(params)
            looks_inside = any(map(is_quantized, _leaves(tree)))
        except Exception:
            if not any(map(is_quantized, leaves)):
                raise
            looks_inside = True
        if looks_inside:
            tree = mask(jax.eval_shape(dequantize_params, params))
    chosen: list[bool] = []

    def add(decays, below):
        # A tree made by jax.tree.map has an entry for the codes, and one for the scale.
        decays = decays.codes if is_quantized(decays) else decays
        chosen.extend([bool(decays)] * len(_leaves(below)))

    try:
        jax.tree.map(add, tree, params, is_leaf=is_quantized)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "mask must be a tree of booleans like params, or a function from params to "
            f"one; it does not fit: {error}"
        ) from error
    return chosen


def _leaves(tree: Tree) -> list[Tree]:
    return jax.tree.leaves(tree, is_leaf=is_quantized)


def decayed(weight_decay: ArrayLike, d: jax.Array, step: jax.Array) -> jax.Array:
    """The direction ``d`` of a leaf plus the decay, given its relative step."""
    return plus_product(widen(d), weight_decay, widen(step))


def relative_steps(ws: list[Leaf], floors: jax.Array) -> list[jax.Array]:
    """Returns, for each leaf, the log-step of a small growth, over that growth."""
    return [_relative_step(*x) for x in zip(ws, per_leaf(floors, ws), strict=True)]


def _relative_step(w: Leaf, floor: Number) -> jax.Array:
    if isinstance(w, QuantizedArray):
        return w.format.relative_step(w.codes)
    x = widen(w)
    in_floors = divided_or_same(x, floor)
    return jnp.where(jnp.abs(x) > floor, jnp.sign(x), in_floors)
