"""Dtypes in, through and out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import enable_x64, mostly_nightly, step

import madax
from madax.codes._scales import fraction_above

pytestmark = pytest.mark.usefixtures("quick_compiles")

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def x64_for(dtype):
    return enable_x64(dtype == "float64")


def example_params(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((6, 5)), dtype),
        "b": jnp.zeros(5, dtype),
        "gain": jnp.asarray(1.5, dtype),
    }


def example_grads(dtype, seed):
    grads = example_params(dtype, seed + 1)
    grads["b"] = grads["w"][0]
    return grads


def dtypes(tree):
    return jax.tree.map(lambda x: (x.dtype, x.weak_type), tree)


@pytest.mark.parametrize("dtype", mostly_nightly(DTYPES, "bfloat16", "float64"))
def test_updates_keep_the_dtype_and_states_never_drift(dtype):
    with x64_for(dtype):
        params = example_params(dtype)
        tx = madax.madam(0.05, b1=0.9, floor=0.1)
        state = tx.init(params)
        first, update = dtypes(state), jax.jit(tx.update)
        for step in range(3):
            updates, state = update(example_grads(dtype, step), state, params)
            params = optax.apply_updates(params, updates)
            assert {u.dtype.name for u in jax.tree.leaves(updates)} == {dtype}
            assert dtypes(state) == first
            assert all(np.all(np.isfinite(w)) for w in jax.tree.leaves(params))
        wide = jnp.promote_types(dtype, jnp.float32)
        moments = jax.tree.leaves((state.direction.nu, state.direction.mu))
        assert {m.dtype for m in moments} == {wide}
        for x in jax.tree.leaves(state):
            assert not x.weak_type
            assert not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize >= 4


@pytest.mark.parametrize(
    "tx",
    [
        madax.muon(),
        madax.muon(b1=None),
        madax.muon_madam(b1=None, direction="factored"),
        madax.wrappers.with_stochastic_rounding(optax.adam(0.1)),
    ],
    ids=["muon", "one byte", "factored", "stochastic rounding"],
)
def test_gradients_in_float64_change_no_state_of_float32(tx):
    with enable_x64():
        kernels = {"up": (6, 5), "head": (5, 4)}
        params = {k: {"kernel": jnp.ones(v, jnp.float32)} for k, v in kernels.items()}
        grads = jax.tree.map(lambda w: w.astype(jnp.float64), params)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        assert dtypes(after) == dtypes(state) and dtypes(updates) == dtypes(params)


@pytest.mark.parametrize("dtype", mostly_nightly(DTYPES, "float16", "float64"))
def test_every_dtype_follows_the_oracle(dtype):
    """One step from the same weights errs by roundings of the dtype only."""
    with x64_for(dtype):
        params = example_params(dtype)
        tx = madax.madam(0.05, p_scale=np.inf)
        models = {
            name: oracle.Madam(w, 0.05, p_scale=np.inf) for name, w in params.items()
        }
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(20):
            grads = example_grads(dtype, step)
            updates, state = update(grads, state, params)
            for name, model in models.items():
                w = model.w = np.asarray(params[name], np.float64)
                want = model.step(np.asarray(grads[name])) - w
                # The floor of a leaf of zeros is a float32, in float64 too.
                eps = max(float(jnp.finfo(dtype).eps), 2**-24 if name == "b" else 0)
                got = np.asarray(updates[name], np.float64)
                # The oracle's own cancellations cost it three digits.
                rtol = 4 * eps + 1e-12
                if jnp.finfo(dtype).bits == 16:  # what is rounded is the weight
                    got, want, rtol = w + got, w + want, 1.01 * eps
                np.testing.assert_allclose(got, want, rtol=rtol, atol=eps * 1e-2)
            params = optax.apply_updates(params, updates)


def test_float16_gradients_whose_squares_underflow_float16_still_step():
    w, g = jnp.ones(2, jnp.float16), jnp.array([6e-8, -6e-5], jnp.float16)
    tx = madax.madam(0.1)
    updates, _ = tx.update(g, tx.init(w), w)
    want = np.exp([-0.1, 0.1])
    np.testing.assert_allclose(w + updates, want, rtol=2 * jnp.finfo(w.dtype).eps)


def test_float64_moments_keep_float64_range():
    with enable_x64():
        w = jnp.ones(3)
        tx = madax.madam(0.1)
        updates, state = tx.update(jnp.array([1e-100, -1e100, 0.0]), tx.init(w), w)
        np.testing.assert_allclose(w + updates, np.exp([-0.1, 0.1, 0]), rtol=1e-14)
        assert state.direction.nu.dtype == jnp.float64


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_float64_weights_keep_float64_range(scale):
    with enable_x64():
        w = jnp.array([1.0, -2.0, 0.5]) * scale
        tx = madax.madam(0.1)
        updates, _ = tx.update(jnp.ones(3), tx.init(w), w)
        np.testing.assert_allclose(
            (w + updates) / scale, np.exp([-0.1, 0.1, -0.1]) * [1, -2, 0.5], rtol=1e-14
        )


def test_rms_of_float16_weights_is_not_computed_in_float16():
    w = jnp.full(1000, 300, jnp.float16)  # the sum of squares is 1400 times too large
    np.testing.assert_allclose(madax.clip_log_weights().init(w).rms0, [300], rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        madax.madam(0.1),
        madax.madam(0.1, rounding="nearest"),
        madax.papers.bbit_madam(0.1),
    ],
    ids=["stochastic", "nearest", "grid"],
)
def test_numbers_of_python_are_leaves_without_jit_too(tx):
    params, grads = {"w": 0.5, "b": 0.0}, {"w": 3.0, "b": -1e30}
    state = tx.init(params)
    expected, _ = jax.jit(tx.update)(grads, state, params)
    with jax.disable_jit():
        updates, _ = tx.update(grads, state, params)
    for key in params:
        np.testing.assert_allclose(updates[key], expected[key], rtol=1e-6)


SCALARS = {
    "learning_rate": 0.05,
    "b1": 0.9,
    "b2": 0.99,
    "floor": 0.5,
    "p_scale": 3.0,
    "g_bound": 5.0,
    "weight_decay": 0.1,
    "zero_init_scale": 0.2,
}


@pytest.mark.parametrize(
    "dtype", mostly_nightly(["bfloat16", "float16", "float32"], "bfloat16")
)
def test_numbers_of_numpy_in_x64_mode_train_as_numbers_of_python(dtype):
    """Each is a float64 there, and so is what it is multiplied with."""
    with enable_x64():
        params = {"w": jnp.full((4, 8), 0.5, dtype), "b": jnp.zeros(3, dtype)}
        codes = madax.quantize_params(jnp.ones((4, 8), dtype), madax.LogFormat(8))
        params["codes"] = codes
        grads = {"w": params["w"], "b": params["b"] + 1, "codes": jnp.ones((4, 8))}

        def trained(make, names, scalar, **seed):
            tx, w = make(**{k: scalar(SCALARS[k]) for k in names}, **seed), params
            state, one = jax.jit(tx.init)(w), jax.jit(partial(step, tx))
            for _ in range(2):
                w, state = one(grads, state, w)
            return w, state

        rtol = 4 * float(jnp.finfo(dtype).eps)
        got = trained(madax.madam, SCALARS, np.float64, seed=np.int64(3))
        assert got[0]["w"].dtype == got[0]["b"].dtype == dtype
        assert_alike(got, trained(madax.madam, SCALARS, float, seed=3), rtol)
        few = ("learning_rate", "b2", "p_scale", "g_bound", "zero_init_scale")
        got, want = (
            trained(madax.papers.bbit_madam, few, kind) for kind in (np.float64, float)
        )
        assert_alike(got, want, rtol)


def test_stored_moments_are_the_same_in_x64_mode():
    """There JAX adds up int32 as int64, unless it is told."""
    makers = {
        "muon": lambda: madax.muon(moment_format=madax.MomentFormat(8)),
        "muon_madam": lambda: madax.muon_madam(moment_format=madax.MomentFormat(8)),
        "adam": lambda: madax.with_quantized_state(
            optax.adam(0.01), where=lambda path, leaf: leaf.ndim > 0
        ),
    }

    def trained(make):
        params = {
            "w": jnp.full((4, 8), 0.5, jnp.float32),
            "b": jnp.ones(3, jnp.float32),
        }
        tx, grads = make(), jax.tree.map(jnp.sin, params)
        state, one = jax.jit(tx.init)(params), jax.jit(partial(step, tx))
        for _ in range(2):
            params, state = one(grads, state, params)
        return params, state

    for make in makers.values():
        want = trained(make)
        with enable_x64():
            assert_alike(trained(make), want, 1e-6)


def assert_alike(got, want, rtol):
    """Shapes and dtypes are the same, and values to within a tolerance."""
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=rtol)


@pytest.mark.parametrize("count", [2**31 - 1, 2**31, 2**32, 2**33 + 3])
def test_an_axis_of_any_length_has_an_init_and_a_step(count):
    """Nothing is run: no machine here has so much memory."""
    for shape in ((count,), (3, count, 2)):
        w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        q = jax.eval_shape(
            lambda w: madax.quantize_params(
                w, madax.SymlogFormat(8), where=lambda *_: True
            ),
            w,
        )
        tx = madax.madam(0.1, moment_format=madax.MomentFormat(8))
        for params in (w, q):
            state = jax.eval_shape(tx.init, params)
            updates, _ = jax.eval_shape(tx.update, w, state, params)
            assert updates.shape == shape
        share = jax.eval_shape(fraction_above, w, jax.ShapeDtypeStruct((), jnp.float32))
        assert share.shape == ()
