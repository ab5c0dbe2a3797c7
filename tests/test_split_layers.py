"""Flax models are trained a layer at a time as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import FORMATS, mostly_nightly, raises

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEPTH, WIDTH, VOCABULARY = 3, 8, 16
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 7))


class Block(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x, rngs=None):
        return x + self.dropout(nnx.relu(self.mlp(self.norm(x))), rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs, blocks):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = blocks

    def loss(self, x, tokens):
        logits, labels = self.embedding.attend(x), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sequential(rngs):
    return nnx.Sequential(*(Block(rngs) for _ in range(DEPTH)))


def vmapped(rngs):
    del rngs
    make = nnx.vmap(lambda key: Block(nnx.Rngs(key)))
    return make(jax.random.split(jax.random.key(0), DEPTH))


def applied(model, x):
    if isinstance(model.blocks, nnx.Sequential):
        return model.blocks(x)
    scan = nnx.scan(
        lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return scan(x, model.blocks)


@pytest.mark.parametrize("make", mostly_nightly([sequential, vmapped], sequential))
def test_the_gradients_are_those_of_the_model(make):
    model = Model(nnx.Rngs(0), make(nnx.Rngs(1)))
    graph, state = nnx.split(model)

    def whole(state):
        model = nnx.merge(graph, state)
        return model.loss(applied(model, model.embedding(TOKENS[:, :-1])), TOKENS)

    expected, grads = jax.value_and_grad(whole)(state)
    split = madax.split_layers(model, "blocks")
    init, step = madax.layerwise(
        # A step takes the gradient off the parameters.
        optax.sgd(1.0),
        lambda ends, tokens: split.ends(ends).embedding(tokens[:, :-1]),
        split.layer,
        lambda ends, x, tokens: split.ends(ends).loss(x, tokens),
        dtype=jnp.float32,
    )
    params, _, value = jax.jit(step)(split.params, init(split.params), TOKENS)
    assert value == pytest.approx(float(expected), rel=1e-6)
    moved = jax.tree.map(jnp.subtract, split.params, params)
    after = nnx.merge(graph, jax.tree.map(jnp.subtract, state, grads))
    there = madax.split_layers(after, "blocks").params
    expected = jax.tree.map(jnp.subtract, split.params, there)
    assert sorted(moved["layers"]) == ["mlp", "norm"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved, expected
    )
    assert model.blocks is not None


def test_codes_and_dropout():
    model = Model(
        nnx.Rngs(0), nnx_list([Block(nnx.Rngs(i), 0.5) for i in range(DEPTH)])
    )
    split = madax.split_layers(model, "blocks")
    params = {
        "ends": madax.quantize_params(split.params["ends"], FORMATS["symlog8"]),
        "layers": madax.quantize_params(
            split.params["layers"],
            FORMATS["symlog8"],
            where=lambda path, w: path.endswith("kernel"),
            channel_axis=0,
        ),
    }
    init, step = madax.layerwise(
        madax.madam(0.02, floor=1.0),
        lambda ends, tokens: split.ends(ends).embedding(tokens[:, :-1]),
        split.layer,
        lambda ends, x, tokens: split.ends(ends).loss(x, tokens),
        dtype=jnp.float32,
    )
    state, step, losses = init(params), jax.jit(step), []
    for i in range(40):
        key = jax.random.key(i)
        params, state, value = step(params, state, TOKENS, key)
        losses.append(value)
    one, other = (step(params, state, TOKENS, jax.random.key(i))[2] for i in range(2))
    assert one != other
    assert min(losses[-5:]) < 0.7 * losses[0]


def test_linen_scan():
    class Body(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            return x + linen.relu(linen.Dense(WIDTH)(linen.RMSNorm()(x))), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(WIDTH, name="first")(x)
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = linen.scan(Body, length=DEPTH, **axes)(name="blocks")(x, None)
            return x

    x = np.float32(np.random.default_rng(0).normal(size=(5, 3)))
    variables = Net().init(jax.random.key(0), x)["params"]
    params = {"ends": {"first": variables["first"]}, "layers": variables["blocks"]}
    init, step = madax.layerwise(
        optax.sgd(1.0),
        lambda ends, x: linen.Dense(WIDTH).apply({"params": ends["first"]}, x),
        lambda w, x: Body().apply({"params": w}, x)[0],
        lambda ends, x, batch: jnp.mean((x - 1) ** 2),
        dtype=jnp.float32,
    )
    new, _, value = jax.jit(step)(params, init(params), x)
    whole = lambda v: jnp.mean((Net().apply({"params": v}, x) - 1) ** 2)
    expected, grads = jax.value_and_grad(whole)(variables)
    assert value == pytest.approx(float(expected), rel=1e-6)
    moved = jax.tree.map(jnp.subtract, params, new)
    found = moved["ends"] | {"blocks": moved["layers"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, grads)


def test_bad_input():
    with raises(TypeError, "model must be a flax.nnx.Module, got 3"):
        madax.split_layers(3, "blocks")
    model = Model(nnx.Rngs(0), sequential(nnx.Rngs(1)))
    with raises(ValueError, "name is 'layers'", "pass the path"):
        madax.split_layers(model, "layers")
    unlike = [Block(nnx.Rngs(0)), nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))]
    with raises(ValueError, "model.blocks must be a list of modules that are alike"):
        madax.split_layers(Model(nnx.Rngs(0), nnx_list(unlike)), "blocks")
    norms = [nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)) for _ in range(2)]
    with raises(ValueError, "model.blocks has variables", "['mean', 'var']"):
        madax.split_layers(Model(nnx.Rngs(0), nnx_list(norms)), "blocks")


def nnx_list(modules):
    """A list of modules, as newer versions of Flax want it."""
    return nnx.List(modules) if hasattr(nnx, "List") else modules
