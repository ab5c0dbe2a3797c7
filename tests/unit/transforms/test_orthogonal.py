"""Orthogonal directions: against Newton-Schulz in float64, on floats and on codes."""

import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import different, enable_x64, normal, raises, step
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import enter, make_mesh
from oracle import newton_schulz

import madax
from madax import MomentFormat, muon_madam
from madax.transforms import (
    MatrixDimensionNumbers,
    _orthogonal,
    scale_by_orthogonal_momentum,
)
from madax.transforms._orthogonal import orthogonalized

pytestmark = pytest.mark.usefixtures("quick_compiles")

ORTHOGONAL = scale_by_orthogonal_momentum()


def oracle(x):
    x = newton_schulz(x)
    return x / np.sqrt(np.mean(x**2))


@functools.partial(jax.jit, static_argnums=0)
def first_direction(tx, g):
    return tx.update(g, tx.init(g))[0]


# --- the direction --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (6, 6)])
def test_newton_schulz_in_float64(shape):
    x = normal(*shape)
    for scale in (1.0, 2.0**-100, 2.0**120):
        found = jax.jit(orthogonalized)(jnp.asarray(x) * np.float32(scale))
        np.testing.assert_allclose(found, oracle(x), rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64)])
def test_products_in_bfloat16_keep_singular_values_and_vectors(shape):
    """Chips that have them make these products; here a CPU makes them, too."""
    x = normal(*shape) + np.outer(normal(shape[0]), normal(shape[1], seed=1)) / 2
    u, s, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    narrow = jax.jit(_orthogonal.newton_schulz, static_argnums=1)(x, jnp.bfloat16)
    assert narrow.dtype == jnp.float32
    inner = u.T @ np.float64(narrow) @ vt.T
    raw = np.diag(u.T @ newton_schulz(x) @ vt.T)
    values = np.diag(inner) * np.sqrt(np.mean(newton_schulz(x) ** 2))
    large = s > 0.01 * np.linalg.norm(s)
    assert large.sum() > 0.8 * min(shape)
    assert np.all((values[large] > 0.65) & (values[large] < 1.25))
    np.testing.assert_allclose(values[large], raw[large], rtol=0.02)
    assert np.max(np.abs(inner - np.diag(np.diag(inner)))) < 0.03 * inner.max()
    assert 0.001 < np.max(np.abs(narrow - oracle(x))) < 0.2  # it is narrow


def test_products_are_narrow_where_a_chip_has_them():
    def dtypes(platform, dtype):
        traced = orthogonalized.trace(jax.ShapeDtypeStruct((8, 12), dtype))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        if "stablehlo.case" in text:
            pytest.skip("older JAX leaves the choice of a branch to XLA")
        products = re.findall(r"dot_general.*tensor<\w+x(\w+)>$", text, re.MULTILINE)
        assert len(products) == 15
        return set(products)

    for platform in ("tpu", "cuda", "rocm"):
        assert dtypes(platform, jnp.float32) == {"bf16"}
    for dtype in (jnp.float32, jnp.bfloat16):
        assert dtypes("cpu", dtype) == {"f32"}
    with enable_x64():
        assert dtypes("tpu", jnp.float64) == dtypes("cpu", jnp.float64) == {"f64"}


def test_momentum_against_the_formula_and_gradients_that_are_not_finite():
    gs = np.array(normal(6, 5, 7))
    gs[2, 0, 0], gs[3, 1, 1] = np.nan, np.inf
    tx, m = scale_by_orthogonal_momentum(0.8), np.zeros((5, 7))
    state, update = tx.init(jnp.zeros((5, 7))), jax.jit(tx.update)
    for g in gs:
        direction, state = update(jnp.asarray(g), state)
        with np.errstate(invalid="ignore"):
            g = np.where(np.isfinite(g), np.float64(g), m)
        m = 0.8 * m + 0.2 * g
        np.testing.assert_allclose(state.mu, m, rtol=1e-5, atol=1e-6)
        expected = oracle(0.8 * m + 0.2 * g)
        np.testing.assert_allclose(direction, expected, rtol=2e-3, atol=2e-3)


