"""A decoder-only Transformer in the shape of GPT-2, and train steps to measure."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import madax
from benchmarks.lib.contender import Contender
from benchmarks.lib.steps import ShapedStep, Step, Tree
from benchmarks.workloads.attention import Block


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the network, GPT-2's smallest by default: 124 M parameters.

    Attributes:
      vocabulary: number of tokens.
      context: greatest length of a sequence.
      layers: number of blocks, of 12 parameters each.
      width: features of a token.
      heads: attention heads per block.
    """

    vocabulary: int = 50257
    context: int = 1024
    layers: int = 12
    width: int = 768
    heads: int = 12


SIZES = {
    "124M": Size(),
    "12M": Size(vocabulary=8192, context=256, width=256, heads=4),
    "tiny": Size(vocabulary=256, context=32, layers=2, width=32, heads=2),
}


class GPT2(nnx.Module):
    """The language model; its embedding is also its last layer."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(size.vocabulary, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.context, size.width, rngs=rngs)
        block = partial(Block, size.width, rngs, heads=size.heads, causal=True)
        self.blocks = nnx.Sequential(*(block() for _ in range(size.layers)))
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of the tokens after those of shape (batch, length)."""
        return self.logits(self.blocks(self.embed(tokens)))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns what the blocks take, of shape (batch, length, width)."""
        return self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns the logits from what the blocks give."""
        return self.tokens.attend(self.norm(x))


def init(size: Size, key: jax.Array) -> Tree:
    """Returns the parameters, float32."""
    return nnx.to_pure_dict(nnx.state(GPT2(size, nnx.Rngs(key)), nnx.Param))


def loss(size: Size, params: optax.Params, tokens: jax.Array) -> jax.Array:
    """Returns the mean nats per token, of sequences of shape (batch, length + 1)."""
    graph = nnx.graphdef(shaped(size))
    return cross_entropy(nnx.merge(graph, params)(tokens[:, :-1]), tokens[:, 1:])


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean nats per token, computed in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def train_step(
    size: Size, batch: int, length: int, contender: Contender, weights: Tree = None
) -> tuple[Step, jax.Array]:
    """Returns a whole train step, forwards and backwards too, and its tokens."""
    del weights
    shape = (batch, length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)

    def step(params, state, tokens):
        decoded = madax.dequantize_params(params, contender.grads)
        grads = jax.grad(partial(loss, size))(decoded, tokens)
        return contender.step(params, state, grads)

    return step, tokens


def whole_step(contender: Contender, size: Size, batch: int, length: int) -> ShapedStep:
    """Returns the usual train step, which decodes all weights first."""
    weights = jax.eval_shape(partial(init, size, jax.random.key(0)))
    step, tokens = train_step(size, batch, length, contender)
    params = jax.eval_shape(contender.store, weights)
    return ShapedStep(params, jax.eval_shape(contender.tx.init, params), tokens, step)


def layerwise_step(
    contender: Contender, size: Size, batch: int, length: int
) -> ShapedStep:
    """Returns a train step by ``madax.layerwise``."""
    split = madax.split_layers(shaped(size), "blocks")

    def loss(ends, x, tokens):
        return cross_entropy(split.ends(ends).logits(x), tokens[:, 1:])

    dtype = contender.grads
    run = madax.layerwise(
        contender.tx,
        lambda ends, tokens: split.ends(ends).embed(tokens[:, :-1]).astype(dtype),
        split.layer(),
        loss,
        dtype=dtype,
    )
    params = jax.eval_shape(contender.store_stack, split.params)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    return ShapedStep(params, jax.eval_shape(run.init, params), tokens, run.step)


def shaped(size: Size) -> GPT2:
    """Returns the network with shapes instead of arrays."""
    return nnx.eval_shape(lambda: GPT2(size, nnx.Rngs(0)))
