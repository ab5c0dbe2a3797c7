"""What `why` tries beside the library does what its names say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import madax
from benchmarks.lib import candidates

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}
GRADS = {"w": jnp.array([[0.3, -0.1], [0.2, -0.4]]), "b": jnp.array([1.0, 2.0])}


def _after(tx, params=PARAMS, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _rate(count):
    return 0.1 * jnp.where(count < 3, 1.0, 0.05)


def test_norms_of_matrices_are_kept():
    after, _ = _after(candidates.kept_norms(optax.sgd(0.3)), steps=3)
    norms = [jnp.linalg.norm(x["w"]) for x in (after, PARAMS)]
    np.testing.assert_allclose(*norms, rtol=1e-6)
    np.testing.assert_allclose(after["b"], PARAMS["b"] - 3 * 0.3 * GRADS["b"])


@pytest.mark.parametrize("columns", [False, True])
def test_a_scale_goes_against_its_gradient(columns):
    alone = candidates.trained_scales(optax.set_to_zero(), _rate, columns=columns)
    after, _ = _after(alone)
    axes = 0 if columns else None
    slope = np.sum(PARAMS["w"] * GRADS["w"], axes)
    # The first direction of Madam is a sign.
    factor = np.broadcast_to(np.exp(-0.1 * np.sign(slope)), (2, 2))
    np.testing.assert_allclose(after["w"], PARAMS["w"] * factor, rtol=1e-6)
    np.testing.assert_array_equal(after["b"], PARAMS["b"])


def test_noise_is_not_what_is_trained_or_scored():
    plain, _ = _after(optax.sgd(0.1), steps=3)
    noisy, state = _after(candidates.with_noise(optax.sgd(0.1), 0.1), steps=3)
    scored = candidates.without_noise(noisy, state)
    for name in PARAMS:
        np.testing.assert_allclose(scored[name], plain[name], rtol=1e-6)
        ratio = np.log(noisy[name] / plain[name])
        assert 0.001 < np.abs(ratio).max() < 0.5


def test_a_step_adds_and_multiplies():
    after, _ = _after(candidates.additive_then_multiplicative(lambda count: 0.1))
    d = -0.1 * np.sign(GRADS["w"])
    want = (PARAMS["w"] + 0.1 * d) * np.exp(np.sign(PARAMS["w"]) * d)
    np.testing.assert_allclose(after["w"], want, rtol=1e-5)


def test_codes_are_rounded_to_nearest_at_the_end():
    codes = madax.quantize_params(
        {"w": jax.random.normal(jax.random.key(0), (64, 64))}, madax.SymlogFormat(8)
    )
    tx = candidates.nearest_at_the_end(madax.madam, _rate)
    update, state = jax.jit(tx.update), tx.init(codes)
    moved = []
    for _ in range(5):  # A late step of 0.005 nats is a third of a code.
        updates, state = update({"w": jnp.ones((64, 64))}, state, codes)
        moved.append(np.count_nonzero(updates["w"].codes))
    assert min(moved[:3]) > 64 * 64 - 9  # All but those at the end of the range.
    assert moved[3:] == [0, 0]
