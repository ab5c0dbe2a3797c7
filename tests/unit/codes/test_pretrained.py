"""Pretrained weights: outliers and heavy tails never change without a warning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mostly_nightly

import madax
from madax import LogFormat, SymlogFormat, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")


def outlier():
    """A thousand weights of rms 0.025, but for one of 0.5."""
    w = np.random.default_rng(0).choice([-0.025, 0.025], 1000)
    w[7] = 0.5
    return {"dense": {"kernel": jnp.asarray(w.reshape(40, 25), jnp.float32)}}


def heavy_tailed(shape=(300, 200)):
    return jnp.asarray(np.random.default_rng(1).standard_t(3, shape), jnp.float32)


def step(tx, params, sign=1.0):
    grads = jax.tree.map(lambda w: jnp.full(w.shape, sign), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def relative_error(q, w):
    values, w = np.float64(q.dequantize()), np.float64(w)
    return np.linalg.norm(values - w) / np.linalg.norm(w)


ALIASES = {
    "madam": madax.madam,
    "bbit_madam": madax.papers.bbit_madam,
    "lns_madam": madax.papers.lns_madam,
}


@pytest.mark.parametrize("make", ALIASES.values(), ids=ALIASES)
def test_a_step_moves_an_outlier_as_any_weight(make):
    params = outlier()
    for sign in (1.0, -1.0):
        after = step(make(0.01), params, sign)["dense"]["kernel"]
        ratio = np.abs(after / params["dense"]["kernel"])
        assert np.all((ratio > 0.98) & (ratio < 1.02))
    # The bound stays.
    tx = madax.madam(0.01)
    state = tx.init(params)
    far = step(optax.chain(madax.clip_log_weights()), params, 9.0)
    assert np.max(far["dense"]["kernel"]) == 0.5
    np.testing.assert_allclose(state.geometry.peak0, [0.5])


@pytest.mark.parametrize(
    "make", [*ALIASES.values(), madax.clip_log_weights], ids=[*ALIASES, "clip"]
)
def test_a_bound_that_clips_says_what_and_how_much(make):
    params = outlier() | {"small": jnp.full((4, 4), 0.1)}
    with pytest.warns(UserWarning) as record:
        make(p_scale=3.0).init(params)
    (warning,) = record
    text = str(warning.message)
    assert text.startswith("params['dense/kernel'] (0.1 %): ")
    assert "beyond p_scale" in text and "leave p_scale at None" in text
    jax.jit(make(p_scale=3.0).init)(params)  # where values are unknown
    make(p_scale=21.0).init(params)
    make(p_scale=1.0).init({"small": params["small"]})  # at the bound is within it


def test_a_bound_of_many_leaves_warns_once_and_names_the_first():
    params = {f"layer_{i:02}": outlier()["dense"]["kernel"] for i in range(20)}
    with pytest.warns(UserWarning) as record:
        madax.clip_log_weights(3.0).init(params)
    (warning,) = record
    assert warning.filename == __file__
    text = str(warning.message)
    assert "layer_00" in text and "layer_07" in text and "layer_08" not in text
    assert "and 12 more" in text


def test_codes_that_are_clipped_are_named():
    params = outlier() | {"also": heavy_tailed()}
    with pytest.warns(UserWarning) as record:
        q = madax.quantize_params(params, SymlogFormat(8), p_scale=3.0)
    (warning,) = record
    assert warning.filename == __file__
    text = str(warning.message)
    share = 100 * np.mean(np.abs(params["also"]) > q["also"].scale)
    assert f"params['also'] ({share:.3g} %), params['dense/kernel'] (0.1 %): " in text
    assert "leave p_scale at None" in text
    jax.jit(lambda p: madax.quantize_params(p, SymlogFormat(8), p_scale=3.0))(params)


# (format, error of a whole leaf, error with a scale a channel)
ERRORS = [
    (SymlogFormat(8), 0.1, 0.02),
    (UniformFormat(8), 0.2, 0.03),
    (LogFormat(8), 0.1, 0.04),
    (SymlogFormat(16), 1e-3, 1e-4),
    (UniformFormat(16), 1e-3, 2e-4),
    (LogFormat(16), 1e-3, 1e-4),
]


@pytest.mark.parametrize(
    ("fmt", "whole", "by_channel"), mostly_nightly(ERRORS, *ERRORS[:2]), ids=repr
)
def test_codes_of_heavy_tails_keep_their_norm(fmt, whole, by_channel):
    w = heavy_tailed()
    assert np.max(np.abs(w)) > 20 * np.sqrt(np.mean(w**2))
    error = relative_error(madax.quantize_params(w, fmt), w)
    with pytest.warns(UserWarning, match="beyond p_scale"):
        of_the_paper = relative_error(madax.quantize_params(w, fmt, p_scale=3.0), w)
    fine = relative_error(madax.quantize_params(w, fmt, channel_axis=-1), w)
    assert fine < by_channel < whole and error < whole
    assert of_the_paper > 0.3 > by_channel


def test_codes_that_lose_much_of_a_leaf_are_named():
    """A log format of a narrow range, in which most of such weights are the least."""
    w = heavy_tailed()
    params = {"fine": jnp.clip(w, -3, 3), "tail": w.at[0, 0].set(5 * jnp.max(w))}
    with pytest.warns(UserWarning) as record:
        q = madax.quantize_params(params, LogFormat(8))
    (warning,) = record
    text = str(warning.message)
    error = relative_error(q["tail"], params["tail"])
    assert (
        text.startswith(f"params['tail'] ({100 * error:.3g} %): ")
        and "fine" not in text
    )
    assert "lost in rounding" in text and "channel_axis=-1" in text
    assert warning.filename == __file__
    madax.quantize_params(params, LogFormat(8), channel_axis=-1)
    jax.jit(lambda p: madax.quantize_params(p, LogFormat(8)))(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_scale_of_weights_gives_a_number_that_is_not_one(dtype):
    """The facts that are warned of are found without an overflow."""
    for size in (1e-30, 1e30):
        w = (size * heavy_tailed((40, 30))).astype(dtype)
        q = madax.quantize_params(w, UniformFormat(16), channel_axis=-1)
        assert relative_error(q, w.astype(jnp.float32)) < 0.01


def test_the_bound_matches_the_leaf_under_inject_hyperparams():
    params = outlier()
    for p_scale, largest in ((None, 0.5), (3.0, 0.089)):
        tx = optax.inject_hyperparams(madax.madam)(0.01, p_scale=p_scale)
        state = jax.jit(tx.init)(params)
        assert ("p_scale" in state.hyperparams) == (p_scale is not None)
        grads = jax.tree.map(lambda w: jnp.full(w.shape, -1.0), params)
        updates, _ = jax.jit(tx.update)(grads, state, params)
        after = optax.apply_updates(params, updates)["dense"]["kernel"]
        np.testing.assert_allclose(np.max(after), largest, rtol=0.01)
