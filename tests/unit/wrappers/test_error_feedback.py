"""Error feedback: what rounding codes lost comes back through the momentum."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import FORMATS
from helpers import long_run, mostly_nightly, normal

import madax
from madax import LogFormat, MomentFormat, QuantizedArray, SymlogFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

LEVELS = 127
UNIFORM = FORMATS["uniform8"]  # Codes are values here, as the scale is 127.


def codes(values):
    return QuantizedArray(jnp.asarray(values, jnp.int8), jnp.float32(LEVELS), UNIFORM)


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


@pytest.mark.parametrize("fmt", [UNIFORM, SymlogFormat(8), LogFormat(8)], ids=repr)
def test_adam_with_nearest_rounding_is_numpys(fmt):
    """Also where the rate rises faster than the momentum decays."""
    rng = np.random.default_rng(0)
    b1, b2, eps, steps = 0.9, 0.99, 1e-8, 40
    rates = np.where(np.arange(steps) < 30, 0.2, 3.0) * (1 + 0.02 * np.arange(steps))
    grads = np.float32(rng.normal(size=(steps, 300)) * 10 ** rng.uniform(-2, 2, 300))
    w = QuantizedArray(
        jnp.asarray(rng.integers(-LEVELS, LEVELS + 1, 300), jnp.int8),
        jnp.float32(LEVELS),
        fmt,
    )
    value = lambda code: LEVELS * oracle.decode(fmt, code)
    tx = fed_back(
        optax.adam(lambda t: jnp.asarray(rates, jnp.float32)[t], b1, b2, eps),
        rounding="nearest",
    )
    state, update = tx.init(w), jax.jit(tx.update)
    m, v, last = np.zeros(300), np.zeros(300), 0
    for t, g in enumerate(grads, 1):
        before, code = m, np.asarray(w.codes, float)
        updates, state = update(jnp.asarray(g), state, w)
        w = optax.apply_updates(w, updates)
        # The slope of a second moment that stays as it is.
        rate = b1 * rates[t - 1] / (1 - b1**t) * np.sqrt(1 - b2**t)
        m = before * (last / (rate * b1) if rate * b1 > last > 0 else 1)
        m, last = b1 * m + (1 - b1) * g, rate
        v = b2 * v + (1 - b2) * np.float64(g) ** 2
        slope = -rates[t - 1] / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        wanted = np.clip(value(code) + slope * m, -LEVELS, LEVELS)
        # The code nearest to it is one of codes; a tie may go either way.
        new = np.asarray(w.codes, float)
        assert np.all(np.abs(oracle.encode(fmt, wanted / LEVELS) - new) < 0.51)
        m = m + (wanted - value(new)) * (1 - b1) / (b1 * slope)
        np.testing.assert_allclose(momentum(state), m, rtol=5e-3, atol=1e-3)
        m = momentum(state)


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


def noise(count, n=4000):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), count), (n,))


def movement(tx, params, steps=4000):
    """How much of the start is gained in steps of zero mean, over many weights."""
    start = np.asarray(params.dequantize(), np.float64)
    state, xs = tx.init(params), jnp.arange(steps)
    with long_run():
        end, _ = run(tx, lambda w, x: noise(x), params, state, xs)
    end = np.asarray(end.dequantize(), np.float64)
    return np.sum((end - start) * start) / np.sum(start * start)


@pytest.mark.parametrize(
    "fmt",
    mostly_nightly([SymlogFormat(8), LogFormat(8), SymlogFormat(4)], SymlogFormat(4)),
    ids=repr,
)
def test_weights_do_not_grow_by_noise(fmt):
    """A code up and a code down are not equally far on a curved grid."""
    w = madax.quantize_params(normal(4000), fmt, where=lambda path, w: True)
    least = 0.0005 if fmt.bits == 8 else 0.005
    assert abs(movement(fed_back(optax.adam(1e-5)), w)) < least


@pytest.mark.parametrize("up", [True, False])
def test_rounding_keeps_the_mean_of_values_on_a_curved_grid(up):
    fmt, code, n = LogFormat(5), 6, 400_000
    w = QuantizedArray(jnp.full(n, code, jnp.int8), jnp.ones(1), fmt)
    values = oracle.decode(fmt, np.array([code - 1, code, code + 1]))
    u = 0.2 * (values[2] - values[1] if up else values[0] - values[1])
    tx = madax.with_quantized_params(optax.sgd(1.0))
    updates, _ = tx.update(jnp.full(n, -u, jnp.float32), tx.init(w), w)
    moved = oracle.decode(fmt, np.asarray(optax.apply_updates(w, updates).codes))
    np.testing.assert_allclose(np.mean(moved - values[1]), u, rtol=0.015)


def test_weight_decay_has_its_full_effect():
    w = madax.quantize_params(normal(4000), LogFormat(8), where=lambda path, w: True)
    lost = -movement(fed_back(optax.adamw(1e-4, weight_decay=0.1)), w)
    np.testing.assert_allclose(lost, 1 - (1 - 1e-5) ** 4000, atol=0.002)


def rarely_seen(count):
    """Gradients of a table, a matrix and a vector; the first row is seldom one."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), count), 4)
    row = jax.random.bernoulli(keys[3], 0.02, (16, 1)).at[0].set(count % 90 == 0)
    table = jax.random.normal(keys[0], (16, 8)) * row
    return {
        "table": table,
        "w": jax.random.normal(keys[1], (8, 8)) + 0.3,
        "b": jax.random.normal(keys[2], (8,)) + 0.3,
    }


