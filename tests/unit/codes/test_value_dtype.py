"""The dtype that codes decode to is static: the dtype of the quantised leaf."""

import io
import pickle

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import abstract, restore, save
from flax import serialization
from helpers import jitted_step, needs_hijax, normal, raises, same

import madax
from madax import MomentFormat, SymlogFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = SymlogFormat(bits=8)
FLOATS = {"w": normal(16, 16), "b": jnp.ones(16)}
HALVES = jax.tree.map(lambda x: x.astype(jnp.bfloat16), FLOATS)
X = normal(4, 16, seed=1)


def half():
    return madax.quantize_params(HALVES, FMT)


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"])).astype(jnp.float32)


def test_a_model_stays_in_the_dtype_it_was_in():
    quantized, x = half(), X.astype(jnp.bfloat16)
    w = quantized["w"]
    exact = madax.quantize_params(HALVES, FMT, dtype=jnp.float32)["w"]
    assert exact.dtype == np.float32 and w.dtype == w[0].dtype == jnp.bfloat16
    values = np.asarray(exact.dequantize()).astype(jnp.bfloat16)  # by NumPy
    for got in (w.dequantize(), w[...], jnp.asarray(w), w.T.T):
        same(jnp.asarray(got), jnp.asarray(values))
    decoded = madax.dequantize_params(quantized)
    got = jax.jit(madax.value_and_grad(loss))(quantized, x)
    same(got, jax.jit(jax.value_and_grad(loss))(decoded, x))
    assert got[1]["w"].dtype == (x @ w).dtype == jnp.bfloat16
    # As models keep keys and values: both must have one dtype.
    cache = jnp.zeros((8, 16), jnp.bfloat16)
    jax.jit(lambda w: jax.lax.dynamic_update_slice(cache, x @ w, (0, 0)))(w)
    wide = madax.grad(loss, dtype=jnp.float32)(quantized, x)
    assert wide["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("of", "dtype", "wanted"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.float16, None, jnp.float16),
        (jnp.float8_e4m3fn, None, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float16, jnp.float16),
    ],
    ids=str,
)
def test_the_argument_or_the_leaf_says_it(of, dtype, wanted):
    leaf = FLOATS["w"].astype(of)
    w = madax.quantize_params(leaf, FMT, dtype=dtype)
    assert w.value_dtype == w.dtype == wanted
    same(w.codes, madax.quantize_params(leaf.astype(jnp.float32), FMT).codes)
    # Codes of codes keep theirs, unless there is an argument.
    again = madax.quantize_params(w, SymlogFormat(bits=16))
    assert again.dtype == wanted
    changed = madax.quantize_params(w, FMT, dtype=jnp.float16)
    assert changed.dtype == jnp.float16
    same(changed.codes, w.codes)


def test_other_dtypes_are_refused():
    with raises(TypeError, "dtype must be"):
        madax.quantize_params(FLOATS, FMT, dtype=jnp.int8)


TRAINERS = {
    "madam": madax.madam(0.05),
    "muon": madax.muon(0.05, moment_format=MomentFormat(8)),
    "muon_madam": madax.muon_madam(0.05, moment_format=MomentFormat(8)),
    "adam": madax.with_quantized_params(optax.adam(0.05), error_feedback=True),
    "direction": optax.chain(
        madax.transforms.with_dequantized_params(optax.adam(0.05)),
        madax.scale_by_sign_log(),
        madax.lns_quantize(),
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_an_optimizer_computes_in_float32_all_the_same(name):
    """The same gradients give the same codes and states, to the bit."""
    tx, after = TRAINERS[name], []
    grads = {"w": normal(16, 16, seed=2).astype(jnp.bfloat16), "b": jnp.ones(16)}
    for dtype in (jnp.bfloat16, jnp.float32):
        params = madax.quantize_params(FLOATS, FMT, dtype=dtype)
        state = tx.init(params)
        for _ in range(3):
            params, state = jitted_step(tx, grads, state, params)
        assert params["w"].dtype == dtype
        after.append((params["w"].codes, params["b"], jax.tree.leaves(state)))
    same(*after)


def by_npz(tree):
    file = io.BytesIO()
    np.savez(file, **madax.to_flat_dict(tree))
    file.seek(0)
    with np.load(file) as arrays:
        return madax.from_flat_dict(arrays)


def by_orbax(tree, path):
    save(path, tree)
    whole = restore(path, abstract(tree))
    same(madax.from_flat_dict(restore(path)), whole)
    return whole


def by_export(tree):
    exported = jax.export.export(jax.jit(lambda tree: tree))(tree)
    return jax.export.deserialize(exported.serialize()).call(tree)


WAYS = {
    "npz": by_npz,
    "orbax": by_orbax,
    "flax": lambda tree: serialization.from_bytes(tree, serialization.to_bytes(tree)),
    "pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
    "export": by_export,
}


@pytest.mark.parametrize("way", WAYS)
def test_files_keep_it(way, tmp_path):
    tree = half()
    path = (tmp_path / "saved",) if way == "orbax" else ()
    same(WAYS[way](tree, *path), tree)


def test_names_of_float32_are_the_old_ones():
    wide = madax.quantize_params(FLOATS, FMT)
    assert f"w/codes:{FMT!r}" in madax.to_flat_dict(wide)
    assert f"w/codes:bfloat16:{FMT!r}" in madax.to_flat_dict(half())
    with raises(ValueError, "codes were saved as"):
        serialization.from_bytes(half(), serialization.to_bytes(wide))


@needs_hijax
def test_lifted_codes_keep_it():
    lifted = madax.hijax.lift(half())
    assert lifted["w"].dtype == jnp.bfloat16
    same(madax.hijax.lower(lifted), half())
    assert madax.hijax.lift(half(), jnp.float32)["w"].dtype == jnp.float32


def test_layers_compute_in_it():
    layers = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), HALVES)
    tree = {"ends": {"b": jnp.ones(16)}, "layers": layers}
    tree = madax.quantize_params(
        tree, FMT, channel_axis=0, where=lambda path, x: x.ndim == 3
    )
    seen = []

    def layer(one, x):
        seen.append((one["w"].dtype, (x @ one["w"]).dtype))
        return jnp.tanh(x @ one["w"])

    init, step = madax.layerwise(
        madax.madam(0.05),
        embed=lambda ends, batch: batch,
        layer=layer,
        loss=lambda ends, x, batch: jnp.sum(x * ends["b"]),
    )
    new, *_ = jax.jit(step)(tree, init(tree), X.astype(jnp.bfloat16))
    assert {str(dtype) for pair in seen for dtype in pair} == {"bfloat16"}
    assert new["layers"]["w"].dtype == jnp.bfloat16
