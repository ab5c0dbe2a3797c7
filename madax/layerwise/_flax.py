"""A Flax NNX model taken apart into its layers and the rest.

It is imported only where Flax has been.
"""

import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madax._core.names import ENDS, LAYERS, Tree
from madax.layerwise._stacks import is_typed_key


def taken_apart(model: nnx.Module, name: str) -> tuple[Tree, Callable, Callable]:
    """What :func:`madax.split_layers` returns."""
    # The module is a copy that has the same arrays.
    shell = nnx.merge(*nnx.split(model))
    *path, last = name.split(".")
    try:
        owner = reduce(getattr, path, shell)
        layers = getattr(owner, last)
    except AttributeError as error:
        raise ValueError(
            f"name is {name!r}, but {error}; pass the path of the attribute that holds "
            'the layers, such as "blocks".'
        ) from error
    setattr(owner, last, None)
    if isinstance(layers, nnx.Sequential):
        layers = layers.layers
    is_stacked = isinstance(layers, nnx.Module) and callable(layers)
    modules = {name: layers} if is_stacked else _listed(layers, name)
    _check_not_shared({"": shell, **modules})
    _check_alike(modules)
    rest, stack = _split(shell), _layers(name, list(modules.values()), is_stacked)

    def ends(values: Tree, key: jax.Array | None = None) -> nnx.Module:
        return rest.module("", values, key)

    def layer(
        values: Tree, x: Tree, key: jax.Array | None = None, **arguments: Tree
    ) -> Tree:
        module: Callable = stack.module(name, values, key)
        takes_rngs = "rngs" in inspect.signature(module.__call__).parameters
        if key is not None and takes_rngs:
            arguments = {"rngs": nnx.Rngs(key), **arguments}
        return module(x, **arguments)

    params = {ENDS: rest.params, LAYERS: stack.params}
    return {k: nnx.to_pure_dict(v) for k, v in params.items()}, ends, layer


class _Part(NamedTuple):
    """The ends of a model, or its layers: what ``nnx.split`` makes of them."""

    graph: nnx.GraphDef  # the static structure
    params: nnx.State  # stacked for layers
    rngs: nnx.State  # the streams of random numbers
    others: nnx.State  # all other variables

    def module(self, name: str, values: Tree, key: jax.Array | None) -> nnx.Module:
        """A new module of ``values``, whose random numbers start from the key."""
        params, others = (
            jax.tree.map(lambda x: x, state) for state in (self.params, self.others)
        )
        nnx.replace_by_pure_dict(params, values)
        module = nnx.merge(self.graph, params, _started(self.rngs, key), others)
        # A write to any other variable would be lost with the module. To draw a random
        # number is such a write, to the count of its stream.
        free = nnx.Param if key is None else (nnx.Param, nnx.RngState)
        for path, variable in _variables(module, name):
            if not isinstance(variable, free):
                refuse = partial(_refuse_write, path)
                if hasattr(nnx.Variable, "set_metadata"):
                    variable.set_metadata(on_set_value=refuse)
                else:  # in older versions of Flax
                    variable.on_set_value = refuse
        return module


