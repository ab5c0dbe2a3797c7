"""Gradients of GPT-2 a layer at a time: no more than one block is ever decoded.

The blocks are stacked, each leaf in one array, and a scan goes up and down them. What
is kept of a block on the way up is its input; on the way down it is computed again.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import madax
from benchmarks import gpt2

Params = dict[str, Any]


def init(size: gpt2.Size, key: jax.Array) -> Params:
    """Returns the parameters, float32; those of blocks have a leading axis."""
    params = gpt2.init(size, key)
    blocks = params["blocks"]["layers"]
    return params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks.values())}


def quantize(params: Params, format: madax.Format | None) -> Params:
    """Returns parameters with the matrices as codes, a scale for each block's."""
    if format is None:
        return params
    ends = {name: w for name, w in params.items() if name != "blocks"}
    blocks = madax.quantize_params(
        params["blocks"],
        format,
        where=lambda path, w: path.endswith("kernel"),
        channel_axis=0,
    )
    return madax.quantize_params(ends, format) | {"blocks": blocks}


def gradients(
    size: gpt2.Size, params: Params, tokens: jax.Array, dtype: Any = jnp.float32
) -> Params:
    """Returns the gradients of ``gpt2.loss``, in the form of ``init``.

    Args:
      size: of the network.
      params: floats or codes.
      tokens: sequences of shape (batch, length + 1).
      dtype: of decoded weights and of gradients.
    """
    decode = partial(madax.dequantize_params, dtype=dtype)
    no_blocks = dataclasses.replace(size, layers=0)
    ends_graph = nnx.graphdef(nnx.eval_shape(lambda: gpt2.GPT2(no_blocks, nnx.Rngs(0))))
    block_graph = nnx.graphdef(nnx.eval_shape(lambda: gpt2.Block(size, nnx.Rngs(0))))
    ends = decode({name: w for name, w in params.items() if name != "blocks"})
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def apply(weights: Params, x: jax.Array) -> jax.Array:
        return nnx.merge(block_graph, weights)(x)

    def finish(ends: Params, x: jax.Array) -> jax.Array:
        logits = nnx.merge(ends_graph, ends).logits(x)
        return gpt2.cross_entropy(logits, targets)

    def up(x, block):
        return apply(decode(block), x), x

    def down(g, now):
        block, x = now
        _, pull = jax.vjp(apply, decode(block), x)
        gradients, g = pull(g)
        return g, gradients

    x = nnx.merge(ends_graph, ends).embed(inputs)
    x, kept = jax.lax.scan(up, x, params["blocks"])
    grads, g = jax.grad(finish, argnums=(0, 1))(ends, x)
    g, blocks = jax.lax.scan(down, g, (params["blocks"], kept), reverse=True)
    # What the embeddings get from below, added in place to what they get from above.
    g = g.astype(dtype)
    above, places = grads["tokens"]["embedding"], grads["positions"]["embedding"]
    return grads | {
        "tokens": {"embedding": above.at[inputs].add(g)},
        "positions": {"embedding": places.at[: inputs.shape[1]].add(g.sum(0))},
        "blocks": blocks,
    }
