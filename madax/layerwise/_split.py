"""Splits a Flax model into parameters and functions for :func:`madax.layerwise`."""

import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from madax._core.names import Tree


class SplitLayers(NamedTuple):
    """The result of :func:`split_layers`."""

    params: Tree
    ends: Callable[..., Tree]
    layer: Callable[..., Tree]
    model: Callable[[Tree], Tree]


def split_layers(model: object, name: str | Sequence[str]) -> SplitLayers:
    """Takes a Flax NNX model apart, for :func:`madax.layerwise` to train it.

    The layers are a list of modules, an ``nnx.Sequential`` of them, or one module made
    by ``nnx.vmap``, as for ``nnx.scan``, whose arrays have a leading axis already. Only
    ``nnx.Param`` are trained. Layers may share none with each other or with the ends.
    Other variables of the ends are constants, and a model that writes to one, as
    ``nnx.BatchNorm`` does to its statistics, is an error.

    Layers whose parameters have the same shapes are one stack. They may differ in
    anything else, for example in local and global attention: each kind of layer is
    compiled, and layers run in the order of the model. More than 16 kinds give a
    warning, which names what they differ in. Layers of other shapes, such as mixtures
    of experts after dense layers, are a stack of their own. If shapes repeat with a
    period of p layers, p of them count as one layer, and are decoded together.

    Layers that draw random numbers, such as ``nnx.Dropout``, need a key: pass one to
    the step for the layers, and to ``ends`` for the ends. Without a key they raise an
    error. After ``model.eval()`` Dropout is off, and statistics are constant.

    A linen model made by ``nn.scan`` does not need this function: its parameters are
    stacked, and ``lambda w, x: Block().apply({"params": w}, x)`` is one layer.

    Args:
      model: an ``nnx.Module``, of arrays or, from ``nnx.eval_shape``, of shapes; it is
        not changed.
      name: the attribute that holds the layers, such as "blocks" or "decoder.blocks";
        or several, in the order in which they run, such as ("encoder", "decoder").

    Returns:
      A named tuple (params, ends, layer, model), to write ``embed``, ``layer`` and
      ``loss`` with.

      ``params`` is ``{"ends": ..., "layers": ...}``, nested dicts of arrays; arrays of
      layers have a leading axis. Both can be quantised, the layers by
      ``quantize_params(..., channel_axis=0)``. Several stacks are a dict under
      ``"layers"``, by their names in ``name``. If shapes differ under one name, the
      index of a stack's first layer is added ("blocks_3").

      ``ends(values, key=None)`` returns a new model without its layers, whose streams
      of random numbers start from the key, if given.

      ``layer(function=None)`` returns the ``layer`` that :func:`madax.layerwise` takes.
      It calls ``function(module, x, **shared)``, whatever kind of layer the module is;
      None calls ``module(x, **shared)``. If the step has a key, the module's streams of
      random numbers start from it, and an argument ``rngs`` of the function, or else of
      the module, is given ``nnx.Rngs(key)``. For several names, it may be a dict of
      functions.

      ``model(params)`` returns a whole new model of these parameters, floats or codes,
      to evaluate or save.

    Raises:
      TypeError: if ``model`` is not an ``nnx.Module``, or ``layer`` is not given a
        function.
      ValueError: if it has no such layers, or layers that share parameters, or hold
        variables that are neither parameters nor random number streams.

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
      ...     layer=split.layer(lambda block, x: nnx.relu(block(x))),
      ...     loss=lambda ends, x, batch: jnp.mean((x - 1) ** 2),
      ... )
      >>> state = init(split.params)
      >>> params, state, value = jax.jit(step)(split.params, state, jnp.ones((3, 2)))
      >>> split.model(params).blocks(jnp.ones((3, 8))).shape
      (3, 8)
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {reprlib.repr(model)} of type "
            f"{type(model).__name__}; pass parameters of other models to layerwise as "
            "they are, with the layers stacked."
        )
    from madax.layerwise._flax import taken_apart

    apart = taken_apart(model, [name] if isinstance(name, str) else name)
    return SplitLayers(apart.split(), apart.rest.module, apart.layer, apart.model)
