"""The block of Transformers, for images and text."""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerScale(nnx.Module):
    """A gain for each feature, all of one size at init.

    Touvron et al., `Going deeper with image transformers
    <https://arxiv.org/abs/2103.17239>`_, 2021.
    """

    def __init__(self, width: int, size: float):
        self.gain = nnx.Param(jnp.full(width, size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the features times their gains."""
        return x * self.gain[...]


# It is one function, as layers are alike only if their attributes are equal.
def _unscaled(x: jax.Array) -> jax.Array:
    return x


class Block(nnx.Module):
    """Attention, then a layer of four times the width, both after a layer norm.

    Attributes:
      heads: of the attention.
      causal: whether a token sees only those before it.
      scale1: what the attention goes through before it is added.
      scale2: what the other branch goes through.
    """

    def __init__(
        self,
        width: int,
        rngs: nnx.Rngs,
        *,
        heads: int,
        causal: bool,
        layer_scale: float | None = None,
    ):
        self.heads, self.causal = heads, causal
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.scale1, self.scale2 = (
            LayerScale(width, layer_scale) if layer_scale else _unscaled
            for _ in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the new states of tokens, of shape (batch, tokens, width)."""
        split = (*x.shape[:2], self.heads, -1)
        qkv = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        q, k, v = (part.reshape(split) for part in qkv)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.scale1(self.out(attended.reshape(x.shape)))
        return x + self.scale2(self.down(nnx.gelu(self.up(self.norm2(x)))))
