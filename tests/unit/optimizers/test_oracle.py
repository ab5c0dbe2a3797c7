"""float32 on the device against the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import trajectory

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS = 1000
TOLERANCE = 2e-5

# name: (shape, scale of the weights, scale of the gradients)
LEAVES = {
    "scalar": ((), 1e-4, 1e6),
    "vector": ((17,), 1.0, 1.0),
    "matrix": ((5, 3), 1e4, 1e-6),
    "conv": ((2, 2, 3, 2), 1e-4, 1e-6),
    "large": ((11,), 1e4, 1e6),
    "pruned": ((9,), 1.0, 1e-6),
    "bias": ((4,), 0.0, 1.0),
}


def draw_weights(rng):
    params = {
        name: np.asarray(scale * rng.standard_normal(shape), np.float32)
        for name, (shape, scale, _) in LEAVES.items()
    }
    params["pruned"][::3] = 0
    return params


def draw_gradients(rng, steps):
    """Normal with rare spikes, so that g_bound acts; some steps and elements 0."""
    grads = {}
    active = rng.random(steps) > 0.05
    for name, (shape, _, scale) in LEAVES.items():
        g = scale * rng.standard_normal((steps, *shape))
        g = g * np.where(rng.random(g.shape) < 0.01, 100.0, 1.0)
        g = g * (rng.random(g.shape) > 0.1)
        g = g * active.reshape(steps, *[1] * len(shape))
        grads[name] = np.asarray(g, np.float32)
    return grads


SCHEDULES = {
    "constant": (0.01, 0.01),
    "cosine": (
        optax.cosine_decay_schedule(0.02, STEPS),
        lambda t: 0.01 * (1 + np.cos(np.pi * t / STEPS)),
    ),
    "warmup": (
        optax.linear_schedule(0.0, 0.01, 100),
        lambda t: 0.01 * min(t / 100, 1),
    ),
}


OPTIONS = [
    ("constant", {}),
    ("constant", {"p_scale": 3.0}),  # the paper's bound, on every leaf
    ("cosine", {"floor": 0.1, "b1": 0.9}),
    ("warmup", {"b2": 0.9, "p_scale": 1.0, "g_bound": 1.0}),
    ("cosine", {"b2": 0.99, "b1": 0.5, "zero_init_scale": 1e-3, "p_scale": 0.3}),
]


@pytest.mark.filterwarnings("ignore:.*beyond p_scale")
@pytest.mark.parametrize(("schedule", "options"), OPTIONS, ids=str)
def test_madam_follows_the_oracle(schedule, options):
    rng = np.random.default_rng(0)
    params, grads = draw_weights(rng), draw_gradients(rng, STEPS)
    rate, oracle_rate = SCHEDULES[schedule]
    got = trajectory(madax.madam(rate, **options), params, grads)
    for name, w0 in params.items():
        model = oracle.Madam(w0, oracle_rate, **options)
        want = np.stack([model.step(g) for g in grads[name]])
        rms0, zero_init = oracle.first_rms(w0, options.get("zero_init_scale", 0.1))
        crosses_zero = zero_init or options.get("floor", 0) > 0
        size = np.maximum(np.abs(want), rms0 if crosses_zero else 0)
        worst = np.max(np.abs(got[name] - want) - TOLERANCE * size)
        assert worst <= 0, name
        assert np.any(want[-1] != w0), name


@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_first_step_is_a_factor_exp_lr(lr):
    rng = np.random.default_rng(1)
    w = np.float32(rng.standard_normal(200) * 10.0 ** rng.uniform(-4, 4, 200))
    g = np.float32(rng.choice([-1, 1], 200) * 10.0 ** rng.uniform(-16, 16, 200))
    tx = madax.madam(lr, p_scale=np.inf)
    updates, _ = tx.update(jnp.asarray(g), tx.init(w), w)
    want = np.float64(w) * np.exp(-lr * np.sign(np.float64(g) * w))
    # One rounding of the sum, and two of the log-step, which is only as large as lr.
    rtol = 2**-23 + 2 * 2**-23 * lr
    np.testing.assert_allclose(optax.apply_updates(w, updates), want, rtol=rtol)


@pytest.mark.parametrize(("lr", "g_bound"), [(0.01, 10.0), (0.1, 2.0)])
def test_largest_step_is_a_factor_exp_g_bound_lr(lr, g_bound):
    """After 300 zeros a gradient is 16 deviations, the most that history allows."""
    w = np.float32([1.0, -1.0, 2.5, -1e-3])
    grads = np.zeros((301, 4), np.float32)
    grads[-1] = [1e-5, 1e5, -1e-5, -1e5]
    after = trajectory(madax.madam(lr, g_bound=g_bound, p_scale=np.inf), w, grads)
    np.testing.assert_array_equal(after[-2], w)
    factor = np.exp(g_bound * lr * np.array([-1, 1, 1, -1]))
    np.testing.assert_allclose(after[-1], w * factor, rtol=2.5e-7)


@pytest.mark.parametrize("b2", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("b1", [None, 0.9])
def test_second_moment_follows_its_oracle(b1, b2):
    rng = np.random.default_rng(3)
    scale = np.float64([1e-6, 1e-3, 1.0, 1e3, 1e6])
    grads = np.float32(scale * rng.standard_normal((200, 5)))
    grads[rng.random(grads.shape) < 0.1] = 0
    tx = madax.scale_by_second_moment(b2, b1=b1)
    model = oracle.SecondMoment((5,), b2, b1)
    state = tx.init(jnp.ones(5))
    update = jax.jit(tx.update)
    for g in grads:
        got, state = update(g, state)
        want = model(g)
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=1e-6)
        if b1 is None:
            assert np.all(np.abs(got) <= (1 + 1e-6) / np.sqrt(1 - b2))
    np.testing.assert_allclose(state.nu, model.v, rtol=TOLERANCE)
    assert state.count == model.t == 200


@pytest.mark.parametrize("zero_leaf", [False, True])
@pytest.mark.parametrize("zero_init_scale", [3.0])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_sign_log_follows_its_oracle(floor, zero_init_scale, zero_leaf):
    rng = np.random.default_rng(4)
    w0 = np.float32(rng.standard_normal(400) * 10.0 ** rng.uniform(-3, 1, 400))
    w0[::20] = 0
    w0 *= not zero_leaf
    w = w0 + np.float32(0.5 * rng.standard_normal(400)) * (w0 != 0)
    d = np.float32(rng.standard_normal(400) * 10.0 ** rng.uniform(-7, 0.3, 400))
    options = {"floor": floor, "zero_init_scale": zero_init_scale}
    tx = madax.scale_by_sign_log(**options)
    got, _ = tx.update(jnp.asarray(d), tx.init(w0), jnp.asarray(w))
    np.testing.assert_allclose(got, oracle.SignLog(w0, **options)(d, w), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*beyond p_scale")
@pytest.mark.parametrize("zero_leaf", [False, True])
@pytest.mark.parametrize("p_scale", [None, 0.5, 3.0, np.inf])
@pytest.mark.parametrize("shape", [(400,), (20, 20)], ids=str)
def test_clip_log_weights_follows_its_oracle(shape, p_scale, zero_leaf):
    rng = np.random.default_rng(5)
    w0 = np.float32(rng.standard_normal(shape)) * np.float32(not zero_leaf)
    u = np.float32(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, shape))
    tx = madax.clip_log_weights(p_scale)
    got, _ = tx.update(jnp.asarray(u), tx.init(w0), jnp.asarray(w0))
    want = oracle.ClipLogWeights(w0, p_scale)(u, w0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=3e-7)
    clipped = np.abs(want - u) > 1e-6
    np.testing.assert_array_equal(np.asarray(got)[~clipped], u[~clipped])
    free = p_scale is None and (len(shape) < 2 or zero_leaf)
    assert np.any(clipped) == (p_scale != np.inf and not free)
