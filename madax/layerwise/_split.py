"""From a Flax model to the parameters and functions for training by layers."""

import inspect
import reprlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class SplitLayers(NamedTuple):
    """A model taken apart by :func:`split_layers`.

    Attributes:
      params: ``{"ends": ..., "layers": ...}``, nested dicts of arrays, those of the
        layers with a leading axis.
      ends: ``ends(values, key=None)`` returns the model without its layers, a new one
        at each call. With a key, its streams of random numbers, which Dropout uses,
        start from it.
      layer: ``layer(values, x, key=None, **arguments)`` calls one of the layers with
        ``x`` and the arguments. With a key, its streams of random numbers start from
        it, and it is called with ``rngs=nnx.Rngs(key)`` if it has that argument.
    """

    params: dict[str, Any]
    ends: Callable[..., Any]
    layer: Callable[..., Any]


def split_layers(model: Any, name: str) -> SplitLayers:
    """Takes a Flax NNX model apart, for :func:`layerwise` to train as it is.

    The layers are a list of modules that are alike, an ``nnx.Sequential`` of them, or
    one module made by ``nnx.vmap``, as for ``nnx.scan``, whose arrays have a leading
    axis already. Only ``nnx.Param`` are trained, and no two layers may share one, nor a
    layer and the ends. Other variables of the ends are constants: an error says so
    where the model writes to one, as ``nnx.BatchNorm`` does to its statistics.

    Random numbers, as in ``nnx.Dropout``, need a key: give one to the step for the
    layers, and to ``ends`` for the ends. Without one they are an error. After
    ``model.eval()``, Dropout is off, and statistics stay as they are.

    A linen model made by ``nn.scan`` needs no such thing: its parameters are stacked,
    and ``lambda w, x: Block().apply({"params": w}, x)`` is one layer.

    Args:
      model: an ``nnx.Module``, of arrays or, from ``nnx.eval_shape``, of shapes; it is
        not changed. Its parameters may be made codes
        afterwards, those of the layers by ``quantize_params(..., channel_axis=0)``.
      name: the attribute that holds the layers, such as "blocks" or "decoder.blocks".

    Returns:
      The parameters, and functions to write ``embed``, ``layer`` and ``loss`` with.

    Raises:
      TypeError: if ``model`` is not an ``nnx.Module``.
      ValueError: if it has no such layers, they are not alike, share parameters, or
        hold variables that are neither parameters nor random number streams.

    Example:
      >>> import jax, jax.numpy as jnp, madax
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.first = nnx.Linear(2, 8, rngs=rngs)
      ...         self.blocks = nnx.Sequential(
      ...             *(nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
      ...         )
      >>> split = madax.split_layers(Model(nnx.Rngs(0)), "blocks")
      >>> split.params["layers"]["kernel"].shape
      (4, 8, 8)
      >>> init, step = madax.layerwise(
      ...     madax.madam(0.02),
      ...     embed=lambda ends, x: split.ends(ends).first(x),
      ...     layer=lambda w, x: nnx.relu(split.layer(w, x)),
      ...     loss=lambda ends, x, batch: jnp.mean((x - 1) ** 2),
      ...     dtype=jnp.float32,
      ... )
      >>> state = init(split.params)
      >>> params, state, value = jax.jit(step)(split.params, state, jnp.ones((3, 2)))
    """
    try:
        from flax import nnx
    except ImportError:
        nnx = None
    if nnx is None or not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {reprlib.repr(model)} of type "
            f"{type(model).__name__}; pass parameters of other models to layerwise as "
            "they are, those of layers stacked."
        )
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
    modules = {name: layers} if is_stacked else _listed(nnx, layers, name)
    _check_not_shared(nnx, {"": shell, **modules})
    ends = _Part(nnx, "", *_split(nnx, shell))
    one = _Part(nnx, name, *_layers(nnx, name, modules, is_stacked))

    def layer(values: Any, x: Any, key: Any = None, **arguments: Any) -> Any:
        module = one.module(values, key)
        takes_rngs = "rngs" in inspect.signature(module.__call__).parameters
        if key is not None and takes_rngs:
            arguments = {"rngs": nnx.Rngs(key), **arguments}
        return module(x, **arguments)

    params = {
        "ends": nnx.to_pure_dict(ends.params),
        "layers": nnx.to_pure_dict(one.params),
    }
    return SplitLayers(params, ends.module, layer)


