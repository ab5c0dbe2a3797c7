"""Layer by layer, leaves and states of every kind are as in ordinary training.

Complex and integer leaves, random keys, and what all leaves share.
"""

import itertools
import operator
from typing import NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import raises
from layers import listed

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEPTH, WIDTH = 3, 8


def normal(*shape, seed=0):
    return helpers.normal(*shape, seed=seed, scale=1 / 3)


def moved(tx, functions, params, batch, **options):
    """What a step takes off the parameters, whose layers are then a list."""
    init, step = madax.layerwise(tx, *functions, dtype=jnp.float32, **options)
    new, _, out = jax.jit(step)(params, init(params), batch)
    return jax.tree.map(operator.sub, listed(params), listed(new)), out


def gradients(functions, params, batch):
    """By jax.grad of the same layers in a list, where leaves have one."""
    embed, layer, loss = functions

    def whole(params):
        x = embed(params["ends"], batch)
        for w in params["layers"]:
            x = layer(w, x)
        return loss(params["ends"], x, batch)

    return jax.grad(whole, allow_int=True)(listed(params))


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )


# --- leaves ---------------------------------------------------------------------------


def test_complex_inputs_and_weights_have_their_gradients():
    functions = (
        lambda ends, batch: {"z": batch @ ends["in"] * (1 + 0.5j)},
        lambda w, x: {"z": x["z"] + 1j * jnp.tanh(x["z"].real @ w["w"]) * w["turn"]},
        lambda ends, x, batch: jnp.mean(jnp.abs(x["z"]) ** 2),
    )
    layers = {
        "w": normal(DEPTH, WIDTH, WIDTH),
        "turn": normal(DEPTH, WIDTH) + 1j * normal(DEPTH, WIDTH, seed=1),
    }
    params = {"ends": {"in": normal(4, WIDTH)}, "layers": layers}
    batch = normal(6, 4, seed=2)
    # A step takes the gradients off the parameters.
    found, (_, metrics) = moved(
        optax.sgd(1.0),
        (*functions[:2], lambda *args: (functions[2](*args), ())),
        params,
        batch,
        microbatches=2,
        has_aux=True,
    )
    expected = gradients(functions, params, batch)
    close(found, expected)
    assert all(np.all(np.abs(g["w"]).max(1) > 0) for g in expected["layers"])
    square = lambda g: sum(np.sum(np.abs(x) ** 2) for x in jax.tree.leaves(g))
    norms = [np.sqrt(square(g)) for g in expected["layers"]]
    close(metrics["grad_norm"]["layers"], norms)


WITH_INTEGERS = {
    "ends": {"in": normal(4, WIDTH), "bins": jnp.int32([2**24 + 1, 5])},
    "layers": {
        "w": normal(DEPTH, WIDTH, WIDTH),
        "times": jnp.arange(1, DEPTH + 1),
        "on": jnp.arange(DEPTH * WIDTH).reshape(DEPTH, WIDTH) % 3 > 0,
    },
}
INTEGER_LAYERS = (
    lambda ends, batch: batch @ ends["in"],
    lambda w, x: x + jnp.tanh(x @ w["w"]) * w["on"] * w["times"],
    lambda ends, x, batch: jnp.mean(x[:, ends["bins"] % 8] ** 2),
)


def trainable(tree):
    return jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.inexact), tree)


