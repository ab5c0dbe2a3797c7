"""Accumulation of gradients for codes: the optimizer gets their mean, or their sum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import jitted_step, mostly_nightly, normal, raises, same

import madax
from madax.wrappers import multi_steps

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = madax.SymlogFormat(bits=8)
FLOATS = {"w": normal(16, 8), "b": jnp.ones(8)}
NATIVE = {
    "muon": madax.muon(0.05, moment_format=madax.MomentFormat(8)),
    "muon_madam": madax.muon_madam(0.05, moment_format=madax.MomentFormat(8)),
    "madam": madax.madam(0.05),
    "adam": madax.with_quantized_params(optax.adam(0.05), error_feedback=True),
}


def gradients(i):
    return jax.tree.map(lambda x: normal(*x.shape, seed=10 + i), FLOATS)


def mean_of(trees):
    """Welford's mean, as optax computes it, in NumPy's float32."""

    def mean(*xs):
        total = np.zeros(xs[0].shape, np.float32)
        for i, x in enumerate(xs):
            total = total + (np.asarray(x) - total) / np.float32(i + 1)
        return jnp.asarray(total)

    return jax.tree.map(mean, *trees)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    "dtype", mostly_nightly([jnp.float32, jnp.bfloat16], jnp.float32)
)
def test_every_k_steps_are_one_step_of_the_mean(name, dtype):
    inner, k = NATIVE[name], 3
    params = madax.quantize_params(FLOATS, FMT, dtype=dtype)
    tx = multi_steps(inner, k)
    state, inner_state, expected = tx.init(params), inner.init(params), params
    assert [x.dtype for x in jax.tree.leaves(state.acc_grads)] == [jnp.float32] * 2
    for i in range(2 * k):
        params, state = jitted_step(tx, gradients(i), state, params)
        if i % k == k - 1:
            mean = mean_of([gradients(j) for j in range(i - k + 1, i + 1)])
            expected, inner_state = jitted_step(inner, mean, inner_state, expected)
        same(params["w"], expected["w"])
        np.testing.assert_allclose(params["b"], expected["b"], rtol=1e-6)
    assert np.any(expected["w"].codes != madax.quantize_params(FLOATS, FMT)["w"].codes)
    assert int(state.gradient_step) == 2


@pytest.mark.parametrize("name", ["muon", "madam"])
def test_an_element_that_is_not_finite_costs_one_step(name):
    inner = NATIVE[name]
    params = madax.quantize_params(FLOATS, FMT)
    tx = multi_steps(inner, 2)
    state, inner_state, expected = tx.init(params), inner.init(params), params
    for i in range(6):
        pair = [gradients(i), gradients(i + 1)]
        if i == 0:
            pair[0]["w"] = pair[0]["w"].at[0, 0].set(jnp.nan)
            pair[1]["b"] = pair[1]["b"].at[0].set(-jnp.inf)
        for g in pair:
            params, state = jitted_step(tx, g, state, params)
        expected, inner_state = jitted_step(inner, mean_of(pair), inner_state, expected)
        same(params["w"], expected["w"])
    assert np.all(np.isfinite(params["b"])) and params["b"][0] != 1


def test_a_sum_a_schedule_and_a_skip():
    params, inner = madax.quantize_params(FLOATS, FMT), madax.madam(0.05)
    tx = multi_steps(
        inner,
        lambda step: 1 + step,  # one gradient, then two
        use_grad_mean=False,
        should_skip_update_fn=optax.skip_not_finite,
    )
    bad = jax.tree.map(lambda x: x * np.nan, FLOATS)
    state, inner_state, start = tx.init(params), inner.init(params), params
    for grads in (bad, gradients(0), gradients(1), bad, gradients(2)):
        params, state = jitted_step(tx, grads, state, params)
    both = jax.tree.map(lambda a, b: a + b, gradients(1), gradients(2))
    for grads in (gradients(0), both):
        start, inner_state = jitted_step(inner, grads, inner_state, start)
    same(params["w"], start["w"])


def test_what_optax_makes_of_codes_is_refused_with_the_remedy():
    params = madax.quantize_params(FLOATS, FMT)
    tx = optax.MultiSteps(madax.madam(0.05), 2)
    with pytest.raises(TypeError, match=r"(?s)QuantizedArray.*madax\.w"):
        tx.update(FLOATS, tx.init(params), params)
    # Since optax 0.2.7 it casts the accumulator.
    with raises(TypeError, "of a QuantizedArray became", "madax.wrappers.multi_steps"):
        jax.tree.map(lambda x: x.astype(jnp.float32), params)
    with raises(TypeError, "inner", "MultiSteps", ".gradient_transformation()"):
        multi_steps(optax.MultiSteps(madax.madam(0.05), 2), 2)
    inner = madax.madam(0.05)
    with raises(TypeError, "state must be a MultiStepsState"):
        multi_steps(inner, 2).update(FLOATS, inner.init(params), params)
    tx = multi_steps(inner, 2)
    with raises(ValueError, "params is None"):
        tx.update(FLOATS, tx.init(params))
    for k in (2.0, "4", None):
        with raises(TypeError, "every_k_schedule must be an int or a function"):
            multi_steps(inner, k)
    for k in (0, -1):
        with raises(ValueError, f"every_k_schedule must be 1 or more, got {k}"):
            multi_steps(inner, k)


@pytest.mark.parametrize("k", [np.int64(2), jnp.asarray(2)], ids=["numpy", "jax"])
def test_any_integer_is_a_number_of_steps(k):
    params = madax.quantize_params(FLOATS, FMT)
    after = []
    for tx in (multi_steps(madax.madam(0.05), k), multi_steps(madax.madam(0.05), 2)):
        new, state = params, tx.init(params)
        for i in range(4):
            new, state = jitted_step(tx, gradients(i), state, new)
        after.append(new)
    same(*after)


def test_a_step_that_only_accumulates_moves_nothing_whatever_inner_does_with_nan():
    """SGD keeps a NaN; it arrives with the step, and not before."""
    w, nan = jnp.ones(4), jnp.ones(4).at[0].set(jnp.nan)
    tx = multi_steps(optax.sgd(0.1), 2)
    first, state = tx.update(nan, tx.init(w), w)
    np.testing.assert_array_equal(first, np.zeros(4))
    second, _ = tx.update(jnp.ones(4), state, w)
    np.testing.assert_array_equal(np.isnan(second), [True, False, False, False])