class _Part(NamedTuple):
    """The ends of a model, or its layers: what ``nnx.split`` makes of them.

    Attributes:
      nnx: the module ``flax.nnx``.
      name: the path in the model.
      graph: the static structure.
      params: the parameters, which are stacked for layers.
      rngs: the streams of random numbers.
      others: all other variables.
    """

    nnx: Any
    name: str
    graph: Any
    params: Any
    rngs: Any
    others: Any

    def module(self, values: Any, key: Any = None) -> Any:
        """A new module of those values, whose random numbers start from the key."""
        nnx = self.nnx
        params, others = (
            jax.tree.map(lambda x: x, state) for state in (self.params, self.others)
        )
        nnx.replace_by_pure_dict(params, values)
        module = nnx.merge(self.graph, params, _started(self.rngs, key), others)
        # A write to any other variable would be lost with the module. Drawing a random
        # number is one, to the count of its stream.
        free = nnx.Param if key is None else (nnx.Param, nnx.RngState)
        for path, variable in _variables(nnx, module, self.name):
            if not isinstance(variable, free):
                refuse = partial(_refuse_write, nnx, path)
                if hasattr(nnx.Variable, "set_metadata"):
                    variable.set_metadata(on_set_value=refuse)
                else:  # in older versions of Flax
                    variable.on_set_value = refuse
        return module


def _started(rngs: Any, key: Any) -> Any:
    """Streams of random numbers that start from a key, no two alike."""
    key = jax.random.key(0) if key is None else key
    if not _is_key(key):
        key = jax.random.wrap_key_data(key)
    leaves, treedef = jax.tree.flatten(rngs)
    started = [
        jax.random.split(jax.random.fold_in(key, i), x.shape)
        if _is_key(x)
        else jnp.zeros(x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return treedef.unflatten(started)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _refuse_write(nnx: Any, path: str, variable: Any, value: Any) -> Any:
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


def _variables(nnx: Any, module: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The path in the model, and the variable, of all variables of a module."""
    prefix = (name,) if name else ()
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            yield ".".join(map(str, (*prefix, *path))), node


def _split(nnx: Any, module: Any) -> tuple[Any, Any, Any, Any]:
    """The graph, the parameters, the streams of random numbers, and all else."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _listed(nnx: Any, layers: Any, name: str) -> dict[str, Any]:
    """The path and module of each layer of a list."""
    found = [] if isinstance(layers, dict) else list(layers)
    if not found or not all(isinstance(one, nnx.Module) for one in found):
        raise ValueError(
            f"model.{name} must be a list of modules that are alike, got a "
            f"{type(layers).__name__} of {[type(one).__name__ for one in found]}; pass "
            "the path of such a list."
        )
    return {f"{name}.{i}": one for i, one in enumerate(found)}


def _layers(
    nnx: Any, name: str, modules: dict[str, Any], is_stacked: bool
) -> tuple[Any, Any, Any, Any]:
    """As :func:`_split`, for layers that are alike: their parameters are stacked."""
    parts = [_split(nnx, module) for module in modules.values()]
    graph, params, rngs, others = parts[0]
    if jax.tree.leaves(others):
        paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(others)]
        raise ValueError(
            f"model.{name} has variables that layerwise would not change, {paths}; use "
            "layers of nnx.Param alone."
        )
    if is_stacked:
        rngs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rngs)
    else:
        _check_alike(nnx, modules, [graph for graph, *_ in parts])
        params = jax.tree.map(_stack, *(params for _, params, *_ in parts))
    return graph, params, rngs, others


def _check_not_shared(nnx: Any, modules: dict[str, Any]) -> None:
    """Raises if a parameter is in two modules."""
    seen: dict[int, tuple[str, str]] = {}
    for name, module in modules.items():
        for path, variable in _variables(nnx, module, name):
            other, first = seen.setdefault(id(variable), (name, path))
            if other != name and isinstance(variable, nnx.Param):
                raise ValueError(
                    f"model.{path} and model.{first} are one nnx.Param, but layerwise "
                    "would train two; give each layer parameters of its own, or train "
                    "the model as a whole, with madax.value_and_grad."
                )


def _check_alike(nnx: Any, modules: dict[str, Any], graphs: Sequence[Any]) -> None:
    """Raises if modules differ in anything but values, and says in what."""
    first = next(iter(modules))
    for (name, module), graph in zip(modules.items(), graphs, strict=True):
        differs = graph != graphs[0]
        # Functions that are equal may be told apart by their addresses in a text.
        facts, found = (_facts(nnx, x, differs) for x in (modules[first], module))
        for path in [*facts, *found]:
            a, b = facts.get(path, "missing"), found.get(path, "missing")
            if a != b:
                raise ValueError(
                    f"model.{name} must be like model.{first}, but its {path} is {b} "
                    f"and not {a}; pass layers that differ with the ends."
                )
        if differs:
            raise ValueError(
                f"model.{name} must be like model.{first}, but the structure of its "
                "parts differs; pass layers that differ with the ends."
            )


def _facts(nnx: Any, module: Any, functions: bool) -> dict[str, str]:
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


def _stack(*xs: Any) -> Any:
    if isinstance(xs[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
    return jnp.stack(xs)
