"""The layers of a Flax NNX model as stacks, even if they differ.

Layers whose parameters have the same shapes are one stack. If they differ in anything
else, they are of several kinds, each with a structure of its own. Layers of other
shapes are a stack of their own; where shapes repeat, a period of layers is one layer.

It is imported only where Flax has been.
"""

import itertools
import reprlib
import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madax._core.names import Tree
from madax.layerwise._nnx_part import Part, part_of, shapes_of, values_of

# More of them than this are likely to differ in what was not meant to differ.
_MANY_KINDS = 16


class Layers(NamedTuple):
    """The layers under one name of a model: modules, or one made by ``nnx.vmap``."""

    name: str
    modules: dict[str, nnx.Module]  # by their paths, for messages
    keys: list[tuple]  # the same paths as keys of the model's state
    is_stacked: bool


class NnxStack(NamedTuple):
    """A stack of layers, of one or more modules each."""

    name: str
    params: Tree
    keys: list[tuple[tuple, ...]]  # of each layer: the paths of its modules
    names: tuple[str | None, ...]  # of the modules, in the parameters of a layer
    kinds: list[tuple[Part, ...]]  # no two the same
    pattern: list[int]  # the kind of each layer

    def unstacked(self, params: Tree) -> dict[tuple, Tree]:
        """Returns the parameters of each module, by its path."""
        if not self.pattern:  # The model has it as a stack, too.
            return {self.keys[0][0]: params}
        found = {}
        for i, keys in enumerate(self.keys):
            one = jax.tree.map(lambda x, i=i: x[i], params)
            for name, key in zip(self.names, keys, strict=True):
                found[key] = one if name is None else one[name]
        return found


def layers_of(model: nnx.Module, name: str, layers: Tree) -> Layers:
    """Returns the layers under a name of a model."""
    if isinstance(layers, nnx.Sequential):
        layers = layers.layers
    is_stacked = isinstance(layers, nnx.Module) and callable(layers)
    modules = {name: layers} if is_stacked else _listed(layers, name)
    at = {id(node): path for path, node in nnx.iter_graph(model)}
    keys = [at[id(one)] for one in modules.values()]
    return Layers(name, modules, keys, is_stacked)


def stacks_of(layers: Layers) -> list[NnxStack]:
    """Returns the stacks of layers, one after another."""
    name, modules = layers.name, list(layers.modules.values())
    parts = [part_of(module, name) for module in modules]
    for part in parts:
        _check_variables(part)
    values = list(map(values_of, modules))
    if layers.is_stacked:
        (part,) = parts
        _check_stacked(name, layers.modules[name], jax.tree.leaves((values, part.rngs)))
        rngs = jax.eval_shape(lambda x: jax.tree.map(lambda x: x[0], x), part.rngs)
        part = part._replace(rngs=rngs)
        key = layers.keys[0]
        return [NnxStack(name, values[0], [(key,)], (None,), [(part,)], [])]
    plan = _plan([_shapes(one) for one in values])
    stacks = []
    for start, stop, period in plan:
        called = name if len(plan) == 1 else f"{name}_{start}"
        names = [f"{name.split('.')[-1]}_{i}" for i in range(period)]
        firsts = range(start, stop, period)
        each = [values[i : i + period] for i in firsts]
        trees = [
            one[0] if period == 1 else dict(zip(names, one, strict=True))
            for one in each
        ]
        stack = NnxStack(
            called,
            jax.tree.map(_stack, *trees),
            [tuple(layers.keys[i : i + period]) for i in firsts],
            (None,) if period == 1 else tuple(names),
            *_kinds([parts[i : i + period] for i in firsts]),
        )
        stacks.append(stack)
    _warn_of_many(layers, sum(len(stack.kinds) * len(stack.names) for stack in stacks))
    return stacks


def _warn_of_many(layers: Layers, kinds: int) -> None:
    """Warns, in the caller of ``split_layers``, of kinds that take long to compile."""
    if kinds <= _MANY_KINDS:
        return
    for (first, a), (other, b) in itertools.pairwise(layers.modules.items()):
        if difference := _difference(a, b):
            warnings.warn(
                f"model.{layers.name} has {kinds} kinds of layers, and each is "
                f"compiled; model.{other} differs from model.{first}, as {difference}: "
                "make it the same in all layers, if that is no part of what they do.",
                stacklevel=5,
            )
            return


