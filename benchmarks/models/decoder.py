"""A decoder-only Transformer in the shape of Llama, as functions of a stack of layers.

Its memory grows with the length of a sequence, not with the square of it, and the
logits of a large vocabulary are never there all at once.
"""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import madax
from benchmarks.lib.steps import Functions, apply

Params = dict[str, Any]
QUERIES = 512  # Attended at a time.
LOGITS = 2**26  # Computed at a time.


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the network.

    Attributes:
      vocabulary: number of tokens.
      layers: number of them.
      width: features of a token.
      hidden: features within a gated MLP.
      heads: of queries.
      kv_heads: of keys and values, which divides the heads.
      base: of the wavelengths of rotary positions.
      gated: whether the MLP has a gate, as in Llama, or none, as in GPT-2.
      tied: whether the last layer is the embedding.
      fused: whether attention is one kernel of cuDNN, for bfloat16 on a GPU.
    """

    vocabulary: int
    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    base: float = 1e4
    gated: bool = True
    tied: bool = False
    fused: bool = False


SIZES = {
    "tiny": Size(256, 2, 64, 128, 4, 2),
    "GPT-2 124M": Size(50257, 12, 768, 3072, 12, 12, gated=False, tied=True),
    "Llama-2 7B": Size(32000, 32, 4096, 11008, 32, 32),
    "Llama-3 8B": Size(128256, 32, 4096, 14336, 32, 8, base=5e5),
    "Llama-2 13B": Size(32000, 40, 5120, 13824, 40, 40),
    "CodeLlama 34B": Size(32000, 48, 8192, 22016, 64, 8, base=1e6),
    "Llama-2 70B": Size(32000, 80, 8192, 28672, 64, 8),
}


def init(size: Size, key: jax.Array, layers: int | None = None) -> Params:
    """Returns parameters, float32: the ends, and layers with a leading axis.

    Args:
      size: of the network.
      key: of the random numbers.
      layers: how many to make; None for all.
    """
    depth = size.layers if layers is None else layers
    wide, head = size.width, size.width // size.heads
    shapes = {
        "q": (wide, size.heads * head),
        "k": (wide, size.kv_heads * head),
        "v": (wide, size.kv_heads * head),
        "o": (size.heads * head, wide),
        "up": (wide, size.hidden),
        "down": (size.hidden, wide),
    }
    if size.gated:
        shapes["gate"] = (wide, size.hidden)
    keys = iter(jax.random.split(key, len(shapes) + 2))
    # Matrices whose products are added to the residual stream begin small.
    stack: Params = {
        name: jax.random.normal(next(keys), (depth, *shape))
        * shape[0] ** -0.5
        / ((2 * size.layers) ** 0.5 if name in ("o", "down") else 1)
        for name, shape in shapes.items()
    }
    stack |= {f"norm{i}": jnp.ones((depth, wide)) for i in (1, 2)}
    table = (size.vocabulary, wide)
    ends = {"norm": jnp.ones(wide)}
    for name in ("tokens",) if size.tied else ("tokens", "head"):
        ends[name] = jax.random.normal(next(keys), table) * wide**-0.5
    return {"ends": ends, "layers": stack}


def embed(ends: Params, tokens: jax.Array) -> jax.Array:
    """Returns what the layers take of sequences of shape (batch, length + 1)."""
    return ends["tokens"][tokens[:, :-1]]


def layer(size: Size, w: Params, x: jax.Array) -> jax.Array:
    """Returns features of shape (batch, length, width), as given."""
    batch, length, _ = x.shape
    h = _normalised(x, w["norm1"])
    q, k, v = (
        (h @ w[name]).reshape(batch, length, heads, -1)
        for name, heads in (
            ("q", size.heads),
            ("k", size.kv_heads),
            ("v", size.kv_heads),
        )
    )
    attend = _fused_attention if size.fused else _attention
    attended = attend(_rotated(q, size.base), _rotated(k, size.base), v)
    x = x + attended.reshape(batch, length, -1) @ w["o"]
    h = _normalised(x, w["norm2"])
    if size.gated:
        h = jax.nn.silu(h @ w["gate"]) * (h @ w["up"])
    else:
        h = jax.nn.gelu(h @ w["up"])
    return x + h @ w["down"]


def loss(ends: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean nats per token, in float32."""
    x, head = _last(ends, x)
    x, targets = x.reshape(-1, x.shape[-1]), tokens[:, 1:].reshape(-1)
    return cross_entropy(x, head, targets) / len(x)


