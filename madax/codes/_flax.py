"""Flax nnx: variables that hold codes, and gradients with respect to modules.

This module is imported only after Flax.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps

import flax
import jax
from flax import nnx

from madax._core.names import Tree, flatten_named
from madax.codes._array import is_quantized
from madax.codes._probes import probed, probes_of, without_probes
from madax.codes._residuals import value_and_gradient

# The base class of nnx objects, which Flax 0.12 renamed.
_BASE = getattr(nnx, "Pytree", None) or nnx.Object


def decode_variables(variable: type[nnx.Variable]) -> None:
    """Lets ``jnp`` functions decode variables of codes.

    JAX asks an object for its array once, and a variable returns its value: codes,
    which are not an array. This function wraps the method of Flax, so it also works for
    variables that users make, and the types that filters and checkpoints look at stay
    the same. Subclasses of each type of variable would do neither.
    """
    jax_array: Callable = variable.__jax_array__
    # Before Flax 0.11 variables were not pytrees, and a jitted jnp function took them
    # as constants (JAX's core asks for their shape), so a derivative would be zero.
    constant = jax.tree_util.all_leaves([variable(None)])

    @wraps(jax_array)
    def decoded(self: Tree) -> Tree:
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
            raise NotImplementedError(  # JAX would replace a TypeError
                f"with Flax {flax.__version__} this function takes no "
                f"{type(self).__name__} of codes in jit or in a derivative; pass "
                "its values, as in self.w[...], or use Flax 0.11 or newer."
            )
        return array

    variable.__jax_array__ = decoded


def holds_modules(tree: Tree) -> bool:
    """Whether a tree holds objects of nnx, which functions may change.

    An ``nnx.State`` does not count: it is a tree of arrays.
    """
    return bool(_objects(tree))


def differentiate(fun, wrt, positions, has_aux, dtype, args, kwargs):
    """Returns the value and gradients of a function of modules and other trees."""
    filters = [a.filter if isinstance(a, nnx.DiffState) else nnx.Param for a in wrt]
    arrays = _with_states(tuple(args[i] for i in positions), filters)
    weights, treedef = jax.tree.flatten(arrays, is_leaf=is_quantized)

    graph, state = nnx.split((args, kwargs))

    # The function gets copies of all modules, and its changes are written back.
    def loss(probes):
        given, named = nnx.merge(graph, jax.tree.map(lambda x: x, state))
        copies, given = (given, named), list(given)
        arrays = treedef.unflatten(probed(weights, probes))
        for i, array in zip(positions, arrays, strict=True):
            given[i] = jax.tree.map(_updated, given[i], array, is_leaf=_is_leaf)
        out = fun(*given, **named)
        _check_same_parts(copies, (args, kwargs))
        _check_still_codes(copies, (args, kwargs))
        value, aux = out if has_aux else (out, None)
        for module in _modules([given[i] for i in positions]):
            nnx.update(module, without_probes(nnx.state(module), weights))
        aux = without_probes(aux, weights, is_leaf=_is_leaf)
        return value, (aux, nnx.state(_objects(copies)))

    (value, (aux, after)), grads = value_and_gradient(
        loss, probes_of(weights, dtype), has_aux=True
    )
    nnx.update(_objects((args, kwargs)), after)
    value = (value, aux) if has_aux else value
    return value, treedef.unflatten(grads)


def _check_same_parts(copies: Tree, modules: Tree) -> None:
    """Raises if a function gave a module a part, which cannot be written back."""
    for copy, module in zip(_objects(copies), _objects(modules), strict=True):
        old = {path for path, _ in nnx.iter_graph(module)}
        new = [
            (path, node)
            for path, node in nnx.iter_graph(copy)
            if _is_module(node) and path not in old
        ]
        if new:
            path, node = min(new, key=lambda found: len(found[0]))
            raise ValueError(
                f"fun gave a {type(module).__name__} a new part, "
                f"{'.'.join(map(str, path))} of type {type(node).__name__}, but only "
                "variables can be added while it is differentiated; pass a module that "
                "has the part, as from its __init__."
            )


def _check_still_codes(copies: Tree, modules: Tree) -> None:
    """Raises if a function replaced codes by floats, which would be trained instead."""
    for copy, module in zip(_modules(copies), _modules(modules), strict=True):
        now = _by_path(copy)
        for path, w in _by_path(module).items():
            if is_quantized(w) and not is_quantized(now.get(path, w)):
                raise TypeError(
                    f"fun replaced the codes of {path!r} by floats, as nnx.WeightNorm "
                    "and nnx.SpectralNorm do; leave that layer in floats, by the "
                    "where of quantize_params."
                )


def _by_path(module: Tree) -> dict[str, Tree]:
    paths, leaves, _ = flatten_named(nnx.state(module), is_leaf=is_quantized)
    return dict(zip(paths, leaves, strict=True))


def _is_module(x: object) -> bool:
    return isinstance(x, _BASE)


def _objects(tree: Tree) -> list[Tree]:
    """Returns the modules and variables of a tree, which a function may change."""
    kinds = (_BASE, nnx.Variable)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (*kinds, nnx.State)))
    return [x for x in leaves if isinstance(x, kinds)]


def _is_leaf(x: object) -> bool:
    return _is_module(x) or is_quantized(x)


def _modules(tree: Tree) -> list[Tree]:
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_module) if _is_module(x)]


def _with_states(args: tuple[Tree, ...], filters: Sequence[nnx.filterlib.Filter]):
    """Replaces each module in the arguments by the variables that its filter selects.

    A variable shared by several modules goes with the first one.
    """
    predicates: list[Callable] = [
        nnx.filterlib.to_predicate(f)
        for arg, f in zip(args, filters, strict=True)
        for _ in _modules(arg)
    ]
    modules = _modules(args)

    def is_taken(path, x):
        return predicates[path[0]](path[1:], x)

    taken = nnx.state(modules, is_taken)
    states = iter(taken.get(i, nnx.State({})) for i in range(len(modules)))
    return jax.tree.map(
        lambda x: next(states) if _is_module(x) else x, args, is_leaf=_is_leaf
    )


def _updated(old: Tree, new: Tree) -> Tree:
    """Returns the new array, or the module with the new values of its variables."""
    if not _is_module(old):
        return new
    nnx.update(old, new)
    return old
