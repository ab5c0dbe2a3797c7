"""What a model of others is to a test, whatever framework it is written in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import madax

TOKENS = jnp.arange(16)[None] % 8 + jnp.arange(2)[:, None]


def images(size):
    return jax.random.normal(jax.random.key(1), (2, size, size, 3))


class Layers(NamedTuple):
    """How ``layerwise`` runs a model of Flax NNX.

    Attributes:
      names: the attributes that hold layers.
      embed: from the model without its layers to what enters the first.
      layer: from a layer, what enters it, and what is shared, to what leaves it.
      rest: from the model without its layers, and what leaves the last, to the output.
      shared: from the model without its layers to what all layers get.
    """

    names: str | tuple[str, ...]
    embed: Any
    layer: Any
    rest: Callable
    shared: Any = None


class Other(NamedTuple):
    """A model, and its output for an input of its own.

    Attributes:
      model: a module, or a tree of arrays.
      output: from the model to logits.
      layers: see above, or why a model is not trained by layers.
      train: from the model and the number of steps to its losses and the trained
        model, by the loop of its authors where they have one.
      decode: whether the model's layers take no codes, but their values.
    """

    model: Any
    output: Callable[[Any], jax.Array]
    layers: Layers | str
    train: Callable
    decode: bool = False

    def error(self, model):
        """The cross-entropy of labels that are drawn."""
        if self.decode:
            model = madax.dequantize_params(model)
        return error(self.output(model))


def error(logits):
    shape = logits.shape[:-1]
    labels = jax.random.randint(jax.random.key(3), shape, 0, logits.shape[-1])
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def apart(model):
    """The parameters of a model as a tree of arrays, and the way back."""
    if isinstance(model, nnx.Module):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        # Variables of their own for each merged model, which may write to them.
        new = lambda: jax.tree.map(lambda x: x, rest)
        return params, lambda params: nnx.merge(graph, params, new())
    leaves, treedef = jax.tree.flatten(model)
    at = [i for i, x in enumerate(leaves) if hasattr(x, "dtype")]

    def together(params):
        new = dict(zip(at, jax.tree.leaves(params), strict=True))
        return treedef.unflatten([new.get(i, x) for i, x in enumerate(leaves)])

    arrays = [x if i in at else None for i, x in enumerate(leaves)]
    return treedef.unflatten(arrays), together
