"""Diagnostics of quantised and mixed trees, against NumPy on the decoded values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import normal, same
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import enter, make_mesh, needs_explicit_axes

import madax
from madax import diagnostics


@pytest.fixture(params=["log8", "symlog8", "uniform8"])
def run(request):
    """A tree of codes and floats, before and after a step, and the step."""
    key = jax.random.key(0)
    params = {
        "bias": jnp.array([1.0, -2.0, 0.5, 0.0]),
        "kernel": jax.random.normal(key, (16, 4)).at[0, 0].set(9.0),
    }
    params = madax.quantize_params(params, FORMATS[request.param])
    tx = madax.madam(0.1)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, madax.dequantize_params(params))
    updates, state = tx.update(grads, state, params)
    return params, updates, state, optax.apply_updates(params, updates)


def values(params):
    return {k: np.float64(w) for k, w in madax.dequantize_params(params).items()}


def test_sizes_and_fractions_are_taken_of_decoded_values(run):
    params, updates, state, after = run
    before, now = values(params), values(after)
    sizes = jax.jit(diagnostics.relative_update_size)(params, updates)
    changed = jax.jit(diagnostics.fraction_sign_changed)(after, params)
    zero = jax.jit(diagnostics.fraction_zero)(params)
    for k, w in before.items():
        expected = np.linalg.norm(now[k] - w) / np.linalg.norm(w)
        np.testing.assert_allclose(sizes[k], expected, rtol=1e-5)
        assert changed[k] == np.mean(np.sign(now[k]) != np.sign(w))
        assert zero[k] == np.mean(w == 0)
    at_bound = jax.jit(diagnostics.fraction_at_bound)(params, state)
    levels = params["kernel"].format.levels
    assert at_bound["bias"] == 0
    assert at_bound["kernel"] == np.mean(np.abs(params["kernel"].codes) == levels) > 0


def test_code_occupancy_counts_codes(run):
    params = run[0]
    counts = jax.jit(diagnostics.code_occupancy)(params)
    assert list(counts) == ["kernel"]
    codes, fmt = np.asarray(params["kernel"].codes), params["kernel"].format
    for code in range(-fmt.levels, fmt.levels + 1):
        assert counts["kernel"][code + fmt.levels] == np.sum(codes == code)


@needs_explicit_axes
def test_code_occupancy_of_codes_on_a_mesh_of_explicit_axes():
    mesh = make_mesh("explicit")
    w = madax.quantize_params({"w": normal(16, 8)}, FORMATS["symlog8"])
    expected = diagnostics.code_occupancy(w)
    codes = jax.device_put(w["w"].codes, NamedSharding(mesh, P("data", "model")))
    placed = {"w": madax.QuantizedArray(codes, w["w"].scale, w["w"].format)}
    with enter(mesh):
        same(jax.jit(diagnostics.code_occupancy)(placed), expected)


def test_bounds_of_a_tree_of_codes_alone():
    fmt = madax.UniformFormat(bits=8)
    w = jnp.array([[-3.0, 3.0], [1.0, 0.5]]) / 3
    params = {
        "w": madax.QuantizedArray(
            jnp.array([[-127, 127], [1, 0]], jnp.int8), w[0, 1], fmt
        )
    }
    state = madax.madam().init(params)
    assert jax.jit(diagnostics.fraction_at_bound)(params, state)["w"] == 0.5
