"""Leaves that are all zeros: codes of zero, with a scale that training can fill."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    is_quantized,
    jitted_step,
    mostly_nightly,
    needs_hijax,
    normal,
    raises,
    same,
)

import madax
from madax import LogFormat, SymlogFormat, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = SymlogFormat(bits=8)
TREE = {
    "block": {
        "modulation": {"kernel": jnp.zeros((64, 384)), "bias": jnp.zeros(384)},
        "conv": {"kernel": jnp.zeros((3, 3, 8, 16))},
        "depthwise": {"conv_kernel": jnp.zeros((3, 3, 1, 32))},
        "query": {"kernel": jnp.zeros((64, 4, 16)), "w_lora_b": jnp.zeros((4, 64))},
        "out": {"kernel": jnp.zeros((4, 16, 64))},
        "weight": jnp.zeros((32, 8)),  # of PyTorch and Equinox: outputs first
    },
    "pos_embedding": jnp.zeros((1, 50, 64)),
    "dense": {"kernel": normal(64, 64)},
}
FAN_INS = {
    "block/modulation/kernel": 64,
    "block/conv/kernel": 72,
    "block/depthwise/conv_kernel": 9,
    "block/query/kernel": 64,
    "block/query/w_lora_b": 4,
    "block/out/kernel": 64,
    "block/weight": 8,
    "pos_embedding": 64,
}


def coded_by_path(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in flat if is_quantized(leaf)}


def test_a_structure_does_not_depend_on_values():
    quantize = lambda tree: madax.quantize_params(tree, FMT)
    quantized = quantize(TREE)
    random = jax.tree.map(lambda x: normal(*x.shape), TREE)
    assert coded_by_path(quantized).keys() == {*FAN_INS, "dense/kernel"}
    wanted = jax.eval_shape(quantize, TREE)
    for tree in (quantized, quantize(random)):
        assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    same(jax.jit(quantize)(TREE["block"]["query"]), quantized["block"]["query"])
    # So what was saved comes back into the shapes of a model that was never made.
    arrays = madax.to_flat_dict(quantized)
    same(madax.from_flat_dict(arrays, target=wanted), quantized)


@pytest.mark.parametrize("p_scale", [None, 2.0])
@pytest.mark.parametrize("zero_init_scale", [None, 0.25])
def test_the_scale_of_zeros_is_that_of_the_fan_in_or_given(p_scale, zero_init_scale):
    options = {"p_scale": p_scale, "zero_init_scale": zero_init_scale}
    where = lambda path, leaf: path != "dense/kernel" and "bias" not in path
    coded = coded_by_path(madax.quantize_params(TREE, FMT, where=where, **options))
    assert coded.keys() == FAN_INS.keys()
    for path, fan_in in FAN_INS.items():
        rms = zero_init_scale or 1 / math.sqrt(fan_in)
        np.testing.assert_allclose(coded[path].scale, (p_scale or 3) * rms, rtol=1e-6)
        assert not np.any(coded[path].codes)
        assert coded[path].scale.ndim == coded[path].ndim


def test_each_layer_or_channel_of_zeros_has_a_scale():
    w = madax.quantize_params(jnp.zeros((4, 16, 8)), FMT, channel_axis=(0, -1))
    assert w.scale.shape == (4, 1, 8) and np.all(w.scale == w.scale[0, 0, 0])


# --- a grid without steps from zero ---------------------------------------------------


def test_a_log_format_refuses_zeros_that_madam_would_never_move():
    params = {"w": normal(4, 4), "head": jnp.zeros((4, 4))}
    fmt = LogFormat(bits=8)
    with raises(ValueError, "never move in a LogFormat: params['head']", "use a Sym"):
        madax.quantize_params(params, fmt)
    under_jit = jax.jit(lambda p: madax.quantize_params(p, fmt))(params)
    with raises(ValueError, "params['head'] holds codes without a scale"):
        madax.muon_madam().init(under_jit)
    quantized = madax.quantize_params(params, fmt, zero_init_scale=0.1)
    np.testing.assert_allclose(quantized["head"].scale, 0.3, rtol=1e-6)
    grads = jax.tree.map(jnp.ones_like, params)
    moved = {}
    for name, tx in {
        "adam": madax.with_quantized_params(optax.adam(0.1)),
        "madam": madax.madam(0.1),
    }.items():
        moved[name], _ = jitted_step(tx, grads, tx.init(quantized), quantized)
    assert np.all(moved["adam"]["head"].codes < 0)
    assert not np.any(moved["madam"]["head"].codes)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan, "small"])
def test_bad_scales_are_named(bad):
    with raises((ValueError, TypeError), "zero_init_scale"):
        madax.quantize_params(TREE, FMT, zero_init_scale=bad)


# --- they train -----------------------------------------------------------------------

X, TEACHER = normal(128, 16), normal(16, 16, seed=1, scale=0.5)
Y = X + jnp.tanh(X @ TEACHER) @ normal(16, 16, seed=2, scale=0.2)


def residual_loss(params, x, y):
    """The branch ends in a kernel that starts at zero, as in DiT and in LoRA."""
    branch = jnp.tanh(x @ params["in"]["kernel"]) @ params["out"]["kernel"]
    return jnp.mean((x + branch - y) ** 2)


def trained(tx, params, steps=100):
    @jax.jit
    def run(params):
        def one(carry, _):
            value, grads = madax.value_and_grad(residual_loss)(carry[0], X, Y)
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), value

        return jax.lax.scan(one, (params, tx.init(params)), length=steps)[0][0]

    return float(residual_loss(run(params), X, Y))


CASES = {
    "muon": (madax.muon, 0.05, FMT),
    "muon_madam": (madax.muon_madam, 0.1, FMT),
    "muon_madam, 16 bits": (madax.muon_madam, 0.1, SymlogFormat(bits=16)),
    "madam": (madax.madam, 0.1, FMT),
    "adam": (optax.adam, 0.02, UniformFormat(bits=8)),
}


@pytest.mark.parametrize("name", mostly_nightly(CASES, "muon", "adam"))
def test_a_kernel_of_zeros_trains_as_in_float32(name):
    """The bound of 1.15 is met by codes of other kernels, too."""
    params = {
        "in": {"kernel": normal(16, 16, seed=3, scale=0.25)},
        "out": {"kernel": jnp.zeros((16, 16))},
    }
    make, rate, fmt = CASES[name]
    tx = make(optax.cosine_decay_schedule(rate, 100))
    first, floats = float(residual_loss(params, X, Y)), trained(tx, params)
    wrap = madax.with_quantized_params if make is optax.adam else lambda tx: tx
    codes = trained(wrap(tx), madax.quantize_params(params, fmt))
    assert floats < 0.25 * first and codes < 1.15 * floats


@needs_hijax
def test_lifted_zeros_take_the_steps_of_codes():
    params = madax.quantize_params({"out": {"kernel": jnp.zeros((16, 16))}}, FMT)
    grads, tx = {"out": {"kernel": normal(16, 16)}}, madax.muon_madam(0.1)
    expected, _ = jitted_step(tx, grads, tx.init(params), params)
    lifted, tx = madax.hijax.lift(params), madax.hijax.optimizer(tx)
    got, _ = jitted_step(tx, grads, tx.init(lifted), lifted)
    same(madax.hijax.lower(got), expected)
    assert np.any(expected["out"]["kernel"].codes)
