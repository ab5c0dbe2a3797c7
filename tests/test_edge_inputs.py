"""Inputs that a training run meets on a bad day."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import madax

W = np.float32([0.5, -2.0, 1.0, -0.25, 3.0])
G = np.float32([0.1, 0.2, -3.0, -1e-4, 7.0])
LR = 0.01


# The same optimizer for the same options, so that it compiles once.
madam = functools.cache(madax.madam)


def apply(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.fixture(params=["eager", "jit"])
def step(request):
    """`apply`, eager and compiled."""
    return apply if request.param == "eager" else jax.jit(apply, static_argnums=0)


# One step from W: gradients, and the log-step that each weight must take.
ONE_STEP = {
    "zeros": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    "negative zeros": ([-0.0, 0.0, -0.0, 1, -1], [0, 0, 0, -1, 1]),
    "nan": ([np.nan, 1, 1, -1, -1], [0, -1, -1, 1, 1]),
    "inf": ([1, np.inf, -np.inf, -1, -1], [-1, 0, 0, 1, 1]),
    "all nan": ([np.nan] * 5, [0] * 5),
    "square overflows": ([1e20, -1e30, 3e38, 1, -1], [0, 0, 0, -1, 1]),
    "square just fits": ([1e19, -1.8e19, 1, 1, 1], [-1, 1, -1, -1, -1]),
    "second moment underflows": ([1e-30, -1e-25, 1e-23, 1, -1], [0, 0, 0, -1, 1]),
    "second moment just fits": ([1e-17, -1e-16, 1, 1, 1], [-1, 1, -1, -1, -1]),
    "subnormal": ([1e-40, -1e-44, 1e-45, 1, -1], [0, 0, 0, -1, 1]),
    "mixed scales": ([1e-16, 1e18, -1e-5, 1e5, -1], [-1, -1, 1, -1, 1]),
}


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_from_edge_gradients(step, name, b1):
    grads, direction = ONE_STEP[name]
    tx = madam(LR, b1=b1, p_scale=10.0)
    w, state = step(tx, jnp.float32(grads), tx.init(W), W)
    want = W * np.exp(np.sign(W) * LR * np.float64(direction))
    np.testing.assert_allclose(w, want, rtol=1.5e-7)
    still = np.float64(direction) == 0
    np.testing.assert_array_equal(np.asarray(w)[still], W[still])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e25])
@pytest.mark.parametrize("options", [{}, {"b1": 0.9}, {"floor": 1.0}], ids=str)
def test_one_bad_element_leaves_the_others_alone(step, options, bad):
    tx = madam(LR, **options)
    before, state = step(tx, G, tx.init(W), W)
    clean, clean_state = step(tx, -G, state, before)
    after, after_state = step(tx, np.where(np.arange(5) == 2, bad, -G), state, before)
    for one, other, old in [
        (after, clean, before),
        (after_state[0].v, clean_state[0].v, state[0].v),
        *([(after_state[0].m, clean_state[0].m, state[0].m)] * ("b1" in options)),
    ]:
        np.testing.assert_array_equal(np.delete(one, 2), np.delete(other, 2))
        assert one[2] == old[2] != other[2]
    assert after_state[0].count == clean_state[0].count == 2


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clean_steps_after_a_bad_one_follow_the_oracle(step, bad, b1):
    rng = np.random.default_rng(0)
    grads = np.float32(rng.standard_normal((30, 5)))
    grads[0, 0] = grads[7, :3] = grads[8] = bad
    tx, model = madam(LR, b1=b1), oracle.Madam(W, LR, b1=b1)
    w, state = jnp.asarray(W), tx.init(W)
    for g in grads:
        w, state = step(tx, g, state, w)
        np.testing.assert_allclose(w, model.step(g), rtol=1e-6)


def test_tiny_gradients_after_large_ones_give_tiny_steps():
    tx = madax.scale_by_second_moment()
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    got, state = tx.update(jnp.float32([1e-30, -1e-10]), state)
    np.testing.assert_allclose(got, [1e-30, -1e-10] / np.sqrt(0.5), rtol=1e-3)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def leaf(*shape):
    return np.full(shape, 0.5, np.float32)


TREES = {
    "scalar": np.float32(0.5),
    "zero-dimensional": leaf(),
    "empty": leaf(0),
    "empty matrix": leaf(3, 0),
    "empty beside full": {"a": leaf(0), "b": leaf(2), "c": leaf(0, 4)},
    "no leaves": {},
    "None node": {"a": None, "b": leaf(2)},
    "masked node": {"a": optax.MaskedNode(), "b": leaf(2)},
    "tuple": (leaf(2), (leaf(), leaf(1, 1, 1, 1))),
    "namedtuple": Pair(leaf(2), leaf(3, 2)),
    "list": [leaf(2), [leaf(1)], []],
    "nested": {"a": {"b": [Pair(leaf(1), None)], "c": ()}, "d": (leaf(2),)},
}


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize("name", TREES)
def test_trees_of_every_kind(step, name, b1):
    params = TREES[name]
    tx = madam(LR, b1=b1)
    state = tx.init(params)
    for grads in (params, jax.tree.map(np.negative, params)):
        params, state = step(tx, grads, state, params)
    assert jax.tree.structure(params) == jax.tree.structure(TREES[name])
    model = oracle.Madam(leaf(1), LR, b1=b1)
    model.step(leaf(1))
    want = model.step(-leaf(1))[0]
    for got, start in zip(*map(jax.tree.leaves, (params, TREES[name])), strict=True):
        assert got.shape == start.shape
        np.testing.assert_allclose(got, np.full(start.shape, want), rtol=3e-7)


def test_masked_leaves_pass_through():
    params = {"w": jnp.asarray(W), "codes": jnp.arange(3)}
    tx = optax.masked(madax.madam(LR), {"w": True, "codes": False})
    grads = {"w": jnp.asarray(G), "codes": jnp.zeros(3, jnp.int32)}
    after, _ = apply(tx, grads, tx.init(params), params)
    np.testing.assert_array_equal(after["codes"], params["codes"])
    np.testing.assert_allclose(after["w"], W * np.exp(-LR * np.sign(W * G)), rtol=3e-7)


@functools.cache
def step_with_traced_rate(p_scale, floor):
    def step(lr, grads, state, params):
        tx = madax.madam(lr, p_scale=p_scale, floor=floor)
        return apply(tx, grads, state, params)

    return jax.jit(step)


@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("p_scale", [3.0, np.inf])
@pytest.mark.parametrize("lr", [0.0, 1e6, 3e38, np.inf, np.nan, -np.inf])
def test_any_traced_rate_keeps_weights_finite(lr, p_scale, dtype, floor):
    params = {"w": jnp.asarray(W, dtype), "b": jnp.zeros(5, dtype)}
    grads = {"w": jnp.asarray(G, dtype), "b": jnp.asarray(G, dtype)}
    step = step_with_traced_rate(p_scale, floor)
    state = madam(0.1, p_scale=p_scale, floor=floor).init(params)
    after, state = step(lr, grads, state, params)
    for name, w in params.items():
        got = np.float64(after[name])
        assert np.all(np.isfinite(got))
        if lr == 0 or not np.isfinite(lr):
            np.testing.assert_array_equal(got, np.float64(w))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    recovered, _ = step(0.1, jax.tree.map(jnp.negative, grads), state, after)
    for name, w in recovered.items():
        got, old = np.float64(w), np.float64(after[name])
        assert np.all(np.isfinite(got))
        grown = np.sign(old) == -np.sign(G)  # perhaps up to the bound
        assert np.any(grown) or not np.any(old)
        assert np.all(np.abs(got[grown]) < np.abs(old[grown]))


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_rate_zero_changes_no_bit(step, floor):
    tx = madam(0.0, floor=floor)
    params = {"w": W, "b": np.zeros(5, np.float32)}
    after, _ = step(tx, {"w": G, "b": G}, tx.init(params), params)
    for name, w in params.items():
        np.testing.assert_array_equal(after[name], w)


@pytest.mark.parametrize("scale", [2.0**-100, 1e-30, 1e30, 2.0**120])
def test_weights_near_the_ends_of_float32(step, scale):
    scale = np.float32(scale)
    tx = madam(LR)
    one, _ = step(tx, G, tx.init(W), W)
    other, state = step(tx, G, tx.init(W * scale), W * scale)
    np.testing.assert_allclose(other, one * scale, rtol=3e-7)
    rms0 = np.sqrt(np.mean(np.float64(W) ** 2)) * scale
    np.testing.assert_allclose(state[4].rms0, [rms0], rtol=1e-6)


def test_bound_beyond_the_largest_float_is_the_largest_float(step):
    w = jnp.float32([3e38, -3e38])
    tx = madam(1.0, p_scale=3.0)
    after, _ = step(tx, jnp.float32([-1, 1]), tx.init(w), w)
    largest = np.finfo(np.float32).max
    np.testing.assert_allclose(after, [largest, -largest], rtol=3e-7)
    assert np.all(np.isfinite(after))
