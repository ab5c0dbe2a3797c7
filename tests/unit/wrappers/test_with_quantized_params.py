"""Optimizers that know nothing of codes, on codes: decode, update, encode, round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS, every_format
from helpers import is_quantized, normal
from oracle import decode

import madax
from madax import LogFormat, MomentFormat, QuantizedArray, SymlogFormat, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")


def example(fmt, seed=0, shape=(8, 6)):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"w": normal(*shape), "b": normal(6)}
    grads = [{"w": normal(*shape), "b": normal(6)} for _ in range(12)]
    return madax.quantize_params(params, fmt), grads


@every_format
def test_stochastic_rounding_is_unbiased_in_values(fmt):
    params, _ = example(fmt, shape=(64, 64))
    params = {"w": params["w"]}
    n = fmt.levels
    inside = np.abs(np.asarray(params["w"].codes, int))
    # Steps of three tenths of a code inwards: nobody is at the end of the range.
    codes = np.asarray(params["w"].codes, np.float64)
    at = lambda steps: decode(fmt, codes - steps * np.sign(codes))
    whole = np.where(codes == 0, 1, at(1) - at(0))
    u = jnp.asarray(0.3 * (at(1) - at(0)) * params["w"].scale)
    inner = optax.sgd(1.0)
    run = jax.vmap(
        lambda seed: (
            madax.with_quantized_params(inner, seed=seed)
            .update(
                {"w": -u},
                madax.with_quantized_params(inner).init(params),
                params,
            )[0]["w"]
            .codes
        )
    )
    moved = decode(fmt, codes + np.asarray(jax.jit(run)(jnp.arange(200)))) - at(0)
    moved /= whole  # 0 or 1
    kept = (inside > 1) & (inside <= n)
    tolerance = 5 * np.sqrt(0.21 / (200 * kept.sum()))
    # A float32 knows a 16-bit code to a few thousandths only.
    tolerance += 2e-7 * n
    assert abs(moved.mean(0)[kept].mean() - 0.3) < tolerance
    each = np.abs(moved.mean(0)[kept] - 0.3)
    assert each.max() < 5.5 * np.sqrt(0.21 / 200)


@every_format
def test_weights_change_sign_by_steps_of_up_to_twice_the_range(fmt):
    """A difference of int8 codes does not fit int8."""
    n = fmt.levels
    codes = jnp.array([[-n, -n, n, n, -n, n, 1, -1]], fmt.storage_dtype)
    goals = np.array([[n, 1, -n, -1, -n, n, -1, 1]])
    params = QuantizedArray(codes, jnp.float32(2), fmt)
    target = 2 * decode(fmt, goals)
    tx = madax.with_quantized_params(optax.sgd(1.0), rounding="nearest")
    grads = np.asarray(params.dequantize(), np.float64) - target
    updates, _ = tx.update(jnp.asarray(grads, jnp.float32), tx.init(params), params)
    assert updates.codes.dtype == fmt.step_dtype
    moved = optax.apply_updates(params, updates)
    # A float32 knows a 16-bit code of a wide range to about one.
    np.testing.assert_allclose(moved.codes, goals, rtol=0, atol=fmt.bits == 16)


def test_a_log_code_becomes_zero_only_for_an_exact_zero_and_leaves_it():
    fmt = FORMATS["log8"]
    params = QuantizedArray(jnp.array([[127, 127, 0]], jnp.int8), jnp.float32(1), fmt)
    tx = madax.with_quantized_params(optax.sgd(1.0), rounding="nearest")
    grads = jnp.array([[1.0, 1.0 - 1e-5, -0.5]])
    updates, _ = tx.update(grads, tx.init(params), params)
    codes = optax.apply_updates(params, updates).codes
    middle = round(127 + np.log(0.5) / fmt.base_step)
    np.testing.assert_array_equal(codes, [[0, 1, middle]])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@every_format
def test_a_zero_update_moves_nothing(fmt, rounding):
    params, grads = example(fmt, shape=(64, 64))
    tx = madax.with_quantized_params(optax.sgd(0.0), rounding=rounding)
    grads = {"w": jnp.ones((64, 64)), "b": jnp.ones(6)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert np.count_nonzero(updates["w"].codes) == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@every_format
def test_an_inner_update_that_is_not_finite_leaves_its_codes(fmt, poison):
    params, grads = example(fmt)
    bad = np.zeros((8, 6), bool)
    bad[1, 2:] = True
    g = {"w": jnp.where(bad, poison, 5.0), "b": grads[0]["b"]}
    tx = madax.with_quantized_params(optax.sgd(1.0))
    updates, _ = tx.update(g, tx.init(params), params)
    assert not np.any(np.asarray(updates["w"].codes)[bad])
    at_end = np.asarray(params["w"].codes) == -fmt.levels
    assert np.all(np.asarray(updates["w"].codes)[~bad & ~at_end] != 0)


COARSE = [
    (LogFormat(3), 2),
    (LogFormat(3), -2),
    (LogFormat(4, 3.0), 3),
    (LogFormat(4), 5),
    (SymlogFormat(2), 0),
    (SymlogFormat(3), -1),
]


@pytest.mark.parametrize("part", [0.01, 0.3, 0.9])
@pytest.mark.parametrize(("fmt", "code"), COARSE, ids=repr)
def test_sums_with_coarse_codes_keep_their_mean(fmt, code, part):
    """Next to a code that is several times larger, in either direction."""
    n = 400_000
    w = QuantizedArray(jnp.full(n, code, jnp.int8), jnp.ones(1), fmt)
    at = lambda codes: decode(fmt, np.asarray(codes, np.float64))
    tx = madax.with_quantized_params(optax.sgd(1.0))
    for direction in (-1, 1):
        gap = at(code + direction) - at(code)
        moves, _ = tx.update(jnp.full(n, -part * gap, jnp.float32), tx.init(w), w)
        moved = (at(code + np.asarray(moves.codes)) - at(code)) / gap
        error = 5 * np.sqrt(part * (1 - part) / n)
        assert abs(moved.mean() - part) < error, (direction, moved.mean())


@pytest.mark.parametrize("size", [1e-5, 1e-2, 300.0])
def test_float16_gradients_of_codes_are_squared_in_float32(size):
    w = normal(16, 16).astype(jnp.float16)
    params = madax.quantize_params({"w": w}, SymlogFormat(16))
    for options in ({}, {"moment_format": MomentFormat(8)}, {"error_feedback": True}):
        tx = madax.with_quantized_params(optax.adam(1e-3), **options)
        after = []
        for dtype in (jnp.float16, jnp.float32):
            new, state = params, tx.init(params)
            for _ in range(5):
                grads = {"w": jnp.full(w.shape, size, jnp.float16).astype(dtype)}
                updates, state = tx.update(grads, state, new)
                new = optax.apply_updates(new, updates)
            after.append(new["w"])
        np.testing.assert_array_equal(after[0].codes, after[1].codes)
        move = after[0].dequantize(jnp.float32) - params["w"].dequantize(jnp.float32)
        assert np.mean(move) == pytest.approx(-0.005, rel=0.1)


def test_extra_arguments_pass_through():
    seen = {}

    def update(updates, state, params, *, value, extra):
        seen.update(value=value, extra=extra, params=params)
        return jax.tree.map(lambda g: -value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params, grads = example(UniformFormat(8))
    tx = madax.with_quantized_params(inner)
    updates, _ = tx.update(grads[0], tx.init(params), params, value=0.5, extra="this")
    assert (seen["value"], seen["extra"]) == (0.5, "this")
    jax.tree.map(
        np.testing.assert_array_equal,
        seen["params"],
        madax.dequantize_params(params),
    )
    np.testing.assert_array_equal(updates["b"], -0.5 * grads[0]["b"])
    # An inner optimizer without extra arguments is not bothered with them.
    tx = madax.with_quantized_params(optax.sgd(0.1))
    tx.update(grads[0], tx.init(params), params, value=0.5, extra="this")


def test_jit_masked_and_recompilation():
    params, grads = example(UniformFormat(8))
    mask = jax.tree.map(is_quantized, params, is_leaf=is_quantized)
    tx = optax.masked(madax.with_quantized_params(optax.adam(0.1)), mask)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in grads[:3]:
        params, state = step(params, state, g)
    assert step._cache_size() == 1
    assert is_quantized(params["w"])


def test_float_trees_are_left_to_the_inner_optimizer():
    params = {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}
    grads = jax.tree.map(lambda w: w + 0.3, params)
    tx, inner = madax.with_quantized_params(optax.adam(0.1)), optax.adam(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    expected, inner_state = inner.update(grads, inner.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, inner_state)
    assert state.count == 1


def test_scales_whose_reciprocal_would_underflow():
    scale = jnp.float32(3e38)
    w = madax.QuantizedArray(
        jnp.full((4, 4), 60, jnp.int8), scale, madax.UniformFormat(8)
    )
    tx = madax.with_quantized_params(optax.sgd(0.1), rounding="nearest")
    updates, _ = tx.update(jnp.full((4, 4), 3e38), tx.init(w), w)
    np.testing.assert_array_equal(updates.codes, -13)  # 0.1 * 127 codes
