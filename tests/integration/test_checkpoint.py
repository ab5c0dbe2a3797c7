"""Checkpoints of codes: bit for bit, and never read as another format's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS, SOME
from checkpoints import abstract, restore, save
from helpers import different, mostly_nightly

import madax
from madax import LogFormat, MomentFormat, QuantizedArray, SymlogFormat, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")


def make(fmt, channel_axis=None):
    rng = np.random.default_rng(0)
    params = {
        "Dense_0": {"kernel": jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)},
        "bias": jnp.zeros(6),
    }
    return madax.quantize_params(params, fmt, channel_axis=channel_axis)


TX = madax.madam(0.05, moment_format=MomentFormat(8), seed=5)


@jax.jit
def step(params, state, seed):
    decoded = madax.dequantize_params(params)
    grads = jax.tree.map(lambda w: jnp.cos(100 * w + seed), decoded)
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def trained(fmt, channel_axis=None):
    params = make(fmt, channel_axis)
    state = TX.init(params)
    for seed in range(3):
        params, state = step(params, state, seed)
    return {"params": params, "state": state}


@pytest.mark.parametrize(
    ("name", "channel_axis"),
    mostly_nightly(
        [*((name, None) for name in SOME), ("log8", -1)],
        ("log8", -1),
    ),
)
def test_codes_scales_formats_and_state_come_back(tmp_path, name, channel_axis):
    fmt = SOME[name]
    tree = trained(fmt, channel_axis)
    save(tmp_path / "tree", tree)
    restored = restore(tmp_path / "tree", abstract(tree))
    assert different(restored, tree) == []
    kernel = restored["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, QuantizedArray) and kernel.format == fmt
    # And training goes on as if nothing had happened.
    assert different(step(**restored, seed=9), step(**tree, seed=9)) == []


FLOAT = {"Dense_0": {"kernel": False}, "bias": True}
NO_FLOATS = {
    "all codes": (TX, lambda params: params["Dense_0"]),
    "partition": (
        optax.partition(
            {"codes": TX, "floats": optax.adam(0.1)},
            jax.tree.map(lambda is_float: "floats" if is_float else "codes", FLOAT),
        ),
        lambda params: params,
    ),
    "masked": (
        optax.masked(TX, jax.tree.map(lambda is_float: not is_float, FLOAT)),
        lambda params: params,
    ),
    "no leaf at all": (
        optax.masked(TX, jax.tree.map(lambda is_float: False, FLOAT)),
        lambda params: params,
    ),
}


@pytest.mark.parametrize("name", NO_FLOATS)
def test_states_of_no_float_leaf_come_back(tmp_path, name):
    tx, part = NO_FLOATS[name]
    params = part(make(FORMATS["log8"]))
    grads = jax.tree.map(jnp.ones_like, madax.dequantize_params(params))
    _, state = tx.update(grads, tx.init(params), params)
    save(tmp_path / "tree", state)
    assert different(restore(tmp_path / "tree", abstract(state)), state) == []


def test_codes_come_back_into_a_target_of_arrays(tmp_path):
    tree = trained(FORMATS["log8"])
    save(tmp_path / "tree", tree)
    fresh = make(FORMATS["log8"])
    restored = restore(tmp_path / "tree", {"params": fresh, "state": TX.init(fresh)})
    assert different(restored, tree) == []


OTHERS = {
    "base_step": LogFormat.from_dynamic_range(8, 101),
    "bits": LogFormat(7, FORMATS["log8"].base_step),
    "class": UniformFormat(8),
    "other_class": SymlogFormat(8, FORMATS["log8"].base_step),
    "width": LogFormat(16, 1e-3),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("kind", ["abstract", "arrays"])
def test_a_target_of_another_format_is_refused(tmp_path, other, kind):
    """The format is in the key of the codes, so Orbax finds no such key."""
    tree = {"params": make(FORMATS["log8"])}
    save(tmp_path / "tree", tree)
    target = {"params": make(other)}
    if kind == "abstract":
        target = abstract(target)
    with pytest.raises((ValueError, KeyError)) as error:
        restore(tmp_path / "tree", target)
    assert "codes:" in str(error.value) or "structure" in str(error.value)
    assert different(restore(tmp_path / "tree", abstract(tree)), tree) == []


def test_a_target_of_floats_is_refused(tmp_path):
    save(tmp_path / "tree", {"params": make(FORMATS["log8"])})
    floats = madax.dequantize_params(make(FORMATS["log8"]))
    with pytest.raises((ValueError, KeyError)):
        restore(tmp_path / "tree", abstract({"params": floats}))


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25)])
def test_a_format_is_found_again_however_its_numbers_were_typed(tmp_path, number):
    tree = {"params": make(LogFormat(8, number))}
    save(tmp_path / "tree", tree)
    target = abstract({"params": make(LogFormat(8, 0.25))})
    restored = restore(tmp_path / "tree", target)
    assert different(restored, tree) == []
