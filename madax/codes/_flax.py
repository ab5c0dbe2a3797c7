"""Variables of Flax nnx, and gradients of losses of its modules.

It is imported only where Flax has been.
"""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import flax
import jax
from flax import nnx

from madax.codes._array import is_quantized
from madax.codes._grad import (
    about_rules,
    differentiable,
    position,
    probed,
    without_probes,
)

# Flax 0.12 renamed the base class of what nnx keeps track of.
_BASE = getattr(nnx, "Pytree", None) or nnx.Object


@cache
def let_variables_decode() -> None:
    """Has ``jnp`` functions take variables of codes by their values.

    JAX asks an object for its array once, and a variable answers with its value: codes,
    which are no array. Flax's own method is wrapped, because this also serves variables
    that users make of codes, and keeps the types that filters and checkpoints look at.
    A subclass of each type of variable would do neither.
    """
    jax_array: Callable[[Any], Any] = nnx.Variable.__jax_array__
    # Before Flax 0.11 variables were no pytrees. A jitted function of jnp takes them as
    # constants, whose shape JAX's core asks for: a derivative would be zero.
    constant = jax.tree_util.all_leaves([nnx.Variable(None)])

    @wraps(jax_array)
    def decoded(self: Any) -> Any:
        value = jax_array(self)
        if not is_quantized(value):
            return value
        array = value.__jax_array__()
        caller = sys._getframe(1).f_globals["__name__"]
        if (
            constant
            and caller == "jax._src.core"
            and isinstance(array, jax.core.Tracer)
        ):
            raise NotImplementedError(  # JAX would replace a TypeError by its own
                f"with Flax {flax.__version__} this function takes no "
                f"{type(self).__name__} of codes in jit or in a derivative; pass "
                "its values, as in self.w[...], or use Flax 0.11 or newer."
            )
        return array

    nnx.Variable.__jax_array__ = decoded


def holds_modules(tree: Any) -> bool:
    """Whether nnx keeps track of what a function does to something in a tree.

    It does not for an nnx.State, which is a tree of arrays.
    """
    kinds = (_BASE, nnx.Variable)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (*kinds, nnx.State)))
    return any(isinstance(x, kinds) for x in leaves)


def differentiate(fun, argnums, has_aux, dtype, args, kwargs):
    """The value and gradients of a function of modules, and of trees without them."""
    wrt = [
        a if isinstance(a, nnx.DiffState) else nnx.DiffState(a, nnx.Param)
        for a in argnums
    ]
    positions = [position(a.argnum, args) for a in wrt]
    chosen = tuple(args[i] for i in positions)
    arrays = _with_states(chosen, [a.filter for a in wrt])
    weights, treedef = jax.tree.flatten(arrays, is_leaf=is_quantized)

    # nnx passes copies of all modules, and writes back what the function changed in
    # them.
    def loss(floats, args, kwargs):
        given = list(args)
        arrays = treedef.unflatten(probed(weights, floats))
        for i, array in zip(positions, arrays, strict=True):
            given[i] = jax.tree.map(_updated, given[i], array, is_leaf=_is_leaf)
        out = fun(*given, **kwargs)
        for module in _modules([given[i] for i in positions]):
            nnx.update(module, without_probes(nnx.state(module), weights))
        return without_probes(out, weights, is_leaf=_is_module)

    gradient = nnx.value_and_grad(loss, has_aux=has_aux)
    with about_rules():
        value, grads = gradient(differentiable(weights, dtype), args, kwargs)
    return value, treedef.unflatten(grads)


def _is_module(x: Any) -> bool:
    return isinstance(x, _BASE)


def _modules(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_module) if _is_module(x)]


def _with_states(args: tuple[Any, ...], filters: list[Any]) -> tuple[Any, ...]:
    """The arguments, with the variables of each module that a filter takes for it.

    A variable that modules share goes with the first of them.
    """
    predicates: list[Any] = [
        nnx.filterlib.to_predicate(f)
        for arg, f in zip(args, filters, strict=True)
        for _ in _modules(arg)
    ]
    modules = _modules(args)

    def is_taken(path: Any, x: Any) -> bool:
        return predicates[path[0]](path[1:], x)

    taken = nnx.state(modules, is_taken)
    states = iter(taken.get(i, nnx.State({})) for i in range(len(modules)))
    return jax.tree.map(
        lambda x: next(states) if _is_module(x) else x, args, is_leaf=_is_leaf
    )


def _is_leaf(x: Any) -> bool:
    return _is_module(x) or is_quantized(x)


def _updated(old: Any, new: Any) -> Any:
    """The new array, or the module with the new values of its variables."""
    if not _is_module(old):
        return new
    nnx.update(old, new)
    return old
