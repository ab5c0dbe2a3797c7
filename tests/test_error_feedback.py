"""Error feedback: what rounding codes lost comes back through the momentum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import madax
from madax import MomentFormat, QuantizedArray, SymlogFormat, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

LEVELS = 127
FORMAT = UniformFormat(8)  # Codes are values here, as the scale is 127.


def codes(values):
    return QuantizedArray(jnp.asarray(values, jnp.int8), jnp.float32(LEVELS), FORMAT)


def fed_back(inner, **options):
    return madax.with_quantized_params(inner, error_feedback=True, **options)


def momentum(state, name="mu"):
    return np.asarray(optax.tree_utils.tree_get(state, name), np.float64)


@partial(jax.jit, static_argnums=(0, 1))
def run(tx, gradient, params, state, xs):
    """Trains; ``gradient`` is a function of values and of what is scanned over."""

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(gradient(params.dequantize(), x), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), xs)[0]


def test_adam_with_nearest_rounding_is_that_of_numpy():
    rng = np.random.default_rng(0)
    rate, b1, b2, eps, steps = 0.2, 0.9, 0.99, 1e-8, 40
    grads = np.float32(rng.normal(size=(steps, 300)) * 10 ** rng.uniform(-2, 2, 300))
    start = rng.integers(-LEVELS, LEVELS + 1, 300)
    tx = fed_back(optax.adam(rate, b1, b2, eps), rounding="nearest")
    params, state, update = codes(start), tx.init(codes(start)), jax.jit(tx.update)
    c, m, v, peak = start.astype(float), np.zeros(300), np.zeros(300), 0
    for t, g in enumerate(grads, 1):
        updates, state = update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        before, m = m, b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.float64(g) ** 2
        slope = -rate / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        # Where the slope of a sample rises, the old part of the momentum falls.
        now = np.abs(b1 * slope[:8]).max()
        m -= b1 * before * max(0, 1 - peak / now) if peak else 0
        u, peak = slope * m, now
        new = np.clip(c + np.rint(u), -LEVELS, LEVELS)
        lost = np.clip(c + u, -LEVELS, LEVELS) - new
        m += lost * (1 - b1) / b1 / slope
        c = new
        np.testing.assert_array_equal(params.codes, c)
        np.testing.assert_allclose(momentum(state), m, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("feedback", [True, False])
def test_no_part_of_any_gradient_is_lost(feedback):
    """Where a weight is, and is still bound for, is the sum of its gradients."""
    rng = np.random.default_rng(1)
    rate, decay, steps = 0.05, 0.8, 200
    grads = -np.float32(rng.uniform(0.2, 1.4, (steps, 500)))
    tx = madax.with_quantized_params(
        optax.sgd(rate, momentum=decay), error_feedback=feedback
    )
    start = codes(np.full(500, -50))
    end, state = run(tx, lambda w, g: g, start, tx.init(start), grads)
    bound_for = -rate * decay / (1 - decay) * momentum(state, "trace")
    total = -rate / (1 - decay) * grads.sum(0, dtype=np.float64)
    error = np.asarray(end.codes, np.float64) + 50 + bound_for - total
    if feedback:
        assert np.abs(error).max() < 1e-3
    else:
        assert error.std() > 2


def noisy_quadratic(w, x):
    """The gradient of a quadratic function around 0, with noise in it."""
    return 0.1 * w + jax.random.normal(
        jax.random.fold_in(jax.random.key(0), x), w.shape
    )


STEPS = 1000
COSINE = optax.cosine_decay_schedule(0.5, STEPS)
ADAM = optax.adam(COSINE, b2=0.99)


@pytest.mark.parametrize(
    ("tx", "least"),
    {
        "floats": (fed_back(ADAM), 0.4),
        "8 bits": (madax.with_quantized_state(fed_back(ADAM)), 0.6),
    }.values(),
    ids=["floats", "8 bits"],
)
def test_the_noise_of_rounding_does_not_add_up(tx, least):
    start = codes(np.random.default_rng(2).integers(-20, 20, 5000))
    xs = jnp.arange(STEPS)
    squares = [
        np.mean(run(t, noisy_quadratic, start, t.init(start), xs)[0].dequantize() ** 2)
        for t in (tx, madax.with_quantized_params(ADAM))
    ]
    assert squares[0] < least * squares[1]


def test_a_rate_that_rises_again_does_no_harm():
    """A momentum that makes up for errors at a rate of nearly 0 is large."""
    rates = lambda count: jnp.where(count <= STEPS, COSINE(count), 0.5)  # And 0 once.
    tx = fed_back(optax.adam(rates, b2=0.99))
    start = codes(np.random.default_rng(3).integers(-20, 20, 2000))
    end, state = run(tx, noisy_quadratic, start, tx.init(start), jnp.arange(STEPS))
    assert np.abs(end.codes).max() < 10
    end, _ = run(tx, noisy_quadratic, end, state, STEPS + jnp.arange(20))
    assert np.abs(end.codes).max() < 20


def test_what_lies_beyond_the_range_is_not_kept():
    start = codes([LEVELS, LEVELS, -LEVELS, 0])
    grads = jnp.array([-1.0, -0.01, 1.0, -1.0]) * jnp.ones((30, 1))
    plain = madax.with_quantized_params(optax.sgd(0.3, momentum=0.9))
    tx = fed_back(optax.sgd(0.3, momentum=0.9))
    _, state = run(tx, lambda w, g: g, start, tx.init(start), grads)
    _, expected = run(plain, lambda w, g: g, start, plain.init(start), grads)
    found, expected = momentum(state, "trace"), momentum(expected, "trace")
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-6)
    assert found[3] != expected[3]


def test_floats_and_what_is_not_finite_are_left_to_the_inner_optimizer():
    params = {"w": codes([3, 4, 5]), "b": jnp.ones(3)}
    grads = {"w": jnp.array([1.0, np.inf, np.nan]), "b": jnp.ones(3)}
    inner = optax.adam(0.3)
    _, state = fed_back(inner).update(grads, fed_back(inner).init(params), params)
    decoded = madax.dequantize_params(params)
    _, expected = inner.update(grads, inner.init(decoded), decoded)
    mu, expected = state.inner_state[0].mu, expected[0].mu
    np.testing.assert_array_equal(mu["b"], expected["b"])
    np.testing.assert_array_equal(mu["w"][1:], expected["w"][1:])
    assert mu["w"][0] != expected["w"][0]


INNER = {
    "adamw": optax.adamw(0.01),
    "nadam in bfloat16": optax.nadam(0.01, mu_dtype=jnp.bfloat16),
    "injected": optax.inject_hyperparams(optax.adam)(0.01),
    "chained": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.01, 0.9)),
    "masked": optax.masked(optax.adam(0.01), {"mu": True, "b": False}),
    "accumulated": optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_optimizers_of_optax_keep_their_states(inner):
    w = jax.random.normal(jax.random.key(0), (8, 6))
    # A parameter may be called as a momentum is.
    params = madax.quantize_params({"mu": w, "b": jnp.ones(6)}, SymlogFormat(8))
    tx = fed_back(inner)
    state, update = tx.init(params), jax.jit(tx.update)
    first = state
    for _ in range(3):
        grads = madax.dequantize_params(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), state, first)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


BAD = {
    "no momentum": (optax.sgd(0.1), "there are 0; leave error_feedback out"),
    "two": (
        optax.chain(optax.trace(0.9), optax.adam(0.1)),
        "one momentum in the state of inner, called mu or trace",
    ),
    "codes": (
        madax.with_quantized_state(
            optax.adam(0.1), MomentFormat(8), where=lambda path, x: x.ndim > 0
        ),
        "mu in the state of inner has dtype uint8; put with_quantized_state around",
    ),
}


@pytest.mark.parametrize(("inner", "message"), BAD.values(), ids=BAD)
def test_a_state_without_one_momentum_of_floats_is_refused(inner, message):
    with pytest.raises(ValueError, match=message):
        fed_back(inner).init(codes([1, 2, 3]))


def test_a_momentum_that_updates_do_not_follow_is_left_alone():
    """Lion takes the sign of its own."""
    inner, start = optax.lion(0.3), codes([10, -20, 30])
    grads = jnp.ones((5, 3))
    wrappers = fed_back(inner), madax.with_quantized_params(inner)
    ends = [run(tx, lambda w, g: g, start, tx.init(start), grads) for tx in wrappers]
    np.testing.assert_array_equal(*(momentum(state) for _, state in ends))


def test_what_a_momentum_cannot_hold_is_not_given_back():
    inner = optax.sgd(1e-6, momentum=0.9, accumulator_dtype=jnp.float16)
    start, tx = codes(np.zeros(2000)), fed_back(inner)
    grads = jnp.full((2, 2000), -2e4)
    end, state = run(tx, lambda w, g: g, start, tx.init(start), grads)
    assert np.any(np.asarray(end.codes) != 0)
    assert np.isfinite(momentum(state, "trace")).all()


def test_what_is_no_momentum_is_seen_whole():
    """A state may have a vector of its own, of any length."""

    def update(updates, state, params):
        assert state[0].shape == (12,)
        updates, inner = adam.update(updates, state[1], params)
        return updates, (state[0], inner)

    adam = optax.adam(0.1)
    init = lambda params: (jnp.zeros(12), adam.init(params))
    tx = fed_back(optax.GradientTransformation(init, update))
    params = codes(np.zeros((4, 20)))
    tx.update(jnp.ones((4, 20)), tx.init(params), params)


def test_other_values_are_refused():
    with pytest.raises(
        TypeError, match="error_feedback must be True or False, got 'mu'"
    ):
        madax.with_quantized_params(optax.adam(0.1), error_feedback="mu")


def test_a_state_without_feedback_is_refused():
    params, inner = codes([1, 2, 3]), optax.adam(0.1)
    state = madax.with_quantized_params(inner).init(params)
    message = "params has 1 leaves, but the optimizer state was made without; call init"
    with pytest.raises(ValueError, match=message):
        fed_back(inner).update(jnp.ones(3), state, params)
