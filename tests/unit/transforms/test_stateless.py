"""Directions of matrices without a momentum, and one byte a parameter."""

import functools

import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import different, mostly_nightly, normal, raises, step, trajectory
from oracle import newton_schulz

import madax
from madax import MomentFormat, muon_madam
from madax.transforms import (
    MatrixDimensionNumbers,
    scale_by_column_norm,
    scale_by_factored_second_moment,
    scale_by_orthogonal_momentum,
    scale_by_sinkhorn,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

STATELESS = {
    "orthogonal": scale_by_orthogonal_momentum(b1=None),
    "sinkhorn": scale_by_sinkhorn(),
    "columns": scale_by_column_norm(),
}
ONE_BYTE = muon_madam(0.03, b1=None, moment_format=MomentFormat(8), seed=3)


def oracle(direction, g):
    """Of one matrix of shape (inputs, outputs), float64, by the formulas."""

    def over(x, scale):
        return np.divide(x, scale, where=scale > 0, out=np.zeros_like(x))

    def rms(x, axis=None):
        return np.sqrt(np.mean(x**2, axis, keepdims=True))

    x = np.float64(g)
    if direction == "orthogonal":
        x = newton_schulz(x) if np.any(x) else x
        return over(x, rms(x))
    for _ in range(5 if direction == "sinkhorn" else 1):
        x = over(x, rms(x, 1))
        if direction == "sinkhorn":
            x = over(x, rms(x, 0))
    return x


@pytest.mark.parametrize("direction", STATELESS)
def test_directions_against_their_formulas_at_any_scale(direction):
    tx, update = STATELESS[direction], jax.jit(STATELESS[direction].update)
    for shape in ((8, 12), (12, 8)):
        g = normal(*shape).at[0].set(0)  # nothing leaves an input that is off
        for scale in (1.0, 2.0**-100, 2.0**120):
            scaled = g * np.float32(scale)
            found, state = update(scaled, tx.init(scaled))
            np.testing.assert_allclose(
                found, oracle(direction, g), rtol=1e-5, atol=1e-5
            )
        zeros, _ = update(jnp.zeros(shape), state)
        assert not np.any(zeros)
    assert jax.tree.leaves(tx.init(jnp.ones((2, 2)))) == []


@pytest.mark.parametrize("direction", STATELESS)
def test_stacks_kernels_and_heads_are_their_matrices(direction):
    """Each as it would be alone: inputs first, then outputs."""
    g = {
        "mlp": normal(3, 4, 6),
        "conv": {"kernel": normal(3, 3, 2, 5, seed=1)},
        "outputs_first": normal(7, 3, 2, seed=2),
    }
    own = {"outputs_first": MatrixDimensionNumbers((1, 2), 0)}
    rule = {
        "mlp": MatrixDimensionNumbers(-2, -1),
        "conv/kernel": MatrixDimensionNumbers((0, 1, 2), 3),
    } | own
    make = {
        "orthogonal": functools.partial(scale_by_orthogonal_momentum, None),
        "sinkhorn": scale_by_sinkhorn,
        "columns": scale_by_column_norm,
    }[direction]
    tx = make(matrices=lambda path, leaf: rule[path])
    found, _ = jax.jit(tx.update)(g, tx.init(g))
    by_default, _ = jax.jit(STATELESS[direction].update)(
        {k: g[k] for k in ("mlp", "conv")}, tx.init(g)
    )
    assert different(by_default, {k: found[k] for k in ("mlp", "conv")}) == []
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    for one, d in zip(g["mlp"], found["mlp"], strict=True):
        close(d, oracle(direction, one))
    kernel = g["conv"]["kernel"]
    expected = oracle(direction, kernel.reshape(18, 5)).reshape(kernel.shape)
    close(found["conv"]["kernel"], expected)
    x = g["outputs_first"]
    close(
        found["outputs_first"], oracle(direction, x.reshape(7, 6).T).T.reshape(x.shape)
    )


@pytest.mark.parametrize("direction", STATELESS)
def test_elements_that_are_not_finite_count_as_zero(direction):
    g = np.array(normal(6, 9))
    g[1, 2], g[3, 3], g[5] = np.nan, np.inf, -np.inf
    tx = STATELESS[direction]
    found, _ = jax.jit(tx.update)(jnp.asarray(g), tx.init(jnp.asarray(g)))
    clean = np.where(np.isfinite(g), g, 0)
    np.testing.assert_allclose(found, oracle(direction, clean), rtol=1e-4, atol=1e-4)


def test_no_momentum_is_a_momentum_that_forgets_at_once():
    start = madax.quantize_params(
        {"w": jnp.asarray(normal(24, 16)), "bias": jnp.zeros(16)}, FORMATS["symlog8"]
    )
    grads = {"w": normal(6, 24, 16, seed=1), "bias": normal(6, 16, seed=2)}
    make = functools.partial(muon_madam, 0.03, direction="columns", seed=3)
    found, forgets = (trajectory(make(b1=b1), start, grads) for b1 in (None, 0.0))
    assert different(found, forgets) == []
    lasting = trajectory(make(), start, grads)
    assert different(found, lasting) != []


# --- second moments of rows and columns -----------------------------------------------


def factored(gs, b2):
    """Directions of one matrix of shape (inputs, outputs), float64, by the formula."""
    rows = columns = 0
    for t, g in enumerate(np.float64(gs), 1):
        g = np.where(np.isfinite(g), g, 0)
        rows = b2 * rows + (1 - b2) * np.mean(g**2, 1, keepdims=True)
        columns = b2 * columns + (1 - b2) * np.mean(g**2, 0, keepdims=True)
        unbiased = (1 - b2**t) * rows.mean() / np.maximum(rows * columns, 1e-300)
        yield g * np.sqrt(unbiased)


@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_factored_moments_against_the_formula(b2):
    """At any scale of the gradients, which differ by rows, steps and matrices."""
    rng = np.random.default_rng(0)
    gs = rng.normal(size=(40, 3, 8, 12)) * np.exp(2 * rng.normal(size=(40, 3, 8, 1)))
    gs[:, 0, 2], gs[7, 1, 3, 4], gs[9, 1, 0, 0] = 0, np.nan, -np.inf
    axes = lambda path, leaf: MatrixDimensionNumbers(-2, -1)
    tx = scale_by_factored_second_moment(b2, matrices=axes)
    run = jax.jit(
        lambda gs: jax.lax.scan(
            lambda state, g: tx.update(g, state)[::-1], tx.init(gs[0]), gs
        )
    )
    expected = [list(factored(gs[:, i], b2)) for i in range(3)]
    for scale in (1.0, 2.0**-30, 2.0**30):
        state, found = run(jnp.float32(scale * gs))
        for i in range(3):
            np.testing.assert_allclose(found[:, i], expected[i], rtol=2e-4, atol=1e-6)
    assert state.count == 40
    assert [x.shape for x in (*state.nu_in, *state.nu_out)] == [(3, 8, 1), (3, 1, 12)]


def test_one_byte_takes_orthogonal_steps_along_factored_directions():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=(12, 1, 1)))
    gs = np.float32(sizes * rng.normal(size=(12, 8, 12)) * np.linspace(1, 5, 12))
    w, rate, b2 = normal(8, 12), 0.01, 0.9
    tx = muon_madam(rate, b1=None, b2=b2, floor=0.0)
    before = np.concatenate([w[None], trajectory(tx, {"w": w}, {"w": gs})["w"]])
    steps = -np.diff(np.log(np.abs(np.float64(before))), axis=0) / rate
    for found, p in zip(steps, factored(gs, b2), strict=True):
        expected = oracle("orthogonal", p) * np.sign(w)
        np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)