@jax.custom_vjp
def cross_entropy(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the sum of nats, float32, of some of the vocabulary at a time.

    Args:
      x: features, shape (tokens, width).
      head: shape (vocabulary, width).
      targets: integers, shape (tokens,).
    """
    return _cross_entropy_forward(x, head, targets)[0]


def _cross_entropy_forward(
    x: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def add(carry, now):
        total, picked = carry
        first, part = now
        logits, here = _logits(x, part), targets - first
        at = jnp.clip(here, 0, len(part) - 1)[:, None]
        found = jnp.take_along_axis(logits, at, 1)[:, 0]
        picked = jnp.where((here >= 0) & (here < len(part)), found, picked)
        return (jnp.logaddexp(total, jax.nn.logsumexp(logits, -1)), picked), None

    zeros = jnp.zeros(len(x), jnp.float32)
    (total, picked), _ = jax.lax.scan(add, (zeros - jnp.inf, zeros), _cut(x, head))
    return jnp.sum(total - picked), (x, head, targets, total)


def _cross_entropy_backward(
    kept: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, head, targets, total = kept

    def add(dx, now):
        first, part = now
        p = jnp.exp(_logits(x, part) - total[:, None])
        p = g * (p - jax.nn.one_hot(targets - first, len(part)))
        p = p.astype(x.dtype)
        return dx + (p @ part).astype(jnp.float32), p.T @ x

    dx, parts = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), _cut(x, head))
    return dx.astype(x.dtype), parts.reshape(head.shape), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)


def _cut(x: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the head in parts, and where they begin."""
    part = _divisor(len(head), max(1, LOGITS // len(x)))
    return jnp.arange(0, len(head), part), head.reshape(-1, part, head.shape[-1])


def whole_loss(size: Size, params: Params, tokens: jax.Array) -> jax.Array:
    """Returns the loss in one function, layers computed again on the way back."""
    one = jax.checkpoint(lambda x, w: (layer(size, w, x), None))
    x, _ = jax.lax.scan(one, embed(params["ends"], tokens), params["layers"])
    return loss(params["ends"], x, tokens)


def layerwise(
    size: Size, tx: optax.GradientTransformation, **options: Any
) -> Functions:
    """Returns ``madax.layerwise`` of the network, with options of that."""
    return madax.layerwise(tx, embed, partial(layer, size), loss, **options)


def ordinary(
    size: Size,
    tx: optax.GradientTransformation,
    dtype: jax.typing.DTypeLike | None = None,
) -> Functions:
    """Returns the usual step: decode all weights, take all gradients, then update.

    Args:
      size: of the network.
      tx: the optimizer.
      dtype: of the weights in the network; None for their own.
    """

    def step(params, state, batch):
        values = madax.dequantize_params(params, dtype)
        value, grads = jax.value_and_grad(partial(whole_loss, size))(values, batch)
        return *apply(tx, params, state, grads), value

    return tx.init, step


def logits(size: Size, params: Params, tokens: jax.Array) -> jax.Array:
    """Returns the logits of what comes after the last token, of (batch, length)."""
    x, ends = params["ends"]["tokens"][tokens], params["ends"]
    x, _ = jax.lax.scan(lambda x, w: (layer(size, w, x), None), x, params["layers"])
    x, head = _last(ends, x[:, -1])
    return x @ head.T


def count(size: Size) -> int:
    """Returns the number of parameters."""
    shapes = jax.eval_shape(partial(init, size), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


def _last(ends: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns features and the matrix whose rows they are multiplied with."""
    return _normalised(x, ends["norm"]), ends.get("head", ends["tokens"])


def _normalised(x: jax.Array, weight: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-6)).astype(x.dtype) * weight.astype(x.dtype)


def _rotated(x: jax.Array, base: float) -> jax.Array:
    """Returns queries or keys with their positions, of (batch, length, heads, size)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * base ** (-jnp.arange(half) / half)
    cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns causal attention; with many queries, of some of them at a time."""
    length = q.shape[1]
    chunk = _divisor(length, QUERIES)

    @jax.checkpoint
    def attend(first, q):
        rows, columns = first + jnp.arange(chunk)[:, None], jnp.arange(length)
        return jax.nn.dot_product_attention(q, k, v, mask=columns <= rows)

    if chunk == length:
        return attend(0, q)
    cut = jnp.moveaxis(q.reshape(q.shape[0], -1, chunk, *q.shape[2:]), 1, 0)
    out = jax.lax.map(lambda now: attend(*now), (jnp.arange(0, length, chunk), cut))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


_fused_attention = partial(
    jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
)


@functools.cache
def can_fuse() -> bool:
    """Returns whether fused attention runs on the first device."""
    x = jnp.ones((1, 64, 1, 32), jnp.bfloat16)
    try:
        jax.block_until_ready(jax.grad(lambda x: _fused_attention(x, x, x).sum())(x))
    except Exception:  # Of JAX, XLA or cuDNN, whose kinds differ by version.
        return False
    return True


def _divisor(n: int, most: int) -> int:
    """Returns the greatest divisor of ``n`` that is not more than ``most``."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
