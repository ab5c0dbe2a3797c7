"""Any optax optimizer on 16-bit float weights, without a float32 copy of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import (
    check_format,
    check_seed,
    check_state,
    check_transformation,
)
from madax._core.names import Tree
from madax._core.numerics import incremented
from madax._core.rounding import keys_per_leaf
from madax.codes._array import Leaf, is_quantized
from madax.codes._leaves import compute_dtype, flatten_both, widen
from madax.codes._scales import check_float_widths
from madax.formats._moment_format import MomentFormat
from madax.transforms._lns_quantize import rounded_update
from madax.wrappers._quantized_state import with_quantized_state


class WithStochasticRoundingState(NamedTuple):
    """State of :func:`with_stochastic_rounding`.

    Attributes:
      count: number of steps taken, int32 scalar.
      inner_state: state of the inner optimizer, for weights in float32.
    """

    count: jax.Array
    inner_state: Tree


def with_stochastic_rounding(
    inner: optax.GradientTransformation,
    *,
    moment_format: MomentFormat | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains bfloat16 or float16 weights by any optimizer, as if in float32.

    By itself, an optimizer gives its moments the dtype of such weights, in which a
    second moment stalls, and loses steps below half the spacing of a weight, which is
    0.2 to 0.4 % of it. Here the optimizer sees weights and gradients in float32, so its
    moments are float32, or codes of ``moment_format``. The weight :math:`w + u` is
    rounded to one of its two neighbours, with probabilities that keep its mean:

    .. math:: \mathrm{E}[w'] = w + u

    There is no float32 copy of the weights between steps. With ``MomentFormat(bits=8)``
    Adam takes four bytes per parameter, and SGD or Lion three. The training loop does
    not change, so this also works in trainers that cannot train codes.

    Float32 leaves take the steps of ``inner``, to the bit. So do codes, if ``inner``
    trains them. No transform may scale or average updates after this one.

    Args:
      inner: any optax optimizer.
      moment_format: the format of moments, as in :func:`with_quantized_state`; None to
        leave them in float32.
      seed: seed of the stochastic rounding.

    Returns:
      An optimizer whose updates have the dtypes of the weights, and which
      ``optax.apply_updates`` adds without rounding.

    Raises:
      ValueError: if ``params`` are missing or do not match.
      TypeError: if an argument is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
      >>> tx = madax.wrappers.with_stochastic_rounding(
      ...     optax.sgd(1e-4, momentum=0.9), moment_format=madax.MomentFormat(bits=8)
      ... )
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     grads = {"w": jnp.ones((64, 64), jnp.bfloat16)}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["w"].dtype, f"{jnp.mean(params['w'].astype(jnp.float32)):.3f}")
      bfloat16 0.988
    """
    check_transformation("inner", inner)
    check_format("moment_format", moment_format, MomentFormat)
    check_seed(seed)
    if moment_format is not None:
        inner = with_quantized_state(inner, moment_format=moment_format, seed=seed)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        check_float_widths(params)
        count = jnp.zeros([], jnp.int32)
        return WithStochasticRoundingState(count, inner.init(_widened(params)))

    def update_fn(updates, state, params: Tree = None, **extra_args):
        check_state(state, WithStochasticRoundingState)
        paths, ws, gs, treedef = flatten_both(params, updates)
        pairs = zip(ws, gs, strict=True)
        gs = [jnp.asarray(g).astype(compute_dtype(w)) for w, g in pairs]
        proposed, inner_state = inner.update(
            treedef.unflatten(gs), state.inner_state, _widened(params), **extra_args
        )
        us = treedef.flatten_up_to(proposed)
        keys = keys_per_leaf(seed, state.count, paths, extra_args.get("madax_layer"))
        leaves = zip(ws, us, keys, strict=True)
        us = [u if is_quantized(w) else _rounded(w, u, key) for w, u, key in leaves]
        count = incremented(state.count)
        return treedef.unflatten(us), WithStochasticRoundingState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rounded(w: jax.Array, u: jax.Array, key: jax.Array) -> Leaf:
    return rounded_update(w, u, key, "stochastic")


def _widened(tree: Tree) -> Tree:
    """Returns the tree with floats in float32 or wider; codes stay."""
    return jax.tree.map(
        lambda x: x if is_quantized(x) else widen(x), tree, is_leaf=is_quantized
    )
