"""Orthogonal directions: against Newton-Schulz in float64, on floats and on codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_layerwise
from helpers import FORMATS, raises, step
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_meshes import different, enter, make_mesh

import madax
from madax import MomentFormat, muon_madam, scale_by_orthogonal_momentum
from madax._orthogonal import default_matrix_axes, orthogonalized

ORTHOGONAL = scale_by_orthogonal_momentum()


def newton_schulz(x):
    """Of one matrix, float64, by the formula."""
    x = np.float64(x) / np.linalg.norm(np.float64(x))
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def oracle(x):
    x = newton_schulz(x)
    return x / np.sqrt(np.mean(x**2))


def normal(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


@functools.partial(jax.jit, static_argnums=0)
def first_direction(tx, g):
    return tx.update(g, tx.init(g))[0]


# --- the direction --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (6, 6)])
def test_newton_schulz_in_float64(shape):
    x = normal(*shape)
    for scale in (1.0, 2.0**-100, 2.0**120):
        found = jax.jit(orthogonalized)(jnp.asarray(x) * np.float32(scale))
        np.testing.assert_allclose(found, oracle(x), rtol=1e-4, atol=1e-4)
    assert not np.any(jax.jit(orthogonalized)(jnp.zeros(shape)))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_are_about_one_and_vectors_are_kept(shape):
    rng = np.random.default_rng(0)
    rank = min(shape)
    u, _ = np.linalg.qr(rng.normal(size=(shape[0], rank)))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], rank)))
    x = (u * np.geomspace(1, 0.02, rank)) @ v.T
    raw = np.diag(u.T @ newton_schulz(x) @ v)
    assert np.all((raw > 0.65) & (raw < 1.25))  # of the formula itself
    found = np.asarray(first_direction(ORTHOGONAL, jnp.float32(x)), np.float64)
    inner = u.T @ found @ v
    values = np.diag(inner)
    np.testing.assert_allclose(values / values.mean(), raw / raw.mean(), rtol=1e-3)
    # Brought to a root mean square of one.
    assert np.mean(found**2) == pytest.approx(1, rel=1e-5)
    assert np.all(np.abs(values / np.sqrt(max(shape)) - 1) < 0.3)
    assert np.max(np.abs(inner - np.diag(values))) < 1e-3 * values.max()


def test_momentum_against_the_formula_and_gradients_that_are_not_finite():
    gs = normal(6, 5, 7)
    gs[2, 0, 0], gs[3, 1, 1] = np.nan, np.inf
    tx, m = scale_by_orthogonal_momentum(0.8), np.zeros((5, 7))
    state, update = tx.init(jnp.zeros((5, 7))), jax.jit(tx.update)
    for g in gs:
        direction, state = update(jnp.asarray(g), state)
        with np.errstate(invalid="ignore"):
            g = np.where(np.isfinite(g), np.float64(g), m)
        m = 0.8 * m + 0.2 * g
        np.testing.assert_allclose(state.m, m, rtol=1e-5, atol=1e-6)
        expected = oracle(0.8 * m + 0.2 * g)
        np.testing.assert_allclose(direction, expected, rtol=2e-3, atol=2e-3)


AXES = [
    ("dense/kernel", (4, 6), (0, 1)),
    ("layers/mlp/w", (3, 4, 6), (1, 1)),
    ("conv1/kernel", (3, 4, 6), (0, 2)),
    ("stem/kernel", (3, 3, 4, 6), (0, 3)),
    ("layers/conv/kernel", (2, 3, 3, 4, 6), (1, 3)),
    ("attention/query/kernel", (6, 2, 4), (0, 1)),
    ("attention/out/kernel", (2, 4, 6), (0, 2)),
    ("layers/attention/out/kernel", (3, 2, 4, 6), (1, 2)),
    ("multi_head/mlp/w", (4, 6), (0, 1)),
    ("", (4, 6), (0, 1)),
    ("dense/bias", (6,), None),
    ("layers/norm/scale", (3, 6), None),
    ("embed/embedding", (9, 4), None),
    ("token_embed", (9, 4), None),
    ("wte/weight", (9, 4), None),
    ("lm_head/kernel", (4, 9), None),
    ("head/kernel", (4, 9), None),
    ("gate/w", (4, 1), None),
]


@pytest.mark.parametrize(("path", "shape", "axes"), AXES, ids=lambda x: str(x))
def test_which_leaves_are_matrices(path, shape, axes):
    assert default_matrix_axes(path, shape) == axes


def test_stacks_and_kernels_are_their_matrices():
    """Each as it would be alone."""
    g = {
        "stack": normal(3, 4, 6),
        "conv": {"kernel": normal(3, 3, 2, 5, seed=1)},
        "out": {"kernel": normal(2, 3, 7, seed=2)},
    }
    found = first_direction(ORTHOGONAL, g)
    for one, direction in zip(g["stack"], found["stack"], strict=True):
        np.testing.assert_allclose(direction, oracle(one), rtol=1e-4, atol=1e-4)
    for name, rows in (("conv", 18), ("out", 6)):
        x = g[name]["kernel"]
        expected = oracle(x.reshape(rows, -1)).reshape(x.shape)
        np.testing.assert_allclose(
            found[name]["kernel"], expected, rtol=1e-4, atol=1e-4
        )
    asked = scale_by_orthogonal_momentum(matrices=lambda path, shape: (0, 2))
    found = first_direction(asked, g["stack"])
    np.testing.assert_allclose(
        found, oracle(g["stack"].reshape(12, 6)).reshape(3, 4, 6), rtol=1e-3, atol=1e-4
    )


# --- the optimizer --------------------------------------------------------------------

TWO_BYTES = muon_madam(0.03, moment_format=MomentFormat(8), seed=3)


def network(fmt=None):
    rng = np.random.default_rng(0)
    params = {
        "embed": jnp.float32(rng.normal(size=(32, 16))),
        "mlp": {"w": jnp.float32(rng.normal(size=(16, 24))), "b": jnp.zeros(24)},
        "conv": jnp.float32(rng.normal(size=(3, 3, 4, 8))),
    }
    return params if fmt is None else madax.quantize_params(params, fmt)


def grads_of(steps=6, scale=1.0):
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda w: jnp.float32(scale * rng.normal(size=w.shape)), network())
        for _ in range(steps)
    ]


@functools.partial(jax.jit, static_argnums=0)
def carried_on(tx, params, state, g):
    return step(tx, g, state, params)


def trained(tx, params):
    state = tx.init(params)
    for g in grads_of():
        params, state = carried_on(tx, params, state, g)
    return params, state


@pytest.mark.usefixtures("quick_compiles")
def test_other_leaves_take_the_steps_of_madam():
    start = network(FORMATS["symlog8"])
    found, _ = trained(TWO_BYTES, start)
    plain = madax.madam(0.03, moment_format=MomentFormat(8), seed=3)
    madam, _ = trained(plain, start)
    assert different(found["embed"], madam["embed"]) == []
    assert different(found["mlp"]["b"], madam["mlp"]["b"]) == []
    for name in ("conv", "mlp"):
        a, b = (jax.tree.leaves(x[name])[-2] for x in (found, madam))
        assert np.mean(np.asarray(a != b)) > 0.3


@pytest.mark.usefixtures("quick_compiles")
def test_codes_take_the_rounded_steps_of_their_values():
    params = network(FORMATS["log8"])
    values = madax.dequantize_params(params)
    grads, rate, fmt = grads_of(1)[0], 0.1, FORMATS["log8"]
    tx = muon_madam(rate, rounding="nearest")
    new, _ = carried_on(tx, params, tx.init(params), grads)
    for pick in (lambda tree: tree["conv"], lambda tree: tree["mlp"]["w"]):
        w, x, g, moved = map(pick, (params, values, grads, new))
        d = oracle(np.reshape(g, (-1, g.shape[-1]))).reshape(g.shape)
        target = np.log(np.abs(np.float64(x))) - rate * d * np.sign(x)
        codes = np.asarray(w.codes, int)
        # A step of d nats is d / base_step codes; codes at either end stay in the
        # range.
        inside = (np.abs(codes) > 10) & (np.abs(codes) < 117)
        found = np.log(np.abs(np.float64(moved.dequantize())))
        assert inside.mean() > 0.5
        assert np.all(np.abs(found - target)[inside] <= 0.501 * fmt.base_step)
    floats, _ = carried_on(tx, values, tx.init(values), grads)
    ratio = np.log(np.abs(floats["conv"] / values["conv"]))
    assert np.sqrt(np.mean(ratio**2)) == pytest.approx(rate, rel=0.05)


def test_a_parameter_takes_two_bytes():
    shapes = {"w": (256, 64), "embed": (64, 256)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    quantize = functools.partial(madax.quantize_params, format=FORMATS["symlog8"])
    params = jax.eval_shape(quantize, params)
    tree = params, jax.eval_shape(TWO_BYTES.init, params)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert 2 * 2**15 < total < 2 * 2**15 + 100


def test_moments_of_eight_bits_hardly_turn_the_direction():
    """Of a gradient with a signal, over as many steps as the momentum remembers."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 64))
    gs = jnp.float32(signal + 3 * rng.normal(size=(40, 64, 64)))

    @functools.partial(jax.jit, static_argnums=0)
    def directions(tx, gs):
        one = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(one, tx.init(gs[0]), gs)[1][-1]

    exact = directions(ORTHOGONAL, gs)
    stored = directions(madax.with_quantized_state(ORTHOGONAL, octaves=8), gs)
    assert float(jnp.mean(exact * stored)) > 0.9


