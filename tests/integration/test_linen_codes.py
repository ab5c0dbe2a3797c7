"""Flax linen models, as they are, on codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import is_quantized, same
from models import TrainState, images

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = FORMATS["symlog8"]
WIDTH, LAYERS, WORDS = 8, 3, 24


decode = jax.jit(madax.dequantize_params)


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(4)(x)


@pytest.mark.nightly
def test_a_train_state_with_statistics_and_dropout():
    x, y = images()
    net = Cnn()
    variables = jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, False)
    params = madax.quantize_params(variables["params"], FMT)
    state = TrainState.create(
        apply_fn=net.apply,
        params=params,
        tx=madax.madam(0.05),
        batch_stats=variables["batch_stats"],
    )

    def loss(params, state, key):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, changed = state.apply_fn(
            variables, x, True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        value = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
        return value, changed["batch_stats"]

    ours = jax.jit(madax.value_and_grad(loss, has_aux=True))
    reference = jax.jit(jax.value_and_grad(loss, has_aux=True))
    apply = jax.jit(
        lambda state, grads, stats: state.apply_gradients(
            grads=grads, batch_stats=stats
        )
    )
    losses = []
    for i in range(8):
        key = jax.random.key(i)
        actual = ours(state.params, state, key)
        same(actual, reference(decode(state.params), state, key))
        (value, stats), grads = actual
        state = apply(state, grads, stats)
        losses.append(float(value))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert losses[-1] != float(ours(state.params, state, jax.random.key(99))[0][0])
    kernel = state.params["Conv_0"]["kernel"]
    assert is_quantized(kernel) and np.any(
        kernel.codes != params["Conv_0"]["kernel"].codes
    )
    assert np.any(state.batch_stats["BatchNorm_0"]["mean"] != 0)
    # Inference: the model is called on codes.
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = jax.jit(net.apply, static_argnums=2)(variables, x, False)
    assert np.mean(logits.argmax(-1) == y) > 0.5


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(
            nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        ), None


class Transformer(nn.Module):
    """Tied embeddings, and blocks that are rematerialised and scanned."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(WORDS, WIDTH)
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = blocks(name="blocks")(embed(ids), None)
        return embed.attend(x)


@pytest.fixture(scope="module")
def transformer():
    ids = (np.arange(4)[:, None] * 5 + np.arange(7) * 3) % WORDS
    ids = jnp.asarray(ids)
    net = Transformer()
    params = jax.jit(net.init)(jax.random.key(0), ids)["params"]
    stacked = lambda path, w: "blocks" in path and path.endswith("kernel")
    params = madax.quantize_params(params, FMT, where=stacked, channel_axis=0)
    return net, madax.quantize_params(params, FMT), ids


def test_scanned_and_rematerialised_blocks(transformer):
    net, params, ids = transformer

    def loss(params, ids):
        logits = net.apply({"params": params}, ids[:, :-1])
        labels = ids[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    ours = jax.jit(madax.value_and_grad(loss))
    expected = jax.jit(jax.value_and_grad(loss))
    actual = ours(params, ids)
    same(actual, expected(decode(params), ids))
    assert all(np.any(g != 0) for g in jax.tree.leaves(actual[1]["blocks"]))


def test_a_model_can_be_looked_at(transformer):
    net, params, ids = transformer
    table = nn.tabulate(net, jax.random.key(0))(ids)
    assert "24,8" in table
    shapes = jax.eval_shape(net.apply, {"params": params}, ids)
    assert shapes.shape == (*ids.shape, WORDS) and shapes.dtype == jnp.float32


@pytest.mark.nightly
def test_generation_in_a_loop(transformer):
    net, params, _ = transformer

    @jax.jit
    def generate(params):
        def step(i, ids):
            logits = net.apply({"params": params}, ids)
            return ids.at[:, i + 1].set(logits[:, i].argmax(-1))

        return jax.lax.fori_loop(0, 6, step, jnp.ones((1, 7), jnp.int32))

    said = generate(params)
    same(said, generate(decode(params)))
    assert len(set(said.ravel().tolist())) > 1