LEFT_OUT = {
    "masked": optax.masked(optax.sgd(1.0), trainable),
    "partition": optax.partition(
        {True: optax.sgd(1.0), False: optax.set_to_zero()}, trainable
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_integers_that_are_left_out_stay_as_they_are(name):
    params, batch = WITH_INTEGERS, normal(6, 4, seed=2)
    init, step = madax.layerwise(
        LEFT_OUT[name], *INTEGER_LAYERS, dtype=jnp.float32, microbatches=2
    )
    new, _, _ = jax.jit(step)(params, init(params), batch)
    grads = gradients(INTEGER_LAYERS, params, batch)

    def check(old, new, g):
        assert new.dtype == old.dtype
        is_float = jnp.issubdtype(old.dtype, jnp.inexact)
        np.testing.assert_allclose(new, old - g if is_float else old, 1e-5, 1e-6)

    jax.tree.map(check, listed(params), listed(new), grads)


def test_integers_that_would_be_trained_are_refused():
    init, step = madax.layerwise(optax.adamw(0.1), *INTEGER_LAYERS, dtype=jnp.float32)
    with raises(TypeError, "params['layers/on'] has dtype bool", "leave it out"):
        jax.eval_shape(
            lambda p: step(p, init(p), normal(6, 4)),
            WITH_INTEGERS | {"ends": {"in": normal(4, WIDTH), "bins": np.arange(2)}},
        )


@pytest.mark.parametrize("layers", [{}, {"w": np.ones((0, 8, 8))}, {"w": np.ones(())}])
def test_no_layers_are_refused(layers):
    init, _ = madax.layerwise(optax.sgd(1.0), *INTEGER_LAYERS)
    with raises(ValueError, "params['layers'] must be a tree of", "not empty, got"):
        init({"ends": {}, "layers": layers})


# --- random keys in the state ---------------------------------------------------------


class OldNoiseState(NamedTuple):
    key: jax.Array


def old_noise(seed):
    """Noise by a key of two numbers, one key for all leaves, as many still write it."""

    def update(updates, state, params=None):
        del params
        key, now = jax.random.split(state.key)
        noisy = lambda g: g + jax.random.normal(now, g.shape)
        return jax.tree.map(noisy, updates), OldNoiseState(key)

    return optax.GradientTransformation(
        lambda params: OldNoiseState(jax.random.PRNGKey(seed)), update
    )


NOISE = {
    "add_noise": (lambda: optax.add_noise(1.0, 0.0, 7), jax.random.key(7)),
    "old": (lambda: old_noise(7), jax.random.PRNGKey(7)),
}


@pytest.mark.parametrize("name", NOISE)
def test_each_layer_has_noise_of_its_own(name):
    """That of the optimizer alone, with the layer's index folded into its key."""
    make, key = NOISE[name]
    tx = optax.chain(make(), optax.sgd(1.0))
    params = {"ends": jnp.zeros((50, 20)), "layers": jnp.zeros((DEPTH, 50, 20))}
    functions = (
        lambda ends, batch: batch,
        lambda w, x: x,
        lambda ends, x, batch: jnp.sum(x),
    )
    init, step = madax.layerwise(tx, *functions, dtype=jnp.float32)
    state, new, step = init(params), params, jax.jit(step)
    for _ in range(2):
        new, state, _ = step(new, state, jnp.ones(2))

    def alone(name, i):
        tree = {name: jnp.zeros((50, 20))}
        state = list(tx.init(tree))
        (field,) = (k for k in state[0]._fields if k.endswith("key"))
        state[0] = state[0]._replace(**{field: jax.random.fold_in(key, i)})
        state = tuple(state)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, tree), state)
            tree = optax.apply_updates(tree, updates)
        return tree[name]

    for i in range(DEPTH):
        close(new["layers"][i], alone("layers", i))
    close(new["ends"], alone("ends", DEPTH))
    parts = [new["ends"], *new["layers"]]
    for a, b in itertools.combinations(parts, 2):
        assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.15
    # Twice a variance of 1.
    assert np.std(parts) == pytest.approx(2**0.5, rel=0.05)


# --- what all leaves share, and act on in a later step --------------------------------


def later(shape, steps):
    """An optimizer whose rate follows the norm of all gradients, steps before."""

    def update(updates, state, params=None):
        del params
        norm = jnp.broadcast_to(optax.tree.norm(updates), shape)
        rate = jnp.sum(state[-1])
        return jax.tree.map(lambda g: rate * g, updates), (norm, *state[:-1])

    return optax.GradientTransformation(
        lambda params: (jnp.ones(shape),) * steps, update
    )


LATER = {
    "dadapt": optax.contrib.dadapt_adamw(1.0),
    "scalar": later((), 1),
    "vector": optax.chain(optax.adam(0.1), later((3,), 1)),
    "three_steps": later((), 3),
    "inside": madax.with_quantized_params(optax.contrib.dadapt_adamw(1.0)),
    "of_layers": optax.partition(
        {"later": later((), 1), "sgd": optax.sgd(1.0)},
        lambda tree: {k: "later" if k == "layers" else "sgd" for k in tree},
    ),
}


def three_layers(format=None):
    params = {"ends": normal(4, WIDTH), "layers": {"w": normal(DEPTH, WIDTH, WIDTH)}}
    if format is None:
        return params
    layers = madax.quantize_params(params["layers"], format, channel_axis=0)
    return params | {"layers": layers}


@pytest.mark.parametrize("name", LATER)
def test_no_layer_needs_what_others_had_before(name):
    init, _ = madax.layerwise(LATER[name], *INTEGER_LAYERS)
    format = FORMATS["symlog8"] if name == "inside" else None
    with raises(ValueError, "depend on gradients of other layers in a step before"):
        init(three_layers(format))


MOMENTS = madax.MomentFormat(8)
BY_THEMSELVES = {
    "madam": madax.madam(0.02, b1=0.9, moment_format=MOMENTS),
    "muon": madax.muon(0.02, moment_format=MOMENTS),
    "muon_madam": madax.muon_madam(0.02, moment_format=MOMENTS),
    "adam": madax.with_quantized_params(optax.adam(0.1), error_feedback=True),
    "state": madax.with_quantized_state(optax.adam(0.1), where=lambda path, x: x.ndim),
    "injected": optax.inject_hyperparams(optax.adamw)(0.1),
    # The ends may follow what they had before themselves.
    "ends": optax.partition(
        {"later": later((), 1), "sgd": optax.sgd(1.0)},
        lambda tree: {k: "later" if k == "ends" else "sgd" for k in tree},
    ),
}


@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_what_each_leaf_has_of_its_own_is_allowed(name):
    init, _ = madax.layerwise(BY_THEMSELVES[name], *INTEGER_LAYERS)
    jax.eval_shape(init, three_layers(FORMATS["symlog8"] if name == "adam" else None))