@pytest.mark.nightly
def test_a_mesh_takes_the_steps_of_one_device_to_rounding():
    start, g = network(FORMATS["symlog8"]), grads_of(1)[0]
    tx = muon_madam(0.03, moment_format=MomentFormat(8))
    direction = jax.jit(scale_by_orthogonal_momentum().update)
    matrices = {"conv": g["conv"], "w": g["mlp"]["w"]}
    expected, _ = direction(matrices, ORTHOGONAL.init(matrices))
    mesh = make_mesh("auto")
    on = lambda x: NamedSharding(
        mesh, P(*[None] * (x.ndim - 2), "data", "model") if x.ndim > 1 else P()
    )
    lay = lambda tree: jax.tree.map(
        lambda x: jax.device_put(x, on(x) if min(x.shape) > 1 else on(jnp.ones(1))),
        tree,
    )
    with enter(mesh):
        state = tx.init(lay(start))
        m = state[0].inner_states["matrix"].inner_state.inner_state.m["mlp"]["w"]
        w = lay(start)["mlp"]["w"].codes
        assert m.dtype == jnp.uint8 and m.sharding.is_equivalent_to(w.sharding, 2)
        placed = lay(matrices)
        found, _ = direction(placed, ORTHOGONAL.init(placed))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert len(a.sharding.device_set) == 8
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.nightly
def test_layers_one_at_a_time_are_the_ordinary_step():
    """To rounding: a compiler may take products of matrices in another order."""
    start = test_layerwise.weights(FORMATS["symlog8"])
    _, _, losses = test_layerwise.trained(
        TWO_BYTES.init,
        test_layerwise.ordinary(TWO_BYTES),
        test_layerwise.listed(start),
    )
    functions = test_layerwise.embed, test_layerwise.layer, test_layerwise.loss
    run = madax.layerwise(TWO_BYTES, *functions, dtype=jnp.float32)
    found, state, found_losses = test_layerwise.trained(*run, start)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-3)
    assert found_losses[-1] < found_losses[0]
    w, w0 = (p["layers"]["mlp"]["w"].codes for p in (found, start))
    assert np.all(np.mean(w != w0, axis=(1, 2)) > 0.4)
    matrix = state["layers"][0].inner_states["matrix"].inner_state
    assert matrix.inner_state.m["layers"]["mlp"]["w"].dtype == jnp.uint8


