"""Optimizers on lifted codes: the losses and codes of madax, by anybody's loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS, OPTIMIZERS, formats
from helpers import mostly_nightly, needs_hijax, normal, same

import madax

pytestmark = [needs_hijax, pytest.mark.usefixtures("quick_compiles")]

SOME = formats("log8", "uniform16")
X = normal(100, 5, 4, seed=1)
Y = normal(100, 5, 6, seed=2)


def make(formats=SOME):
    """A matrix of codes of each format, and floats."""
    params = {
        name: madax.quantize_params(normal(4, 6, seed=i), fmt, channel_axis=-1)
        for i, (name, fmt) in enumerate(formats.items())
    }
    return params | {"bias": jnp.ones(6)}


def loss(params, x, y):
    p = dict(params)
    bias = p.pop("bias")
    return sum(jnp.mean((jnp.tanh(x @ w) + bias - y) ** 2) for w in p.values())


def trained(tx, params, value_and_grad, steps=100):
    """A hundred steps as in optax's own pages."""

    def step(carry, batch):
        params, state = carry
        value, grads = value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    data = X[:steps], Y[:steps]
    run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), data))
    (params, state), values = run(params, tx.init(params))
    return params, state, values


def assert_trains_as_madax(tx, lifted_tx, formats=SOME):
    """Losses, codes and states are equal to the bit."""
    ours = trained(tx, make(formats), madax.value_and_grad)
    params, state, values = trained(
        lifted_tx, madax.hijax.lift(make(formats)), jax.value_and_grad
    )
    same((madax.hijax.lower(params), state, values), ours)
    return values


MORE = {
    "muon, momentum": lambda: madax.muon(0.02, moment_format=madax.MomentFormat(8)),
    "muon_madam": lambda: madax.muon_madam(
        0.02, moment_format=madax.MomentFormat(bits=8)
    ),
    "adamw": lambda: madax.with_quantized_params(
        optax.adamw(0.02), moment_format=madax.MomentFormat(bits=8)
    ),
    "a chain": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), madax.madam(optax.linear_schedule(0.1, 0, 100))
    ),
    "multi_steps": lambda: madax.with_quantized_params(
        optax.MultiSteps(optax.adam(0.02), 3).gradient_transformation()
    ),
}
BY_NAME = {name: lambda name=name: OPTIMIZERS[name] for name in OPTIMIZERS} | MORE


@pytest.mark.parametrize("name", mostly_nightly(BY_NAME, "moments8"))
def test_a_hundred_steps_are_those_of_madax(name):
    tx = BY_NAME[name]()
    values = assert_trains_as_madax(tx, madax.hijax.optimizer(tx), FORMATS)
    assert values[-1] < values[0]


AROUND = {
    "clip": lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
    "inject": lambda tx: optax.chain(
        optax.inject_hyperparams(optax.scale)(step_size=0.5), tx
    ),
    "partition": lambda tx: optax.partition(
        {"bias": optax.adam(0.01), "codes": tx},
        lambda p: {k: "bias" if k == "bias" else "codes" for k in p},
    ),
    "freeze": lambda tx: optax.chain(
        optax.masked(tx, lambda p: {k: k != "bias" for k in p}),
        optax.transforms.freeze(lambda p: {k: k == "bias" for k in p}),
    ),
}


@pytest.mark.parametrize("name", mostly_nightly(AROUND, "partition"))
def test_wrappers_stand_around_it_as_around_madax(name):
    tx = madax.madam(0.05)
    wrap = AROUND[name]
    assert_trains_as_madax(wrap(tx), wrap(madax.hijax.optimizer(tx)))


@pytest.mark.parametrize(
    "skip", [None, pytest.param(optax.skip_not_finite, marks=pytest.mark.nightly)]
)
def test_gradients_are_accumulated_as_floats(skip):
    """By optax.MultiSteps around it; the oracle averages them by itself."""
    tx = madax.madam(0.05, seed=2)
    multi = optax.MultiSteps(
        madax.hijax.optimizer(tx), 4, should_skip_update_fn=skip
    ).gradient_transformation()
    params, state, _ = trained(multi, madax.hijax.lift(make()), jax.value_and_grad, 12)
    shapes = {k: jnp.shape(w) for k, w in make().items()}
    assert {k: g.shape for k, g in state.acc_grads.items()} == shapes
    assert {g.dtype for g in state.acc_grads.values()} == {jnp.dtype(jnp.float32)}

    expected, state = make(), tx.init(make())
    grad = jax.jit(madax.grad(loss))
    for i in range(3):
        grads = jax.tree.map(jnp.zeros_like, grad(expected, X[0], Y[0]))
        for n in range(4):
            more = grad(expected, X[4 * i + n], Y[4 * i + n])
            grads = jax.tree.map(lambda a, g, n=n: a + (g - a) / (n + 1), grads, more)
        updates, state = tx.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    same(madax.hijax.lower(params), expected)


def one():
    w = madax.hijax.lift(madax.quantize_params(normal(4, 6), FORMATS["log8"]))
    tx = madax.hijax.optimizer(madax.madam(0.1))
    updates, _ = tx.update(normal(4, 6, seed=3), tx.init(w), w)
    assert updates.dtype == jnp.int32 and updates.shape == (4, 6) and np.any(updates)
    return w, updates, madax.hijax.lower(w).codes + updates


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "apply",
    [
        optax.apply_updates,
        lambda p, u: jax.tree.map(lambda p, u: p + u, p, u),
        lambda p, u: jax.tree.map(lambda p, u: (p + u).astype(p.dtype), p, u),
    ],
)
def test_steps_are_added_by_any_loop(apply, compiled):
    w, u, codes = one()
    apply = jax.jit(apply) if compiled else apply
    (new,) = jax.tree.leaves(apply([w], [u]))
    assert type(new) is type(w)
    same(madax.hijax.lower(new).codes, codes.astype(jnp.int8))
    # Before it has been through a tree, it is an array nonetheless.
    same((w + u) * 2, jnp.asarray(new) * 2)


def test_donated_codes_are_updated_in_place():
    tx = madax.hijax.optimizer(madax.madam(0.1))
    w = madax.hijax.lift(madax.quantize_params(normal(64, 64), FORMATS["log8"]))
    state = tx.init(w)

    def step(w, state):
        updates, state = tx.update(jnp.cos(jnp.asarray(w)), state, w)
        return optax.apply_updates(w, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    memory = step.lower(w, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 64 * 64 * 5  # codes and a moment
    place = w.codes.unsafe_buffer_pointer()
    new, _ = step(w, state)
    assert w.is_deleted() and new.codes.unsafe_buffer_pointer() == place


def test_weight_decay_and_penalties_see_weights():
    w = madax.hijax.lift(madax.quantize_params(normal(4, 6), FORMATS["symlog8"]))
    decayed, _ = optax.add_decayed_weights(0.5).update(jnp.zeros((4, 6)), (), w)
    same(decayed, 0.5 * w.astype(jnp.float32))
    floats = jnp.asarray(w)
    np.testing.assert_allclose(optax.tree.norm([w]), jnp.linalg.norm(floats), 1e-6)
    average = optax.incremental_update([w], [floats], 0.5)
    np.testing.assert_allclose(average[0], floats, 1e-6)