@pytest.mark.parametrize(
    ("b1", "b2"),
    mostly_nightly([(0.9, 0.9), (0.9, 0.95), (0.95, 0.95), (0.9, 0.999)], (0.9, 0.999)),
)
def test_it_takes_nothing_from_momentum_at_a_constant_rate(b1, b2):
    """Float leaves are the inner optimizer's to the bit; codes move as far."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, b1, b2))
    floats = {"table": normal(16, 8), "w": normal(8, 8, seed=1), "b": jnp.zeros(8)}
    coded = madax.quantize_params(
        floats, SymlogFormat(16), where=lambda path, w: path == "w", p_scale=9.0
    )
    ends = []
    for tx, params in ((fed_back(inner), coded), (inner, floats)):

        def step(carry, count, tx=tx):
            params, state = carry
            updates, state = tx.update(rarely_seen(count), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, tx.init(params)
        (params, _), _ = jax.jit(partial(jax.lax.scan, step))(carry, jnp.arange(500))
        ends.append(madax.dequantize_params(params))
    # Older compilers fuse products and sums as the rest of a program suggests.
    exact = jax.__version_info__ >= (0, 7)
    for name in ("table", "b"):
        rtol = 0 if exact else 1e-5
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=rtol, atol=rtol)
    moved, expected = (jnp.mean(end["w"] - floats["w"]) for end in ends)
    np.testing.assert_allclose(moved, expected, rtol=0.01)


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
        "8 bits": (fed_back(ADAM, moment_format=MomentFormat(8)), 0.6),
    }.values(),
    ids=["floats", "8 bits"],
)
def test_the_noise_of_rounding_does_not_add_up(tx, least):
    start = codes(np.random.default_rng(2).integers(-20, 20, 5000))
    xs = jnp.arange(STEPS)
    squares = []
    for each in (tx, madax.with_quantized_params(ADAM)):
        state = each.init(start)
        with long_run():
            end, _ = run(each, noisy_quadratic, start, state, xs)
        squares.append(np.mean(end.dequantize() ** 2))
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
    "amsgrad": optax.amsgrad(0.01),
    "adamax": optax.adamax(0.01),
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


def ema(inner):
    return optax.chain(inner, optax.ema(0.9))


class Named(NamedTuple):
    """Parameters may be called as a momentum is."""

    mu: Any
    trace: Any


ZERO = "whose derivative by the momentum is 0; leave error_feedback out"
OTHERS = "mixes elements: the momentum of one changes other updates"
BAD = {
    "no momentum": (optax.sgd(0.1), "momentum of params.*, but there are 0; leave"),
    "two": (optax.chain(optax.trace(0.9), optax.adam(0.1)), "called mu or trace"),
    "codes": (
        madax.with_quantized_state(optax.adam(0.1), where=lambda path, x: x.ndim > 0),
        "with dtype uint8; pass moment_format to with_quantized_params",
    ),
    "a list": (optax.sm3(0.1), "but there are 0; leave"),
    "masked": (optax.masked(optax.adam(0.1), {"w": False}), "but there are 0; leave"),
    "lion": (optax.lion(0.3), ZERO),
    "signs": (optax.chain(optax.trace(0.9), optax.scale_by_sign()), ZERO),
    "schedule_free": (
        optax.contrib.schedule_free(optax.sgd(0.1, 0.9), 0.1),
        "momentum on which 'z/w' in the state depends, too",
    ),
    "averaged": (ema(optax.adam(0.1)), "momentum on which '1/ema/w' in the state"),
    "centred": (
        optax.rmsprop(0.1, centered=True),
        "not a linear function of the momentum",
    ),
    "belief": (optax.adabelief(0.1), "momentum on which '0/nu/w' in the state"),
    "muon": (optax.contrib.muon(0.1), OTHERS),
    "lamb": (optax.lamb(0.1), OTHERS),
    "clipped": (optax.chain(optax.adam(0.1), optax.clip_by_global_norm(1.0)), OTHERS),
}


@pytest.mark.parametrize(("inner", "message"), BAD.values(), ids=BAD)
def test_optimizers_that_it_is_wrong_for_are_refused(inner, message):
    params = {"w": codes(np.ones((4, 4)))}
    with pytest.raises(ValueError, match=f"(?s)error_feedback=True.*{message}"):
        fed_back(inner).init(params)


def test_each_part_of_a_partition_has_a_momentum_of_its_own():
    params = {"a": codes([1, 2, 3]), "b": codes([4, 5])}
    parts = {"a": optax.adam(0.3), "b": optax.sgd(0.3, momentum=0.9)}
    tx = fed_back(optax.partition(parts, {"a": "a", "b": "b"}))
    state, grads = tx.init(params), madax.dequantize_params(params)
    updates, state = tx.update(grads, state, params)
    for name, inner in parts.items():
        alone = fed_back(inner)
        expected, after = alone.update(
            {name: grads[name]}, alone.init({name: params[name]}), {name: params[name]}
        )
        np.testing.assert_array_equal(updates[name].codes, expected[name].codes)
        field = "mu" if name == "a" else "trace"
        found, wanted = (optax.tree_utils.tree_get(x, field) for x in (state, after))
        np.testing.assert_array_equal(found[name], wanted[name])


def test_a_parameter_may_be_called_mu():
    params = Named(codes([1, 2, 3]), Named(jnp.ones(2), codes([4, 5])))
    tx = fed_back(optax.adam(0.1))
    grads = madax.dequantize_params(params)
    _, state = tx.update(grads, tx.init(params), params)
    assert isinstance(state.inner_state[0].mu, Named)


def test_what_needs_more_arguments_is_checked_in_the_first_step():
    params = codes([1, 2, 3])
    plateau = optax.contrib.reduce_on_plateau(patience=2)
    tx = fed_back(optax.chain(optax.adam(0.1), plateau))
    tx.update(jnp.ones(3), tx.init(params), params, value=1.0)
    tx = fed_back(optax.chain(ema(optax.adam(0.1)), plateau))
    with pytest.raises(ValueError, match="in the state depends, too; leave"):
        tx.update(jnp.ones(3), tx.init(params), params, value=1.0)


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


def test_a_rate_that_is_injected_is_not_kept_beyond_its_trace():
    params = codes([1, 2, 3])
    tx = optax.inject_hyperparams(lambda rate: fed_back(optax.adam(rate)))(rate=0.1)
    state = tx.init(params)
    with jax.checking_leaks():
        jax.jit(tx.update)(jnp.ones(3), state, params)


def test_functions_and_text_for_other_transforms_of_a_chain_are_let_through():
    seen = {}

    def update(updates, state, params, *, value_fn, mode, **extra_args):
        seen.update(value=value_fn(params.dequantize()), mode=mode)
        return updates, state

    params = codes([1, 2, 3])
    alone = fed_back(optax.adam(0.1))
    search = optax.GradientTransformationExtraArgs(lambda params: (), update)
    both = optax.chain(alone, search)
    extra = {"value_fn": jnp.sum, "mode": "zoom", "value": 0.5}
    updates, _ = both.update(jnp.ones(3), both.init(params), params, **extra)
    expected, _ = alone.update(jnp.ones(3), alone.init(params), params)
    np.testing.assert_array_equal(updates.codes, expected.codes)
    assert seen == {"value": 6, "mode": "zoom"}


def test_other_values_are_refused():
    with pytest.raises(
        TypeError, match="error_feedback must be True or False, got 'mu'"
    ):
        madax.with_quantized_params(optax.adam(0.1), error_feedback="mu")


def test_a_state_without_feedback_is_refused():
    params, inner = codes([1, 2, 3]), optax.adam(0.1)
    state = madax.with_quantized_params(inner).init(params)
    message = "params has 1 leaves of codes, but the optimizer state was made without"
    with pytest.raises(ValueError, match=message):
        fed_back(inner).update(jnp.ones(3), state, params)
