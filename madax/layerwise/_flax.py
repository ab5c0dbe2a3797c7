"""Takes a Flax NNX model apart into its layers and the rest, and back.

It is imported only where Flax has been.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import jax
from flax import nnx

from madax._core.names import ENDS, LAYERS, Tree
from madax.layerwise._nnx_part import Part, part_of, shapes_of, values_of, variables
from madax.layerwise._nnx_stacks import NnxStack, layers_of, stacks_of
from madax.layerwise._plan import Function, Layer


class Apart(NamedTuple):
    """A model without its layers, and its layers as stacks."""

    graph: nnx.GraphDef  # of the whole model
    params: nnx.State  # shapes
    others: nnx.State  # all variables that are not trained
    rest: Part
    rest_values: Tree
    stacks: dict[str, list[NnxStack]]  # by the names that the user gave

    def split(self) -> Tree:
        """Returns the parameters that are trained."""
        stacks = {
            one.name: one.params for found in self.stacks.values() for one in found
        }
        return {ENDS: self.rest_values, LAYERS: _alone(stacks)}

    def layer(
        self,
        function: Function | Mapping[str, Function] | None = None,
        *old: Tree,
        **old_too: Tree,
    ) -> Layer | Mapping[str, Layer]:
        """Returns the argument ``layer`` of :func:`madax.layerwise`."""
        functions: dict = dict.fromkeys(self.stacks, function)
        if isinstance(function, Mapping):
            functions = dict(function)
        known = set(functions) == set(self.stacks)
        ok = known and all(f is None or callable(f) for f in functions.values())
        if not ok or old or old_too:
            raise TypeError(
                "split.layer takes a function of a module and of x, and returns the "
                "layer for layerwise: write split.layer(lambda block, x: block(x)), or "
                f"pass a dict with a function for each of {list(self.stacks)}."
            )
        return _alone(
            {
                stack.name: _layer(stack, functions[name])
                for name, found in self.stacks.items()
                for stack in found
            }
        )

    def model(self, params: Tree) -> nnx.Module:
        """Returns a new model with these parameters."""
        values = jax.tree.map(lambda x: x, params[ENDS])
        stacks = [stack for found in self.stacks.values() for stack in found]
        for stack in stacks:
            layers = params[LAYERS]
            layers = layers[stack.name] if len(stacks) > 1 else layers
            for (*above, last), one in stack.unstacked(layers).items():
                reduce(lambda at, key: at.setdefault(key, {}), above, values)[last] = (
                    one
                )
        state, others = (
            jax.tree.map(lambda x: x, state) for state in (self.params, self.others)
        )
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(self.graph, state, others)


def taken_apart(model: nnx.Module, names: Sequence[str]) -> Apart:
    """Takes the layers with these names out of a copy of the model."""
    graph, params, others = nnx.split(model, nnx.Param, ...)
    # The copy of the module shares its arrays.
    shell = nnx.merge(graph, params, others)
    found = []
    for name in names:
        *path, last = name.split(".")
        try:
            owner = reduce(getattr, path, shell)
            layers = getattr(owner, last)
        except AttributeError as error:
            raise ValueError(
                f"name is {name!r}, but {error}; pass the path of the attribute that "
                'holds the layers, such as "blocks".'
            ) from error
        found.append(layers_of(shell, name, layers))
        setattr(owner, last, None)
    modules = {k: v for layers in found for k, v in layers.modules.items()}
    _check_not_shared({"": shell, **modules})
    stacks = dict(zip(names, map(stacks_of, found), strict=True))
    rest, values = part_of(shell, ""), values_of(shell)
    return Apart(graph, shapes_of(params), others, rest, values, stacks)


def _layer(stack: NnxStack, function: Function | None) -> Layer:
    """Returns the function of all layers of a stack, or a list with one for each."""
    kinds = [_of_kind(kind, stack.names, function) for kind in stack.kinds]
    return [kinds[kind] for kind in stack.pattern] if len(kinds) > 1 else kinds[0]


def _of_kind(
    parts: Sequence[Part], names: Sequence[str | None], function: Function | None
) -> Function:
    """Returns a layer that runs these modules one after another."""

    def layer(
        values: Tree, x: Tree, key: jax.Array | None = None, **shared: Tree
    ) -> Tree:
        for i, (part, name) in enumerate(zip(parts, names, strict=True)):
            now = key if key is None or name is None else jax.random.fold_in(key, i)
            module = part.module(values if name is None else values[name], now)
            call = module.__call__ if function is None else function
            arguments = dict(shared)
            if key is not None and "rngs" in inspect.signature(call).parameters:
                arguments.setdefault("rngs", nnx.Rngs(now))
            before = () if function is None else (module,)
            x = call(*before, x, **arguments)
        return x

    return layer


def _alone(stacks: dict[str, Tree]) -> Tree:
    """Returns the entry of a single stack, which needs no name, or else the dict."""
    return stacks if len(stacks) > 1 else next(iter(stacks.values()))


def _check_not_shared(modules: dict[str, nnx.Module]) -> None:
    """Raises if a parameter is in two modules."""
    seen: dict[int, tuple[str, str]] = {}
    for name, module in modules.items():
        for path, variable in variables(module, name):
            other, first = seen.setdefault(id(variable), (name, path))
            if other != name and isinstance(variable, nnx.Param):
                raise ValueError(
                    f"model.{path} and model.{first} are one nnx.Param, but layerwise "
                    "would train two; give each layer parameters of its own, or train "
                    "the model as a whole, with madax.value_and_grad."
                )
