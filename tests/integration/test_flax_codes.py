"""Flax models, as they are, on codes: nnx and linen train and run as on floats."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from flax import nnx
from helpers import FLAX, is_quantized, mostly_nightly, raises, same, without_keys
from models import images

import madax
from madax import QuantizedArray

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = FORMATS["symlog8"]
WIDTH, LAYERS, WORDS, LENGTH = 8, 2, 24, 6


def split(model):
    return nnx.split(model, nnx.Param, ...)


def coded(model):
    """The model on codes; stacks of layers have a scale for each of them."""
    if getattr(model, "scan", False):
        stacked = lambda path, w: "blocks" in path and path.endswith("kernel")
        model = madax.quantize_params(model, FMT, where=stacked, channel_axis=0)
    return madax.quantize_params(model, FMT)


def decoded(model):
    """A copy of the model in floats."""
    graph, params, rest = split(model)
    rest = jax.tree.map(lambda x: x, rest)
    return nnx.merge(graph, jax.jit(madax.dequantize_params)(params), rest)


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


@pytest.fixture(params=mostly_nightly(MODELS, "cnn"))
def case(request):
    make, data = MODELS[request.param]
    return coded(nnx.jit(lambda: make(nnx.Rngs(0)))()), data()


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
    model, data = case
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


class Head(nnx.Module):
    """Linear layers, and a normalisation that keeps statistics."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.batch_norm(self.linear(x))


@pytest.fixture
def heads():
    one, other = (coded(Head(nnx.Rngs(seed))) for seed in (0, 1))
    w = madax.quantize_params(jnp.eye(WIDTH), FMT)
    x = np.random.default_rng(0).standard_normal((4, WIDTH), np.float32)
    return one, other, w, jnp.asarray(x)


def energy(one, w, modules, x, *, scale):
    y = modules["other"](one(x) @ w)
    return jnp.sum(jnp.sin(y)) * scale, (y, one)


def has_seen(model):
    return np.any(model.batch_norm.mean[...] != 0)


def test_modules_and_trees_may_be_mixed(heads):
    one, other, w, x = heads
    floats, other_floats = decoded(one), decoded(other)
    compute = madax.value_and_grad(energy, argnums=(1, 0, -2), has_aux=True)
    (value, (y, model)), grads = compute(one, w, {"other": other}, x, scale=2.0)
    assert has_seen(one) and has_seen(other)
    assert type(model) is Head and type(quantized_leaves(model)[0]) is QuantizedArray

    compute = nnx.value_and_grad(
        lambda one, w, other: energy(one, w, {"other": other}, x, scale=2.0),
        argnums=(1, 0, 2),
        has_aux=True,
    )
    expected = compute(floats, w.dequantize(), other_floats)
    (expected_value, (expected_y, _)), expected_grads = expected
    same((value, y), (expected_value, expected_y))
    assert set(grads[2]) == {"other"}
    same((grads[0], grads[1], grads[2]["other"]), expected_grads)
    same(rest_of(one), rest_of(floats))


def test_a_part_that_a_loss_adds_to_a_module_is_refused(heads):
    one, other, _, x = heads

    def adds(one, to):
        to.more = Head(nnx.Rngs(2))
        return jnp.sum(one(x))

    for to in one, other:
        with raises(ValueError, "fun gave a Head a new part, more of type", "__init__"):
            madax.value_and_grad(adds)(one, to)