# Of each leaf the axes, and the axes in the order of (stack, rows, columns).
LAYOUTS = {
    "heads": ((6, 2, 4), MatrixDimensionNumbers(0, (1, 2)), None),
    "from heads": ((2, 4, 6), MatrixDimensionNumbers((0, 1), 2), None),
    "outputs first": ((7, 3, 2), MatrixDimensionNumbers((1, 2), 0), None),
    "stack": ((3, 4, 6), MatrixDimensionNumbers(-2, -1), None),
    "stack behind": ((5, 4, 3), MatrixDimensionNumbers(0, 1), (2, 0, 1)),
    "stack in the middle": (
        (6, 3, 2, 4),
        MatrixDimensionNumbers(0, (2, 3)),
        (1, 0, 2, 3),
    ),
    "rows apart": ((2, 3, 4, 6), MatrixDimensionNumbers((0, 2), 3), (1, 0, 2, 3)),
    "one head": ((6, 1, 4), MatrixDimensionNumbers(0, 2), None),
}


def test_any_axes_can_be_said_and_only_those_out_of_order_are_moved():
    g = {name: normal(*shape) for name, (shape, *_) in LAYOUTS.items()}
    rule = lambda path, leaf: LAYOUTS[path][1]
    tx = scale_by_orthogonal_momentum(matrices=rule)
    found = first_direction(tx, g)
    for name, (shape, axes, order) in LAYOUTS.items():
        order = order or range(len(shape))
        moved = g[name].transpose(order)
        groups = [np.atleast_1d(x) % len(shape) for x in axes]
        counted = [n for i, n in enumerate(shape) if all(i not in x for x in groups)]
        first = min(groups, key=min)  # which are the rows
        rows = math.prod(shape[i] for i in first)
        each = moved.reshape(math.prod(counted), rows, -1)
        expected = np.stack([oracle(x if len(x) <= len(x.T) else x.T) for x in each])
        if rows > each.shape[-1]:
            expected = expected.swapaxes(1, 2)
        expected = expected.reshape(moved.shape).transpose(np.argsort(order))
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-4)
        one = scale_by_orthogonal_momentum(matrices=lambda path, leaf, axes=axes: axes)
        traced = jax.make_jaxpr(lambda g, tx=one: tx.update(g, tx.init(g))[0])(g[name])
        transposes = "transpose[" in str(traced)
        # Of a stack of one, products of older versions transpose it themselves.
        if jax.__version_info__ >= (0, 7) or name != "one head":
            assert transposes == (list(order) != sorted(order)), name


@pytest.mark.skipif(
    not hasattr(optax.contrib, "MuonDimensionNumbers"), reason="optax is older"
)
def test_the_axes_of_optax_are_taken_as_they_are():
    g = normal(5, 4, 3)
    directions = [
        first_direction(scale_by_orthogonal_momentum(matrices=lambda *_, a=axes: a), g)
        for axes in (MatrixDimensionNumbers(0, 1), optax.contrib.MuonDimensionNumbers())
    ]
    np.testing.assert_array_equal(*directions)


def test_a_rule_is_given_the_leaf():
    params, seen = network(FORMATS["symlog8"]), {}

    def rule(path, leaf):
        seen[path] = type(leaf).__name__, leaf.shape, str(leaf.dtype)

    muon_madam(matrices=rule).init(params)
    assert seen["mlp/w"] == ("QuantizedArray", (16, 24), "float32")
    assert seen["mlp/b"][1:] == ((24,), "float32")


def test_leaves_that_cannot_be_told_take_the_steps_of_madam_and_are_warned_of():
    params = {
        "layers": [{"tensor": normal(3, 4, 6), "C": normal(6, 4, 2)}] * 2,
        "stack/kernel": normal(3, 4, 6),
    }
    with pytest.warns(UserWarning) as caught:
        state = muon_madam(0.1).init(params)
    (warning,) = caught
    text = str(warning.message)
    assert warning.filename == __file__
    assert text.count("layers/") == 2 and "matrices(path, leaf)" in text
    assert "params['layers/0/tensor'] of shape (3, 4, 6)" in text
    g = jax.tree.map(jnp.ones_like, params)
    found, _ = muon_madam(0.1).update(g, state, params)
    plain = madax.madam(0.1, floor=1.0)
    expected, _ = plain.update(g, plain.init(params), params)
    np.testing.assert_array_equal(
        found["layers"][0]["tensor"], expected["layers"][0]["tensor"]
    )
    run = madax.layerwise(muon_madam(), *[lambda *args: 0.0] * 3)
    stack = {"layers": {"tensor": normal(2, 3, 4, 6)}, "ends": {"w": normal(4, 6)}}
    with pytest.warns(UserWarning, match="layers/0/tensor") as caught:
        jax.eval_shape(run.init, stack)
    assert len({str(w.message) for w in caught}) == 1  # Python shows it once.
    rule = lambda path, leaf: None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        muon_madam(matrices=rule).init(params)
        muon_madam().init(network())


