"""Diagnostics against NumPy, eager and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import mostly_nightly, raises

import madax
from madax import diagnostics

pytestmark = pytest.mark.usefixtures("quick_compiles")


def tree(seed, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": np.asarray(scale * rng.standard_normal((7, 5)), dtype)},
        "gain": np.asarray(scale * rng.standard_normal(()), dtype),
        "rest": [np.asarray(scale * rng.standard_normal(11), dtype)],
    }


PATHS = ["dense/kernel", "gain", "rest/0"]


def leaves64(params):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]


def norm(x):
    return np.sqrt(np.sum(x**2))


@pytest.fixture(params=mostly_nightly(["eager", "jit"], "jit"))
def compiled(request):
    return (lambda f: f) if request.param == "eager" else jax.jit


def assert_by_path(got, want, rtol=1e-6):
    assert list(got) == PATHS
    for path, value in zip(PATHS, want, strict=True):
        np.testing.assert_allclose(got[path], value, rtol=rtol, err_msg=path)


def test_all_lists_every_public_function():
    functions = {
        name
        for name, value in vars(diagnostics).items()
        if getattr(value, "__module__", "") == diagnostics.__name__
        and not name.startswith("_")
    }
    assert functions <= set(diagnostics.__all__)


SCALES = [(1e-30, 1e-32), (1.0, 1e-3), (1e30, 1e30), (1e-20, 1e10), (3e37, 3e35)]


@pytest.mark.parametrize(("w_scale", "u_scale"), SCALES)
def test_relative_update_size_matches_numpy(compiled, w_scale, u_scale):
    params, updates = tree(0, w_scale), tree(1, u_scale)
    want = [
        norm(u) / norm(w)
        for w, u in zip(*map(leaves64, (params, updates)), strict=True)
    ]
    got = compiled(diagnostics.relative_update_size)(params, updates)
    assert_by_path(got, want)


RELATIVE_SIZES = {
    "zero update": (np.ones(3), np.zeros(3), 0),
    "leaves zero": (np.zeros(3), np.ones(3), np.inf),
    "stays zero": (np.zeros(3), np.zeros(3), 0),
    "one of many": (np.full(100, 2.0), np.eye(100)[0], 1 / 20),
    "largest floats": (np.full(100, 3e38), np.full(100, 3e36), 0.01),
    "empty": (np.zeros(0), np.zeros(0), 0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_size_of_a_step_of_codes_does_not_depend_on_their_dtype(dtype):
    w = np.random.default_rng(0).standard_normal((32, 32))
    q = madax.quantize_params(jnp.asarray(w, dtype), madax.SymlogFormat(16))
    u = madax.QuantizedArray.steps(jnp.ones(q.shape, jnp.int32), *q.kind)
    new, old = (
        np.asarray(x.dequantize(jnp.float32), np.float64)
        for x in (optax.apply_updates(q, u), q)
    )
    found = diagnostics.relative_update_size({"w": q}, {"w": u})["w"]
    expected = np.linalg.norm(new - old) / np.linalg.norm(old)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", RELATIVE_SIZES)
def test_relative_update_size_by_hand(compiled, name):
    w, u, want = RELATIVE_SIZES[name]
    params, updates = {"w": np.float32(w)}, {"w": np.float32(u)}
    got = compiled(diagnostics.relative_update_size)(params, updates)
    np.testing.assert_allclose(got["w"], want, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", mostly_nightly([np.float32, jnp.bfloat16, np.float16], jnp.bfloat16)
)
@pytest.mark.filterwarnings("ignore:.*beyond p_scale", "ignore:.*at their bound")
@pytest.mark.parametrize("p_scale", mostly_nightly([None, 0.5, 1.0, 3.0], 0.5))
def test_fraction_at_bound_matches_numpy(compiled, p_scale, dtype):
    params = tree(0, dtype=dtype)
    tx = madax.madam(0.5, p_scale=p_scale)
    state = tx.init(params)
    bounds = [oracle.bound(w, p_scale) for w in leaves64(params)]
    for seed in range(1, 4):
        updates, state = tx.update(tree(seed, dtype=dtype), state, params)
        params = optax.apply_updates(params, updates)
    want = [
        np.mean(np.abs(w) >= (1 - 2**-6) * b)
        for w, b in zip(leaves64(params), bounds, strict=True)
    ]
    assert any(0 < fraction < 1 for fraction in want)
    count = compiled(diagnostics.fraction_at_bound)
    assert_by_path(count(params, state), want)


STATES = {
    "no state": (),
    "another transform": madax.scale_by_sign_log().init(jnp.ones(2)),
    "other params": madax.madam().init([jnp.ones(2), jnp.ones(3)]),
    "two of them": (madax.madam().init(jnp.ones(2)),) * 2,
    "muon beside madam": (
        madax.muon().init(jnp.ones(2)),
        madax.madam().init([jnp.ones(2), jnp.ones(3)]),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_fraction_at_bound_without_the_state(name):
    with pytest.raises(ValueError, match="the bounds of the 1 leaves of floats"):
        diagnostics.fraction_at_bound(jnp.ones(2), STATES[name])


def test_fraction_at_bound_where_no_float_is_bounded():
    """There the max of the dtype is the bound."""
    params = {"w": jnp.array([[1.0, 3e38], [-3.39e38, 0.0]]), "b": jnp.ones(3)}
    for state in (None, madax.muon().init(params)):
        at_bound = diagnostics.fraction_at_bound(params, state)
        assert at_bound == {"b": 0, "w": 0.25}


def with_zeros(seed, share):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w: np.where(rng.random(w.shape) < share, 0, w).astype(w.dtype),
        tree(seed),
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_fraction_zero_matches_numpy(compiled, share):
    params = with_zeros(0, share)
    want = [np.mean(w == 0) for w in leaves64(params)]
    assert_by_path(compiled(diagnostics.fraction_zero)(params), want)


def test_fraction_sign_changed_matches_numpy(compiled):
    params, previous = with_zeros(0, 0.3), with_zeros(1, 0.3)
    want = [
        np.mean(np.sign(w) != np.sign(p))
        for w, p in zip(*map(leaves64, (params, previous)), strict=True)
    ]
    assert any(0 < fraction < 1 for fraction in want)
    got = compiled(diagnostics.fraction_sign_changed)(params, previous)
    assert_by_path(got, want)


TWO_TREES = [diagnostics.relative_update_size, diagnostics.fraction_sign_changed]


@pytest.mark.parametrize("function", TWO_TREES)
def test_trees_must_match(function):
    with pytest.raises(ValueError, match="same tree structure"):
        function(tree(0), {"gain": jnp.ones(())})
    other = {**tree(0), "gain": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"updates\['gain'\] has shape \(3,\)"):
        function(tree(0), other)


ONE_TREE = {
    "fraction_zero": (lambda p: diagnostics.fraction_zero(p)["b"], 0.0),
    "fraction_sign_changed": (
        lambda p: diagnostics.fraction_sign_changed(p, p)["b"],
        0.0,
    ),
    "relative_update_size": (
        lambda p: diagnostics.relative_update_size(p, p)["b"],
        1.0,
    ),
}


@pytest.mark.parametrize("name", ONE_TREE)
@pytest.mark.parametrize("scalar", [0.5, np.float64(0.5)], ids=repr)
def test_scalars_that_are_no_arrays(name, scalar):
    function, want = ONE_TREE[name]
    np.testing.assert_allclose(function({"b": scalar}), want)


@pytest.mark.parametrize(
    "dtype", mostly_nightly(["float16", "bfloat16", "float32"], "float16")
)
def test_count_skipped_is_what_the_optimizer_skips(dtype):
    g = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.0, -3.0, 6e4], dtype)
    huge = {"float16": 0, "bfloat16": 1e25, "float32": -1e25}[dtype]
    grads = {"w": jnp.append(g, jnp.asarray(huge, dtype)), "b": jnp.ones(3, dtype)}
    counts = jax.jit(diagnostics.count_skipped)(grads)
    assert {k: int(v) for k, v in counts.items()} == {"w": 3 + bool(huge), "b": 0}

    params = jax.tree.map(jnp.ones_like, grads)
    tx = madax.madam(0.1)
    _, state = tx.update(grads, tx.init(params), params)
    skipped = jnp.sum(state.direction.nu["w"] == 0) - jnp.sum(grads["w"] == 0)
    assert counts["w"] == skipped


@pytest.mark.parametrize(
    ("bits", "b2", "b1"),
    mostly_nightly(
        [(8, 0.999, 0.95), (12, 0.9, None), (8, 0.5, 0.95), (None, 0.9, None)],
        (8, 0.999, 0.95),
        (None, 0.9, None),
    ),
)
@pytest.mark.parametrize("alias", [madax.muon_madam, madax.muon])
def test_count_skipped_agrees_with_what_each_direction_skips(alias, bits, b2, b1):
    fmt = None if bits is None else madax.MomentFormat(bits)
    tx = alias(0.01, b1=b1, b2=b2, moment_format=fmt)
    params = {"w": (8, 8), "bias": 64, "embedding": (8, 9), "lm_head": (8, 9)}
    params = {k: jnp.ones(shape) for k, shape in params.items()}
    rng = np.random.default_rng(0)
    rest = {k: rng.standard_normal((20, *x.shape)) for k, x in params.items()}
    # Two outliers, of which floats skip none, one that overflows, one that is NaN.
    odd = {k: rng.standard_normal(x.shape) for k, x in params.items()}
    odd["w"] = np.full((8, 8), 1e30)
    odd["w"][0, 0], odd["lm_head"][0, :2] = np.nan, (1e30, np.nan)
    odd["embedding"][0, :4] = odd["bias"][:4] = 1e6, -2e4, 1e30, np.nan

    @jax.jit
    def run(rest, odd):
        state, _ = jax.lax.scan(
            lambda state, g: (tx.update(g, state, params)[1], None),
            tx.init(params),
            rest,
        )
        updates, state = tx.update(odd, state, params)
        return updates, diagnostics.count_skipped(odd, state, b2=b2)

    updates, counts = run(*jax.tree.map(jnp.float32, (rest, odd)))
    skipped = 2 if bits is None or b2 < 0.75 else 4
    for name in ("bias", "embedding"):
        assert counts[name] == np.sum(updates[name] == 0) == skipped
    # Muon's last layer has a momentum, which moves what the gradient skips.
    moved = np.sum(updates["lm_head"] == 0) == 0
    assert counts["lm_head"] == 2 and moved == (alias is madax.muon)
    if b1 is None:  # Without a momentum there is a second moment, of rows and columns.
        assert counts["w"] == np.sum(updates["w"] == 0) == 64
    else:
        assert counts["w"] == 1 and np.all(updates["w"] != 0)


def test_count_skipped_wants_the_state_of_these_gradients():
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    matrix = {"w": params["w"]}
    beside = {"a": madax.muon(b1=None).init(matrix), "b": optax.adam(0.1).init(matrix)}
    for state in (madax.madam().init(matrix), optax.adam(0.1).init(params), beside):
        with raises(ValueError, "must hold a moment", "pass the state"):
            diagnostics.count_skipped(params, state)


def test_count_skipped_names_a_leaf_that_is_no_gradient():
    with pytest.raises(TypeError, match=r"grads\['w'\]"):
        diagnostics.count_skipped({"w": jnp.arange(3)})