def test_a_parameter_takes_one_byte():
    """But for the few leaves with a second moment, of Llama-2 7B's shapes."""
    wide, hidden, depth, vocabulary = 4096, 11008, 32, 32000
    square, up = (depth, wide, wide), (depth, wide, hidden)
    shapes = {
        "ends": {"tokens": (vocabulary, wide), "head": (vocabulary, wide)},
        "layers": dict.fromkeys("qkvo", square)
        | {"gate": up, "up": up, "down": (depth, hidden, wide), "norm": (depth, wide)},
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    quantize = functools.partial(madax.quantize_params, format=FORMATS["symlog8"])
    params = jax.eval_shape(quantize, params)
    tree = params, jax.eval_shape(ONE_BYTE.init, params)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert total / sum(x.size for x in jax.tree.leaves(params)) < 1.06


@pytest.mark.parametrize(
    "direction", mostly_nightly(["factored", "sinkhorn", "columns"], "columns")
)
def test_layers_one_at_a_time_are_the_ordinary_step_to_the_bit(direction):
    """No product of matrices is in these, so no compiler may round them otherwise."""
    start = layers.weights(FORMATS["symlog8"])
    tx = muon_madam(
        0.03, b1=None, direction=direction, moment_format=MomentFormat(8), seed=3
    )
    expected, _, losses = layers.trained(
        tx.init, layers.ordinary(tx), layers.listed(start)
    )
    run = madax.layerwise(tx, *layers.FUNCTIONS, dtype=jnp.float32)
    found, state, found_losses = layers.trained(*run, start)
    assert found_losses == losses and losses[-1] < losses[0]
    assert different(layers.listed(found), expected) == []
    matrix = state["layers"].direction.inner_states["matrix"].inner_state
    shapes = [x.shape for x in jax.tree.leaves(matrix)]
    wide = layers.WIDTH
    vectors = [(layers.DEPTH, wide, 1), (layers.DEPTH, 1, wide)]
    assert shapes == (vectors if direction == "factored" else [])


# --- a rate for the rest --------------------------------------------------------------


def test_leaves_with_the_direction_of_madam_have_a_rate_of_their_own():
    params = {"w": jnp.asarray(normal(24, 16)), "bias": jnp.ones(16)}
    grads = {"w": normal(6, 24, 16, seed=1), "bias": normal(6, 16, seed=2)}
    slow, fast = optax.linear_schedule(0.01, 0.0, 6), optax.linear_schedule(0.1, 0.0, 6)
    both = trajectory(muon_madam(slow, madam_learning_rate=fast), params, grads)
    one = trajectory(muon_madam(slow), params, grads)
    other = trajectory(muon_madam(fast), params, grads)
    expected = one | {"bias": other["bias"]}
    assert different(both, expected) == []
    assert different(one["bias"], other["bias"]) != []
    # Over a stack, by layers: the leaf is the same wherever it is read.
    start = layers.weights(FORMATS["symlog8"])
    still = muon_madam(0.0, madam_learning_rate=0.05, b1=None, direction="columns")
    init, advance = madax.layerwise(still, *layers.FUNCTIONS, dtype=jnp.float32)
    found, _, _ = layers.trained(init, advance, start)
    assert different(found["layers"]["mlp"], start["layers"]["mlp"]) == []
    assert different(found["layers"]["gain"], start["layers"]["gain"]) != []
    assert different(found["ends"], start["ends"]) != []


# --- what is refused ------------------------------------------------------------------


def test_bad_input_is_refused_and_nothing_lost():
    with raises(ValueError, "direction must be one of", "'columns'", "got 'rows'"):
        muon_madam(direction="rows")
    with raises(ValueError, "madam_learning_rate must satisfy", "got -0.1"):
        muon_madam(madam_learning_rate=-0.1)
    w = jnp.ones((4, 4))
    for tx in STATELESS.values():
        with raises(ValueError, "params['norm'] of shape (3,) is not a matrix"):
            tx.init({"norm": jnp.ones(3)})
        with raises(ValueError, "the optimizer state has a momentum", "b1=None"):
            tx.update(w, scale_by_orthogonal_momentum().init(w))
        with raises(TypeError, "updates must be a floating-point array"):
            tx.update("w", tx.init(w))
    factors = scale_by_factored_second_moment()
    with raises(ValueError, "second moments of the shapes", "call init again"):
        factors.update(jnp.ones((4, 3)), factors.init(w))
    with raises(ValueError, "b2 must satisfy 0 <= b2 < 1, got 1.0"):
        scale_by_factored_second_moment(1.0)
    two = muon_madam(0.03, moment_format=MomentFormat(8), seed=3)
    params = madax.quantize_params({"w": w}, FORMATS["symlog8"])
    for tx, other in ((two, ONE_BYTE), (ONE_BYTE, two)):
        with raises(ValueError, "the optimizer state was made for other params, or"):
            step(tx, {"w": w}, other.init(params), params)