def test_stacks_and_kernels_are_their_matrices():
    """Each as it would be alone."""
    g = {
        "mlp": normal(3, 4, 6),
        "conv": {"kernel": normal(3, 3, 2, 5, seed=1)},
        "attn_vec": {"kernel": normal(2, 3, 7, seed=2)},
    }
    found = first_direction(ORTHOGONAL, g)
    for one, direction in zip(g["mlp"], found["mlp"], strict=True):
        np.testing.assert_allclose(direction, oracle(one), rtol=1e-4, atol=1e-4)
    for name, rows in (("conv", 18), ("attn_vec", 6)):
        x = g[name]["kernel"]
        expected = oracle(x.reshape(rows, -1)).reshape(x.shape)
        np.testing.assert_allclose(
            found[name]["kernel"], expected, rtol=1e-4, atol=1e-4
        )
    asked = scale_by_orthogonal_momentum(
        matrices=lambda path, leaf: MatrixDimensionNumbers((0, 1), 2)
    )
    found = first_direction(asked, g["mlp"])
    np.testing.assert_allclose(
        found, oracle(g["mlp"].reshape(12, 6)).reshape(3, 4, 6), rtol=1e-3, atol=1e-4
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


def test_codes_take_the_rounded_steps_of_their_values():
    params = network(FORMATS["log8"])
    values = madax.dequantize_params(params)
    grads, rate, fmt = grads_of(1)[0], 0.1, FORMATS["log8"]
    tx = muon_madam(rate, floor=0.0, rounding="nearest")
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
    stored = directions(
        madax.with_quantized_state(
            ORTHOGONAL, moment_format=madax.MomentFormat(8, octaves=8)
        ),
        gs,
    )
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
        m = state.direction.inner_states["matrix"].inner_state.inner_state.mu["mlp"][
            "w"
        ]
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
    start = layers.weights(FORMATS["symlog8"])
    _, _, losses = layers.trained(
        TWO_BYTES.init,
        layers.ordinary(TWO_BYTES),
        layers.listed(start),
    )
    run = madax.layerwise(TWO_BYTES, *layers.FUNCTIONS, dtype=jnp.float32)
    found, state, found_losses = layers.trained(*run, start)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-3)
    assert found_losses[-1] < found_losses[0]
    w, w0 = (p["layers"]["mlp"]["w"].codes for p in (found, start))
    assert np.all(np.mean(w != w0, axis=(1, 2)) > 0.4)
    matrix = state["layers"].direction.inner_states["matrix"].inner_state
    assert matrix.inner_state.mu["layers"]["mlp"]["w"].dtype == jnp.uint8


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
    codes = optax.chain(madax.transforms.with_dequantized_params(direction), *tail)
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


def test_a_matrix_without_elements_is_left_alone():
    tx = muon_madam(matrices=lambda path, leaf: MatrixDimensionNumbers(0, 1))
    params = {"w": jnp.ones((0, 4))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].shape == (0, 4)


# --- what is refused ------------------------------------------------------------------


def test_bad_input_is_refused():
    params = network()
    with raises(ValueError, "params['conv/bias'] of shape (3,) is not a matrix"):
        ORTHOGONAL.init({"conv": {"bias": jnp.ones(3)}})
    with raises(TypeError, "matrices must be a function of (path, leaf), got 2"):
        muon_madam(matrices=2)
    with_axes = lambda axes: muon_madam(
        matrices=lambda path, leaf: axes if "w" in path else None
    )
    for axes in ((0, 1), ((0,), (1,)), "io", 1):
        with raises(
            TypeError, "matrices returned", "['mlp/w']", "MatrixDimensionNumbers"
        ):
            with_axes(axes).init(params)
    for axes in ((0, 0), (0, 2), ((0, 1), ()), (0, -2), (0, 1.0), ((0, 0), 1)):
        with raises(ValueError, "has shape (16, 24)", "output_axis must be different"):
            with_axes(MatrixDimensionNumbers(*axes)).init(params)
    with raises(ValueError, "b1 must satisfy 0 <= b1 < 1, or None, got 1.0"):
        muon_madam(b1=1.0)
    with raises(ValueError, "learning_rate must satisfy"):
        muon_madam(-0.1)
    with raises(TypeError, "inner must be an optax.GradientTransformation"):
        madax.transforms.with_dequantized_params(optax.adam)
    with raises(ValueError, "updates and state.mu must have the same tree structure"):
        ORTHOGONAL.update(jnp.ones((2, 2)), ORTHOGONAL.init({"a": jnp.ones((2, 2))}))
    with raises(TypeError, "state must be a ScaleByOrthogonalMomentumState"):
        ORTHOGONAL.update(jnp.ones((2, 2)), ())