def test_codes_that_a_loss_replaces_by_floats_are_named():
    """They would be floats from then on, without a word."""
    if not hasattr(nnx, "WeightNorm"):
        pytest.skip("Flax has no nnx.WeightNorm yet.")

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.WeightNorm(nnx.Linear(8, 16, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    model = madax.quantize_params(Normed(nnx.Rngs(0)), madax.SymlogFormat(bits=8))
    loss = lambda model: jnp.sum(model(jnp.ones((2, 8))) ** 2)
    for compute in (madax.value_and_grad(loss), nnx.jit(madax.value_and_grad(loss))):
        with raises(TypeError, "replaced the codes of", "kernel", "leave that layer"):
            compute(model)
    madax.value_and_grad(loss)(Normed(nnx.Rngs(0)))  # Floats stay floats.


def test_modules_by_keyword_and_of_no_gradient_keep_their_state(heads):
    one, other, w, x = heads

    def fun(w, one, *, other):
        return jnp.sum(jnp.sin(other(one(x @ w)))), 1

    grads, aux = madax.grad(fun, has_aux=True)(w, one, other=other)
    assert grads.shape == w.shape and np.any(grads != 0) and aux == 1
    assert has_seen(one) and has_seen(other)


def test_a_filter_chooses_the_variables(heads):
    one, other, _, x = heads
    fun = lambda one: jnp.sum(jnp.sin(one(x)))
    by_filter = lambda f: madax.grad(fun, argnums=nnx.DiffState(0, f))(one)
    everything = madax.grad(fun)(one)
    kernel = by_filter(nnx.PathContains("kernel"))
    assert len(jax.tree.leaves(kernel)) == 1 < len(jax.tree.leaves(everything))
    same(kernel["linear"]["kernel"], everything["linear"]["kernel"])
    assert not jax.tree.leaves(by_filter(nnx.Cache))
    # Each argument by its own.
    both = lambda one, other: jnp.sum(jnp.sin(other(one(x))))
    wrt = (1, nnx.DiffState(0, nnx.PathContains("kernel")))
    whole, kernel = madax.grad(both, argnums=wrt)(one, other)
    assert [len(jax.tree.leaves(g)) for g in (whole, kernel)] == [4, 1]


def test_shared_weights_have_one_gradient_with_the_first(heads):
    one, _, _, x = heads
    fun = lambda one, linear: jnp.sum(jnp.sin(linear(one(x))))
    floats = decoded(one)
    shared, nothing = madax.grad(fun, argnums=(0, 1))(one, one.linear)
    expected, _ = nnx.grad(fun, argnums=(0, 1))(floats, floats.linear)
    same(shared, expected)
    assert not jax.tree.leaves(nothing)


def test_jax_jit_of_a_split_model():
    """The functional way, which tells nnx.jit nothing: state in, state out."""
    graph, params, rest = split(coded(Cnn(nnx.Rngs(0))))
    tx = madax.madam(0.05)

    def merged_loss(params, rest, x, y):
        copy = {} if FLAX < (0, 12) else {"copy": True}
        model = nnx.merge(graph, params, rest, **copy)
        return loss(model, x, y), split(model)[2]

    @jax.jit
    def step(params, rest, state, x, y):
        of = madax.value_and_grad(merged_loss, has_aux=True)
        (value, rest), grads = of(params, rest, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, value

    state, losses, before = tx.init(params), [], rest
    for _ in range(8):
        params, rest, state, value = step(params, rest, state, *images())
        losses.append(float(value))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    moved = jax.tree.map(
        lambda a, b: np.any(a != b), *map(without_keys, (before, rest))
    )
    assert all(jax.tree.leaves(moved["batch_norm"]))
    assert len(quantized_leaves(nnx.merge(graph, params, rest))) == 2


def test_a_model_can_be_looked_at():
    model = coded(Cnn(nnx.Rngs(0)))
    assert "QuantizedArray(shape=(128, 4)" in repr(model)
    wide = {"width": 200}
    table = nnx.tabulate(model, jnp.ones((1, 4, 4, 1)), console_kwargs=wide)
    assert "[128,4]" in re.sub("\x1b.*?m", "", table)
    assert "532 B" in table  # codes of a byte, a scale, and 4 biases


LOOK_UP = 20_000  # rows


def test_embeddings_decode_the_rows_they_take():
    """By XLA's count there is no room for a table of floats, in any layer."""
    table = madax.quantize_params(jnp.ones((LOOK_UP, 16)), FMT)
    ids = jnp.arange(5)
    graph, params = nnx.split(nnx.Embed(LOOK_UP, 16, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda _: table, params)
    by_module = lambda table, ids: nn.Embed(LOOK_UP, 16).apply(
        {"params": {"embedding": table}}, ids
    )
    by_nnx = lambda params, ids: nnx.merge(graph, params)(ids)
    for fun, arg in (
        (lambda table, ids: table[ids], table),
        (by_module, table),
        (by_nnx, params),
    ):
        compiled = jax.jit(fun).lower(arg, ids).compile()
        memory = compiled.memory_analysis()
        floats = memory.temp_size_in_bytes + memory.output_size_in_bytes
        assert floats < 0.01 * 4 * table.size
        np.testing.assert_array_equal(compiled(arg, ids), table[:5])


class Generator(nnx.Module):
    """Attention over a cache of what was said."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        return self.embed.attend(x + self.attention(x))


@pytest.mark.nightly
def test_generation_in_a_loop():
    model = coded(Generator(nnx.Rngs(0)))
    model.attention.init_cache((1, LENGTH, WIDTH))

    def generate(graph, params, cache):
        def step(carry, _):
            ids, cache = carry
            copy = {} if FLAX < (0, 12) else {"copy": True}
            model = nnx.merge(graph, params, cache, **copy)
            ids = model(ids).argmax(-1)
            return (ids, split(model)[2]), ids

        start = jnp.ones((1, 1), jnp.int32)
        return jax.lax.scan(step, (start, cache), length=LENGTH)[1].ravel()

    generate = jax.jit(generate, static_argnums=0)
    said = generate(*split(model))
    same(said, generate(*split(decoded(model))))
    assert len(set(said.tolist())) > 1
