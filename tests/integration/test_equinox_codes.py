"""Models of Equinox, whose leaves include functions, on codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import needs_hijax, normal, raises, same

import madax

eqx = pytest.importorskip("equinox")
pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = madax.SymlogFormat(bits=8)
X, Y = normal(32, 8), normal(32, 4, seed=1)


class Net(eqx.Module):
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    drop: eqx.nn.Dropout  # with a number and a truth value as leaves
    act: object = jax.nn.gelu

    def __call__(self, x):
        return self.drop(self.act(self.mlp(self.norm(x))), inference=True)


def floats():
    mlp = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
    return Net(mlp, eqx.nn.LayerNorm(8), eqx.nn.Dropout(0.5))


def codes():
    return madax.quantize_params(floats(), FMT)


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def test_gradients_are_those_of_the_decoded_model():
    model = codes()
    assert model.act is jax.nn.gelu and model.drop.p == 0.5
    got = eqx.filter_jit(madax.value_and_grad(loss))(model, X, Y)
    decoded = madax.dequantize_params(model)
    same(got, eqx.filter_jit(eqx.filter_value_and_grad(loss))(decoded, X, Y))
    assert got[1].mlp.layers[0].weight.shape == (16, 8)
    assert got[1].act is got[1].drop.p is got[1].mlp.activation is None


def trained(model, tx, step, steps=20):
    state = tx.init(eqx.filter(model, eqx.is_array))
    for _ in range(steps):
        model, state, value = step(model, state, X, Y)
    return model, float(value)


def step_of(tx):
    @eqx.filter_jit
    def step(model, state, x, y):
        value, grads = madax.value_and_grad(loss)(model, x, y)
        params, static = eqx.partition(model, eqx.is_array)
        updates, state = tx.update(grads, state, params)
        return eqx.combine(optax.apply_updates(params, updates), static), state, value

    return step


@pytest.mark.parametrize(
    "tx",
    [
        madax.muon(0.02),
        madax.muon_madam(0.05),
        madax.with_quantized_params(optax.adam(0.02)),
    ],
    ids=["muon", "muon_madam", "adam"],
)
def test_a_model_trains_whole(tx):
    model, value = trained(codes(), tx, step_of(tx))
    assert value < 0.9 * loss(codes(), X, Y)
    assert model.mlp.layers[0].weight.codes.dtype == jnp.int8
    assert model.act is jax.nn.gelu
    # Another way: codes of the arrays of a partition, with the static part first.
    arrays, static = eqx.partition(floats(), eqx.is_array)
    merged = eqx.combine(static, madax.quantize_params(arrays, FMT))
    same(*(eqx.filter(m, eqx.is_array) for m in (merged, codes())))


def test_filters_of_floats_and_additions_of_steps_are_refused():
    model = codes()
    for use in (
        lambda: eqx.filter_value_and_grad(loss)(model, X, Y),
        lambda: eqx.filter_jit(eqx.filter_grad(loss))(model, X, Y),
        lambda: eqx.filter(model, eqx.is_inexact_array),
    ):
        with raises(TypeError, "scale but no codes", "madax.value", "equinox.is_array"):
            use()
    params, tx = eqx.filter(model, eqx.is_array), madax.madam(0.1)
    updates, _ = tx.update(
        jax.tree.map(jnp.ones_like, madax.dequantize_params(params)),
        tx.init(params),
        params,
    )
    with raises(TypeError, "became int32", "optax.apply_updates adds steps of codes"):
        eqx.apply_updates(params, updates)


class Conv(eqx.Module):
    conv: eqx.nn.Conv2d

    def __call__(self, x):
        return self.conv(x)


def test_functions_of_lax_take_decoded_models():
    model = Conv(eqx.nn.Conv2d(2, 4, 3, key=jax.random.key(0)))
    quantized, x = madax.quantize_params(model, FMT), normal(2, 8, 8)
    of_decoded = lambda model: jnp.sum(madax.dequantize_params(model)(x) ** 2)
    got = madax.value_and_grad(of_decoded)(quantized)
    decoded = madax.dequantize_params(quantized)
    same(got, eqx.filter_value_and_grad(lambda model: jnp.sum(model(x) ** 2))(decoded))


@needs_hijax
def test_lifted_models_keep_their_functions():
    lifted = madax.hijax.lift(codes())
    assert lifted.act is jax.nn.gelu
    for back in (madax.hijax.lower(lifted), madax.hijax.decode(lifted)):
        assert back.mlp.activation is lifted.mlp.activation
    same(*(eqx.filter(m, eqx.is_array) for m in (madax.hijax.lower(lifted), codes())))
    arrays, static = eqx.partition(lifted, eqx.is_array)
    got = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), X, Y))(arrays)
    expected = eqx.filter_value_and_grad(loss)(madax.dequantize_params(codes()), X, Y)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.tree.leaves(got[1]),
        jax.tree.leaves(expected[1]),
    )


def filtered(tx, **options):
    @eqx.filter_jit(**options)
    def step(model, state, x, y):
        value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    return step


@needs_hijax
def test_filters_take_lifted_codes_in_a_step_of_others():
    """Its codes are those of a step of our own, to the bit."""
    tx = madax.muon_madam(0.05)
    model = madax.hijax.lift(codes())
    step = filtered(madax.hijax.optimizer(tx), donate="all")
    found, value = trained(model, madax.hijax.optimizer(tx), step, steps=5)
    expected, other = trained(codes(), tx, step_of(tx), steps=5)
    arrays = lambda model: eqx.filter(model, eqx.is_array)
    same((arrays(madax.hijax.lower(found)), value), (arrays(expected), other))
    assert found.act is jax.nn.gelu and value < loss(codes(), X, Y)


@needs_hijax
def test_filters_map_over_lifted_codes_and_compute_them_again():
    def of(model, x):
        return jnp.sum(eqx.filter_vmap(lambda m: jax.vmap(m)(x))(model) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    several = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 4, key=key))(keys)
    several = madax.quantize_params(several, FMT, channel_axis=0)
    grads = eqx.filter_jit(eqx.filter_grad(eqx.filter_checkpoint(of)))
    found = grads(madax.hijax.lift(several), X)
    expected = grads(madax.dequantize_params(several), X)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-5)
