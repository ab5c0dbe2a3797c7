"""Flax models, as they are, on codes: nnx and linen train and run as on floats."""

import re
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import madax
from madax import QuantizedArray, SymlogFormat

FLAX = tuple(int(n) for n in re.findall(r"\d+", flax.__version__)[:2])
FMT = SymlogFormat(8, 1 / 3)
WIDTH, LAYERS, WORDS, LENGTH = 8, 2, 24, 6


def is_quantized(x):
    return isinstance(x, QuantizedArray)


def plain(tree):
    """Arrays that NumPy can compare: keys are what they are made of."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, plain(a), plain(b))


def split(model):
    return nnx.split(model, nnx.Param, ...)


def coded(model):
    """The model on codes; stacks of layers have scales of their own."""
    graph, params, rest = split(model)
    is_matrix = lambda path, w: w.ndim > 1 and "bias" not in path and "norm" not in path
    stacked = lambda path, w: is_matrix(path, w) and "blocks" in path
    params = madax.quantize_params(params, FMT, where=stacked, channel_axis=0)
    alone = lambda path, w: not is_quantized(w) and is_matrix(path, w)
    return nnx.merge(graph, madax.quantize_params(params, FMT, where=alone), rest)


def decoded(model):
    """A copy of the model in floats."""
    graph, params, rest = split(model)
    rest = jax.tree.map(lambda x: x, rest)
    return nnx.merge(graph, madax.dequantize_params(params), rest)


class Cnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(8 * 16, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.batch_norm(self.conv(x)))
        return self.linear(self.dropout(x.reshape(len(x), -1)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
    """Tied embeddings; one block, or some stacked and scanned, rematerialised."""

    def __init__(self, rngs, scan):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.place = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.scan = scan
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=LAYERS)(make)(rngs) if scan else Block(rngs)

    def __call__(self, ids):
        x = self.dropout(self.embed(ids) + self.place)
        mask = nn.make_causal_mask(ids)
        block = nnx.remat(lambda x, block: block(x, mask))
        if self.scan:
            axes = nnx.StateAxes({...: 0})
            block = nnx.scan(block, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
        return self.embed.attend(block(x, self.blocks))


def images():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 16)
    x = rng.normal(size=(16, 4, 4, 1)) + y[:, None, None, None]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def words():
    ids = (np.arange(4)[:, None] * 5 + np.arange(LENGTH + 1) * 3) % WORDS
    return jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


MODELS = {
    "cnn": (Cnn, images),
    "transformer": (partial(Transformer, scan=False), words),
    "scanned transformer": (partial(Transformer, scan=True), words),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, data = MODELS[request.param]
    return (lambda: coded(make(nnx.Rngs(0)))), data()


class Optimizer(nnx.Optimizer):
    """That of every Flax there is."""

    def __init__(self, model, tx):
        super().__init__(model, tx, wrt=nnx.Param)

    if FLAX < (0, 12):

        def update(self, model, grads):
            self.model = model
            super().update(grads)


def rest_of(model):
    return nnx.state(model, nnx.Not(nnx.Param))


def quantized_leaves(model):
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=is_quantized)
    return [leaf for leaf in leaves if is_quantized(leaf)]


def test_nnx_trains_on_codes_as_on_floats(case):
    """By two lines of a user: quantize_params, and madax.value_and_grad for nnx's."""
    make, data = case
    model = make()
    optimizer = Optimizer(model, madax.madam(0.05))
    ours = nnx.jit(madax.value_and_grad(loss))
    reference = nnx.jit(nnx.value_and_grad(loss))
    update = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    codes_before = [w.codes for w in quantized_leaves(model)]
    assert len(codes_before) >= 2
    losses = []
    for _ in range(8):
        floats = decoded(model)
        actual = ours(model, *data)
        same(actual, reference(floats, *data))
        # Statistics and random number counters are written back.
        same(rest_of(model), rest_of(floats))
        losses.append(float(actual[0]))
        update(model, optimizer, actual[1])
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    for w, before in zip(quantized_leaves(model), codes_before, strict=True):
        assert type(w) is QuantizedArray and np.any(w.codes != before)
    # The same weights, other masks.
    assert float(ours(model, *data)[0]) != float(ours(model, *data)[0])
