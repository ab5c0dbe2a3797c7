"""The structure, without values, of a layer or of the ends of a Flax NNX model.

It is imported only where Flax has been.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from madax._core.names import Tree
from madax.layerwise._stacks import is_typed_key


class Part(NamedTuple):
    """A module as ``nnx.split`` returns it, and its path in the model."""

    path: str
    graph: nnx.GraphDef  # the static structure
    params: nnx.State  # shapes
    rngs: nnx.State  # the streams of random numbers
    others: nnx.State  # all other variables

    def module(self, values: Tree, key: jax.Array | None = None) -> nnx.Module:
        """Returns a module of ``values``, whose random numbers start from the key."""
        params, others = (
            jax.tree.map(lambda x: x, state) for state in (self.params, self.others)
        )
        nnx.replace_by_pure_dict(params, values)
        module = nnx.merge(self.graph, params, _started(self.rngs, key), others)
        # A write to any other variable would be lost with the module. Drawing a random
        # number is such a write, to the count of its stream.
        free = nnx.Param if key is None else (nnx.Param, nnx.RngState)
        for path, variable in variables(module, self.path):
            if not isinstance(variable, free):
                refuse = partial(_refuse_write, path)
                if hasattr(nnx.Variable, "set_metadata"):
                    variable.set_metadata(on_set_value=refuse)
                else:  # in older versions of Flax
                    variable.on_set_value = refuse
        return module


def part_of(module: nnx.Module, path: str) -> Part:
    """Returns the structure of a module, without a reference to its parameters."""
    graph, params, *others = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return Part(path, graph, shapes_of(params), *others)


def shapes_of(tree: Tree) -> Tree:
    """Returns the tree with shapes in place of arrays."""
    shape = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: shape(x.shape, x.dtype), tree)


def values_of(module: nnx.Module) -> Tree:
    """Returns the parameters of a module, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def variables(module: nnx.Module, name: str) -> Iterator[tuple[str, nnx.Variable]]:
    """The path in the model of each variable of a module, and the variable."""
    prefix = (name,) if name else ()
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            yield ".".join(map(str, (*prefix, *path))), node


def _started(rngs: nnx.State, key: jax.Array | None) -> nnx.State:
    """Returns streams of random numbers that start from a key, no two alike."""
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
    """Raises when the model writes to a variable."""
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