def _started(rngs: nnx.State, key: jax.Array | None) -> nnx.State:
    """Streams of random numbers that start from a key, no two alike."""
    key = jax.random.key(0) if key is None else key
    if not is_typed_key(key):
        key = jax.random.wrap_key_data(key)
    leaves, treedef = jax.tree.flatten(rngs)
    started = [
        jax.random.split(jax.random.fold_in(key, i), x.shape)
        if is_typed_key(x)
        else jnp.zeros(x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return treedef.unflatten(started)


def _refuse_write(path: str, variable: nnx.Variable, value: object) -> NoReturn:
    """What a variable does when the model writes to it: it raises."""
    del value
    if isinstance(variable, nnx.RngState):
        raise ValueError(
            f"model.{path} is asked for a random number, but has no key; pass a key to "
            "the step for the layers, and ends(values, key) for the ends, or call "
            "model.eval() before split_layers."
        )
    raise ValueError(
        f"model.{path} is a {type(variable).__name__} that the model writes to, which "
        "would be lost, as only nnx.Param are trained; use a norm without statistics, "
        "such as nnx.LayerNorm, or call model.eval() before split_layers to keep them."
    )


def _variables(module: nnx.Module, name: str) -> Iterator[tuple[str, nnx.Variable]]:
    """The path in the model of each variable of a module, and the variable."""
    prefix = (name,) if name else ()
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            yield ".".join(map(str, (*prefix, *path))), node


def _split(module: nnx.Module) -> _Part:
    return _Part(*nnx.split(module, nnx.Param, nnx.RngState, ...))


def _listed(layers: Iterable[nnx.Module], name: str) -> dict[str, nnx.Module]:
    """The path and module of each layer of a list."""
    found = [] if isinstance(layers, dict) else list(layers)
    if not found or not all(isinstance(one, nnx.Module) for one in found):
        raise ValueError(
            f"model.{name} must be a list of modules that are alike, got a "
            f"{type(layers).__name__} of {[type(one).__name__ for one in found]}; pass "
            "the path of such a list."
        )
    return {f"{name}.{i}": one for i, one in enumerate(found)}


def _layers(name: str, modules: Sequence[nnx.Module], is_stacked: bool) -> _Part:
    """Like :func:`_split`, of layers that are alike: their parameters are stacked."""
    parts = list(map(_split, modules))
    first = parts[0]
    if jax.tree.leaves(first.others):
        found = nnx.to_flat_state(first.others)
        paths = [".".join(map(str, path)) for path, _ in found]
        raise ValueError(
            f"model.{name} has variables that layerwise would not change, {paths}; use "
            "layers of nnx.Param alone."
        )
    if not is_stacked:
        stacked = jax.tree.map(_stack, *(part.params for part in parts))
        return first._replace(params=stacked)
    shapes = jax.eval_shape(lambda x: jax.tree.map(lambda x: x[0], x), first.rngs)
    return first._replace(rngs=shapes)


def _check_not_shared(modules: dict[str, nnx.Module]) -> None:
    """Raises if a parameter is in two modules."""
    seen: dict[int, tuple[str, str]] = {}
    for name, module in modules.items():
        for path, variable in _variables(module, name):
            other, first = seen.setdefault(id(variable), (name, path))
            if other != name and isinstance(variable, nnx.Param):
                raise ValueError(
                    f"model.{path} and model.{first} are one nnx.Param, but layerwise "
                    "would train two; give each layer parameters of its own, or train "
                    "the model as a whole, with madax.value_and_grad."
                )


def _check_alike(modules: dict[str, nnx.Module]) -> None:
    """Raises if modules differ in anything but values, and says in what."""
    first = next(iter(modules))
    graph = _split(modules[first]).graph
    for name, module in modules.items():
        differs = _split(module).graph != graph
        # Texts of equal functions may differ, by their addresses.
        facts, found = (_facts(x, differs) for x in (modules[first], module))
        why = ["the structure of its parts differs"] if differs else []
        for path in reversed([*facts, *found]):
            a, b = facts.get(path, "missing"), found.get(path, "missing")
            if a != b:
                why = [f"its {path} is {b} and not {a}"]
        if why:
            raise ValueError(
                f"model.{name} must be like model.{first}, but {why[0]}; pass layers "
                "that differ with the ends."
            )


def _facts(module: nnx.Module, functions: bool) -> dict[str, str]:
    """All of a module except its values: types, shapes and static attributes."""
    facts = {"type": type(module).__name__}
    for path, node in nnx.iter_graph(module):
        name = ".".join(map(str, path))
        if isinstance(node, nnx.Variable):
            facts[name] = f"{type(node).__name__} of shape {np.shape(node)}"
        elif isinstance(node, nnx.Module):
            for key, value in vars(node).items():
                is_function = callable(value) and not isinstance(value, nnx.Module)
                if isinstance(value, str | int | float | tuple | None):
                    facts[f"{name}.{key}".lstrip(".")] = reprlib.repr(value)
                elif functions and is_function:
                    facts[f"{name}.{key}".lstrip(".")] = repr(value)
    return facts


def _stack(*xs: Tree) -> Tree:
    if isinstance(xs[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
    return jnp.stack(xs)