def _plan(shapes: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Returns where each stack starts and stops, and how many modules form a layer.

    A period is the smallest number of modules after which shapes repeat. A period is
    decoded as a whole.
    """

    def runs(start):
        lengths = [len(list(run)) for _, run in itertools.groupby(shapes[start:])]
        stops = list(itertools.accumulate(lengths, initial=start))
        return [(a, b, 1) for a, b in itertools.pairwise(stops)]

    plans = [runs(0)]
    for period in range(2, len(shapes) // 2 + 1):
        stop = len(shapes) - len(shapes) % period
        if all(shapes[i] == shapes[i % period] for i in range(stop)):
            plans.append([(0, stop, period), *runs(stop)])
    return min(plans, key=lambda plan: sum(period for *_, period in plan))


def _shapes(values: Tree) -> Hashable:
    leaves, treedef = jax.tree.flatten(shapes_of(values))
    return treedef, tuple((x.shape, x.dtype) for x in leaves)


def _kinds(
    layers: Sequence[Sequence[Part]],
) -> tuple[list[tuple[Part, ...]], list[int]]:
    """Returns one layer of each structure, and the structure of each layer."""
    kinds: list[tuple[Part, ...]] = []
    pattern = []
    for parts in layers:
        graphs = [part.graph for part in parts]
        known = [[part.graph for part in kind] for kind in kinds]
        if graphs not in known:
            kinds.append(tuple(parts))
            known.append(graphs)
        pattern.append(known.index(graphs))
    return kinds, pattern


def _listed(layers: Iterable[nnx.Module], name: str) -> dict[str, nnx.Module]:
    """Returns the path and module of each layer in a list."""
    found = [] if isinstance(layers, dict) else list(layers)
    if not found or not all(isinstance(one, nnx.Module) for one in found):
        raise ValueError(
            f"model.{name} must be a list of modules, got a {type(layers).__name__} of "
            f"{[type(one).__name__ for one in found]}; pass the path of such a list."
        )
    return {f"{name}.{i}": one for i, one in enumerate(found)}


def _check_stacked(name: str, module: nnx.Module, arrays: Sequence[Tree]) -> None:
    """Raises if the arrays of one module have no leading axis in common."""
    sizes = {x.shape[:1] for x in arrays}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"model.{name} is a {type(module).__name__} whose arrays have no leading "
            "axis in common, which would count layers; pass the path of a list of "
            "layers, or of a module made by nnx.vmap."
        )


def _check_variables(part: Part) -> None:
    """Raises if a layer has more than parameters and random numbers."""
    if jax.tree.leaves(part.others):
        found = nnx.to_flat_state(part.others)
        paths = [".".join(map(str, path)) for path, _ in found]
        raise ValueError(
            f"model.{part.path} has variables that layerwise would not change, "
            f"{paths}; use layers of nnx.Param alone."
        )


def _difference(first: nnx.Module, other: nnx.Module) -> str:
    """Describes how two modules differ; empty if they do not."""
    graphs = [part_of(module, "").graph for module in (first, other)]
    differs = graphs[0] != graphs[1]
    # Equal functions may print differently, by their addresses.
    facts, found = (_facts(x, differs) for x in (first, other))
    for path in [*facts, *found]:
        a, b = facts.get(path, "missing"), found.get(path, "missing")
        if a != b:
            return f"its {path} is {b} and not {a}"
    return "the structure of its parts differs" if differs else ""


def _facts(module: nnx.Module, functions: bool) -> dict[str, str]:
    """Returns the types, shapes and static attributes of a module."""
    facts = {"type": type(module).__name__}
    is_node = nnx.graph.is_graph_node
    for path, node in nnx.iter_graph(module):
        name = ".".join(map(str, path))
        if isinstance(node, nnx.Variable):
            facts[name] = f"{type(node).__name__} of shape {np.shape(node)}"
        elif isinstance(node, nnx.Module):
            for key, value in vars(node).items():
                is_part = isinstance(value, nnx.Variable) or is_node(value)
                is_function = callable(value) and not is_part
                if isinstance(value, str | int | float | tuple | None):
                    facts[f"{name}.{key}".lstrip(".")] = reprlib.repr(value)
                elif functions and is_function:
                    facts[f"{name}.{key}".lstrip(".")] = repr(value)
    return facts


def _stack(*xs: Tree) -> Tree:
    if isinstance(xs[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
    return jnp.stack(xs)
