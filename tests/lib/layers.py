"""A network of equal layers with a tied table, for training a layer at a time."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import madax

DEPTH, WIDTH, VOCABULARY, STEPS = 2, 16, 32, 6


def embed(ends, batch):
    return ends["table"][batch[:, :-1]]


def layer(w, x, key=None):
    """Of sums and products apart, which no compiler fuses into one rounding."""
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.75, x.shape), x, 0)
    return x + jax.nn.relu((x * w["gain"]) @ w["mlp"]["w"])


def loss(ends, x, batch):
    logits, labels = x @ ends["table"].T, batch[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


FUNCTIONS = embed, layer, loss


@functools.cache
def weights(format=None):
    """Parameters whose layers are stacked."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape) / WIDTH**0.5)
    ends = {"table": normal(VOCABULARY, WIDTH)}
    layers = {
        "gain": jnp.ones((DEPTH, WIDTH)),
        "mlp": {"w": normal(DEPTH, WIDTH, WIDTH)},
    }
    if format is not None:
        ends = madax.quantize_params(ends, format)
        layers["mlp"] = madax.quantize_params(layers["mlp"], format, channel_axis=0)
    return {"ends": ends, "layers": layers}


def listed(params):
    """The same with a list of layers."""
    stack = params["layers"]
    depth = len(jax.tree.leaves(stack)[0])
    return params | {"layers": [one(stack, i) for i in range(depth)]}


def one(stack, i):
    return jax.tree.map(operator.itemgetter(i), stack)


@functools.cache
def batches():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, VOCABULARY, (STEPS, 8, 9)))


def whole_loss(params, batch, key=None):
    x = embed(params["ends"], batch)
    for i, w in enumerate(params["layers"]):
        # The keys of layers, as documented.
        fold = jax.random.fold_in
        x = layer(w, x, None if key is None else fold(fold(key, i), 0))
    return loss(params["ends"], x, batch)


def ordinary(tx):
    """The usual step: decode all weights, take all gradients, then update."""

    def step(params, state, batch, key=None):
        values = madax.dequantize_params(params)
        value, grads = jax.value_and_grad(whole_loss)(values, batch, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def trained(init, step, params, *, keys=()):
    init, step, values = jax.jit(init), jax.jit(step), []
    state = init(params)
    for i, batch in enumerate(batches()):
        params, state, value = step(params, state, batch, *[keys[i]] if keys else [])
        values.append(value)
    return params, state, values


def norms_of(parts):
    """The norm of each tree, by NumPy."""
    square = lambda x: np.sum(np.square(x, dtype=np.float64))
    return np.sqrt([sum(map(square, jax.tree.leaves(part))) for part in parts])


def clip_factors(norms, clip_by, max_norm, last=None):
    """The factors of the gradients of the ends and of all layers, as documented.

    ``norms`` are of these gradients, and ``last`` has the proportions they had before.
    """

    def so_far(norms):
        # Layers are updated from the last one down, and the ends after them.
        squares = np.square(norms)
        return np.sqrt([squares.sum(), *np.cumsum(squares[:0:-1])[::-1]])

    known = so_far(norms)
    whole = {"exact": known[0], "layer": norms, "last": known}[clip_by]
    if clip_by == "last" and last is not None:
        whole = known * so_far(last)[0] / so_far(last)
    return np.broadcast_to(np.minimum(1, max_norm / whole), len(norms))