# --- other directions -----------------------------------------------------------------


def test_any_direction_before_sign_log_and_in_a_partition_of_codes():
    """What optax has sees values, and the codes take the steps of floats."""
    params = network(FORMATS["symlog16"])
    labels = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, x: "lion" if "conv" in str(path) else "adam", tree
    )
    inner = {"adam": optax.scale_by_adam(), "lion": optax.scale_by_lion()}
    direction = optax.partition(inner, labels)
    tail = (
        optax.scale_by_learning_rate(0.01),
        madax.scale_by_sign_log(),
        madax.clip_log_weights(),
        madax.lns_quantize(rounding="nearest"),
    )
    codes = optax.chain(madax.with_dequantized_params(direction), *tail)
    g = grads_of(1)[0]
    new, state = carried_on(codes, params, codes.init(params), g)
    mu = state[0].inner_states["adam"].inner_state.mu["mlp"]["w"]
    np.testing.assert_allclose(mu, 0.1 * g["mlp"]["w"], rtol=1e-5)
    w = np.asarray(params["conv"].dequantize())
    step_of = np.asarray(new["conv"].dequantize()) - w
    # A step of symlog codes is in proportion to |w|, or to the linear range.
    big = (np.abs(w) > 1) & (np.abs(w) < 0.95 * np.abs(w).max())
    assert big.mean() > 0.2
    assert np.all(np.sign(step_of)[big] == -np.sign(np.asarray(g["conv"]))[big])
    sizes = np.abs(step_of / w)[big]
    assert np.all((sizes > 0.0095) & (sizes < 0.025))


# --- what is refused ------------------------------------------------------------------


def test_bad_input():
    params = network()
    with raises(ValueError, "params['conv/bias'] of shape (3,) is no matrix"):
        ORTHOGONAL.init({"conv": {"bias": jnp.ones(3)}})
    with raises(TypeError, "matrices must be a function of (path, shape), got 2"):
        muon_madam(matrices=2)
    for axes in ((0, 2), (2, 0), (-1, 1), (1, 1), (1,)):
        with raises(ValueError, "has shape (16, 24)", "(stacked, rows) = (", "columns"):
            muon_madam(
                matrices=lambda path, shape, axes=axes: axes if "w" in path else None
            ).init(params)
    with raises(ValueError, "b1 must satisfy 0 <= b1 < 1, got 1.0"):
        muon_madam(b1=1.0)
    with raises(ValueError, "learning_rate must satisfy"):
        muon_madam(-0.1)
    with raises(TypeError, "inner must be an optax.GradientTransformation"):
        madax.with_dequantized_params(optax.adam)
    with raises(ValueError, "updates and state.m must have the same tree structure"):
        ORTHOGONAL.update(jnp.ones((2, 2)), ORTHOGONAL.init({"a": jnp.ones((2, 2))}))
    with raises(TypeError, "state must be a ScaleByOrthogonalMomentumState"):
        ORTHOGONAL.update(jnp.ones((2, 2)), ())
