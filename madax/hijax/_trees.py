"""Trees of lifted codes: made, taken back, placed and trained."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from madax._core.checks import check_float_dtype, check_transformation
from madax._core.names import Tree
from madax.codes._array import QuantizedArray, is_quantized
from madax.codes._quantize import split_module


def lift(params: Tree, dtype: DTypeLike | None = None) -> Tree:
    check_float_dtype(dtype)
    lift_array = _hijax().lift_array
    tree, merge = split_module(params)
    one = lambda w: lift_array(w, dtype or jnp.float32) if is_quantized(w) else w
    return merge(jax.tree.map(one, tree, is_leaf=is_quantized))


def lower(params: Tree) -> Tree:
    hi = _hijax()
    tree, merge = split_module(params)
    one = lambda w: hi.lower_array(w) if hi.is_lifted(w) else w
    return merge(jax.tree.map(one, tree))


def put(params: Tree, shardings: Tree) -> Tree:
    raise NotImplementedError


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    check_transformation("tx", tx)
    inner = optax.with_extra_args_support(tx)
    hi = _hijax()

    def init_fn(params):
        return inner.init(lower(params))

    def update_fn(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, state, lower(params), **extra_args)
        one = lambda p, u: u.codes if hi.is_lifted(p) else u
        return jax.tree.map(one, params, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _hijax():
    from madax.hijax import _operators
    return _operators
