"""From a Flax model to the parameters and functions for training by layers."""

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SplitLayers(NamedTuple):
    """A model taken apart by :func:`split_layers`.

    Attributes:
      params: ``{"ends": ..., "layers": ...}``, nested dicts of arrays, those of the
        layers with a leading axis.
      ends: ``ends(values)`` returns the model without its layers.
      layer: ``layer(values, x)`` applies one of the layers; with a third argument, a
        key, it is called with ``rngs=nnx.Rngs(key)``.
    """

    params: dict[str, Any]
    ends: Callable[[Any], Any]
    layer: Callable[..., Any]


def split_layers(model: Any, name: str) -> SplitLayers:
    """Takes a Flax NNX model apart, for :func:`layerwise` to train as it is.

    The layers are a list of modules that are alike, an ``nnx.Sequential`` of them, or
    one module made by ``nnx.vmap``, as for ``nnx.scan``, whose arrays have a leading
    axis already. Only ``nnx.Param`` are trained.

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
      ValueError: if it has no such layers, they are not alike, or hold variables that
        are neither parameters nor random number streams.

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
            f"model must be a flax.nnx.Module, got {model!r} of type "
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
    ends_graph, ends, ends_rest = nnx.split(shell, nnx.Param, ...)
    graph, stack, rngs = _stacked(nnx, layers, name)

    def without_layers(values: Any) -> Any:
        return nnx.merge(ends_graph, _state(nnx, ends, values), ends_rest)

    def layer(values: Any, x: Any, key: Any = None) -> Any:
        module = nnx.merge(graph, _state(nnx, stack, values), rngs)
        return module(x) if key is None else module(x, rngs=nnx.Rngs(key))

    params = {"ends": nnx.to_pure_dict(ends), "layers": nnx.to_pure_dict(stack)}
    return SplitLayers(params, without_layers, layer)


def _state(nnx: Any, like: Any, values: Any) -> Any:
    """The values as the state of a module."""
    state = jax.tree.map(lambda x: x, like)
    nnx.replace_by_pure_dict(state, values)
    return state


def _stacked(nnx: Any, layers: Any, name: str) -> tuple[Any, Any, Any]:
    """The graph of a layer, the state of all layers, and the random streams of one."""
    if isinstance(layers, nnx.Sequential):
        layers = layers.layers
    if isinstance(layers, nnx.Module) and callable(layers):
        graph, stack, rngs, others = nnx.split(layers, nnx.Param, nnx.RngState, ...)
        rngs = jax.tree.map(operator.itemgetter(0), rngs)
    else:
        parts = [nnx.split(one, nnx.Param, nnx.RngState, ...) for one in layers]
        if not parts or any(graph != parts[0][0] for graph, *_ in parts):
            raise ValueError(
                f"model.{name} must be a list of modules that are alike, got "
                f"{layers!r}; pass those that are not with the ends."
            )
        graph, _, rngs, others = parts[0]
        stack = jax.tree.map(_stack, *(state for _, state, *_ in parts))
    if jax.tree.leaves(others):
        paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(others)]
        raise ValueError(
            f"model.{name} has variables that layerwise would not change, {paths}; use "
            "layers of nnx.Param alone."
        )
    return graph, stack, rngs


def _stack(*xs: Any) -> Any:
    if isinstance(xs[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
    return jnp.stack(xs)
