"""Madam in flax: linen and nnx, with ordinary networks.

They start with leaves of zeros: biases, the last layer, the gate of a residual branch.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import needs_flax_0_12
from models import TrainState

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS = 12
# Leaves that are zeros at init. Where they stay so, what they multiply has no gradient.
ZEROS = ("bias", "gate", "last/kernel")
PAPER = {"floor": 0.0, "zero_init_scale": 0.0}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8, 8, 1)).astype(np.float32)
    y = 0.3 + np.stack([x[:, :4].mean((1, 2, 3)), x[:, :, 4:].mean((1, 2, 3))], -1)
    return x, 4 * y


def path_name(path):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")


def by_path(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def is_zero_leaf(name):
    return name.endswith(ZEROS)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="batch_norm")(x))
        x = nn.Dense(16, name="first")(x.reshape(x.shape[0], -1))
        x = nn.LayerNorm(name="layer_norm")(x)
        gate = self.param("gate", nn.initializers.zeros, ())
        x = x + gate * nn.tanh(nn.Dense(16, name="branch")(x))
        return nn.Dense(2, kernel_init=nn.initializers.zeros, name="last")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(4, rngs=rngs)
        self.first = nnx.Linear(256, 16, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(16, rngs=rngs)
        self.branch = nnx.Linear(16, 16, rngs=rngs)
        self.gate = nnx.Param(jnp.zeros(()))
        zeros = nnx.initializers.zeros
        self.last = nnx.Linear(16, 2, kernel_init=zeros, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.batch_norm(self.conv(x)))
        x = self.layer_norm(self.first(x.reshape(x.shape[0], -1)))
        x = x + self.gate[...] * nnx.tanh(self.branch(x))
        return self.last(x)


@functools.partial(jax.jit, donate_argnums=0)
def linen_step(state, x, y):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, new = state.apply_fn(variables, x, True, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), value, grads


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def nnx_step(model, optimizer, x, y):
    value, grads = nnx.value_and_grad(nnx_loss)(model, x, y)
    optimizer.update(model, grads)
    return value, grads


class Run:
    """What a training run did: leaves before and after, largest gradients, losses."""

    def __init__(self, before):
        self.before = by_path(before)
        self.largest = dict.fromkeys(self.before, 0.0)
        self.losses = []

    def log(self, value, grads):
        self.losses.append(float(value))
        for name, g in by_path(grads).items():
            self.largest[name] = max(self.largest[name], np.max(np.abs(g)))

    def finish(self, after):
        self.after = by_path(after)
        assert self.after.keys() == self.before.keys()
        return self

    def moved(self, name):
        return np.mean(self.after[name] != self.before[name])


def train_linen(tx):
    x, y = data()
    net = LinenNet()
    variables = jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, True)
    state = TrainState.create(apply_fn=net.apply, tx=tx, **variables)
    run = Run(state.params)
    for _ in range(STEPS):
        state, value, grads = linen_step(state, x, y)
        run.log(value, grads)
    return run.finish(state.params)


def train_nnx(tx):
    model = nnx.jit(lambda: NnxNet(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    run = Run(nnx.state(model, nnx.Param))
    for _ in range(STEPS):
        run.log(*nnx_step(model, optimizer, *data()))
    return run.finish(nnx.state(model, nnx.Param))


TRAIN = {"linen": train_linen, "nnx": train_nnx}


@pytest.fixture(params=["linen", pytest.param("nnx", marks=needs_flax_0_12)])
def api(request):
    return request.param


def test_every_leaf_moves_at_defaults(api):
    run = TRAIN[api](madax.madam(0.02))
    zeros = [name for name, leaf in run.before.items() if not leaf.any()]
    assert sorted(zeros) == sorted(filter(is_zero_leaf, run.before))
    assert len(zeros) == 8
    for name, largest in run.largest.items():
        assert largest > 0, name
        assert run.moved(name) > 0.9, name
    assert run.losses[-1] < 0.8 * run.losses[0]


def test_leaves_of_zeros_stay_zero_in_the_paper_with_a_warning(api):
    with pytest.warns(UserWarning, match="all zeros at init") as caught:
        run = TRAIN[api](madax.madam(0.02, **PAPER))
    (message,) = [str(w.message) for w in caught]
    named = message.split(": all zeros")[0].split(", ")
    named = {name.removesuffix("/value") for name in named}
    assert named == set(filter(is_zero_leaf, run.before))
    for name in named:
        assert run.moved(name) == 0, name
    # The last bias has a gradient, and would learn the mean.
    assert run.largest["last/bias"] > 0.1
