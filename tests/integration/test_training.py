"""Madam learns: a small network on the digits that ship with scikit-learn."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import madax

STEPS = 300
BATCH = 128


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def digits():
    """1347 digits to train on, 450 to test on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    return (images[450:], labels[450:]), (images[:450], labels[:450])


def accuracy(tx, seed, prepare=lambda params: params):
    (x, y), (x_test, y_test) = digits()
    net = Mlp()
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = prepare(net.init(init_key, x[:1]))

    def logits(params, x):
        return net.apply(params, x)

    def loss(params, x, y):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return jnp.mean(losses)

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (BATCH,), 0, len(y))
        grads = jax.grad(loss)(
            madax.dequantize_params(params),
            jnp.asarray(x)[batch],
            jnp.asarray(y)[batch],
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        keys = jax.random.split(batch_key, STEPS)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params

    params = madax.dequantize_params(train(params))
    return float(np.mean(np.argmax(logits(params, x_test), -1) == y_test))


RATE = optax.cosine_decay_schedule(0.01, STEPS)


@pytest.mark.nightly
def test_madam_learns_digits_on_weights_and_moments_of_eight_bits():
    fmt = madax.LogFormat.from_dynamic_range(bits=8, ratio=1000)
    tx = madax.madam(RATE, moment_format=madax.MomentFormat(bits=8))
    assert accuracy(tx, 0, lambda p: madax.quantize_params(p, fmt)) > 0.93
