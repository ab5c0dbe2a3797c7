"""Codes in trees: quantize_params, dequantize_params and QuantizedArray itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS, SOME
from helpers import is_quantized, normal
from oracle import encode

import madax
from madax import LogFormat, QuantizedArray, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = FORMATS["log8"]


def kinds(tree):
    """Which leaves are codes, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): is_quantized(leaf) for path, leaf in leaves}


@pytest.mark.filterwarnings("ignore:.*beyond p_scale")
@pytest.mark.parametrize(
    ("fmt", "channel_axis", "p_scale"),
    [
        *((fmt, None, 3.0) for fmt in SOME.values()),
        *((FMT, axis, None) for axis in (None, 0, -1, (0, -1))),
        (FMT, 0, 1.0),
    ],
)
def test_codes_and_scales_follow_the_formula(fmt, channel_axis, p_scale):
    w = normal(20, 30) * jnp.exp(normal(30, seed=1))
    q = madax.quantize_params(w, fmt, p_scale=p_scale, channel_axis=channel_axis)
    axes = {None: None, 0: 1, -1: 0, (0, -1): ()}[channel_axis]
    rms = np.sqrt(np.mean(np.float64(w) ** 2, axis=axes, keepdims=True))
    peak = np.max(np.abs(w), axis=axes, keepdims=True)
    scale = np.maximum(3 * rms, peak) if p_scale is None else p_scale * rms
    assert q.scale.shape == np.shape(scale) and q.scale.dtype == jnp.float32
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    assert q.codes.dtype == fmt.storage_dtype
    exact = encode(fmt, w / scale)
    no_tie = np.abs(exact - np.floor(exact) - 0.5) > 0.01
    np.testing.assert_array_equal(np.asarray(q.codes)[no_tie], np.rint(exact)[no_tie])
    assert np.mean(no_tie) > 0.95
    values = q.dequantize()
    expected = np.asarray(q.scale) * np.asarray(fmt.decode(q.codes))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    again = madax.quantize_params(values, fmt, p_scale=p_scale)
    assert again.codes.shape == q.codes.shape


def test_codes_beside_the_mark_of_steps_are_no_array():
    q = madax.quantize_params(normal(4, 4), FMT)
    treedef = jax.tree.structure(q)
    steps = jnp.zeros((4, 4), FMT.step_dtype)
    assert isinstance(treedef.unflatten([steps, False]), madax.QuantizedArray)
    with pytest.raises(TypeError, match="the codes of a QuantizedArray became int8"):
        treedef.unflatten([q.codes, False])


def test_matrices_of_some_size_are_quantised_by_default():
    params = {
        "kernel": normal(4, 4),
        "conv": normal(3, 3, 1, 8),
        "half": normal(8, 8).astype(jnp.bfloat16),
        "small": normal(3, 5),
        "bias": normal(100),
        "vector": normal(100),
        "gain": jnp.float32(1),
        "steps": jnp.zeros((8, 8), jnp.int32),
        "mask": jnp.ones((8, 8), bool),
        "spectrum": jnp.ones((8, 8), jnp.complex64),
        "done": madax.quantize_params(normal(4, 4), UniformFormat(8)),
    }
    quantized = madax.quantize_params(params, FMT)
    chosen = {name for name, codes in kinds(quantized).items() if codes}
    assert chosen == {"kernel", "conv", "half", "done"}
    for name in set(params) - chosen:
        assert quantized[name].dtype == params[name].dtype
        np.testing.assert_array_equal(quantized[name], params[name])


def test_where_sees_paths_and_leaves():
    params = {"Dense_0": {"kernel": normal(4, 4), "bias": normal(4)}, "x": normal()}
    seen = []

    def where(path, leaf):
        seen.append((path, leaf.shape))
        return path.endswith("bias") or leaf.ndim == 0

    quantized = madax.quantize_params(params, FMT, where=where)
    assert sorted(seen) == [
        ("Dense_0/bias", (4,)),
        ("Dense_0/kernel", (4, 4)),
        ("x", ()),
    ]
    assert kinds(quantized) == {
        "Dense_0/bias": True,
        "Dense_0/kernel": False,
        "x": True,
    }
    assert quantized["x"].shape == ()
    np.testing.assert_allclose(quantized["x"].dequantize(), params["x"], rtol=0.03)


@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (0,), (2, 3, 4)], ids=str)
def test_codes_keep_the_shape(shape):
    q = madax.quantize_params(jnp.ones(shape), FMT, where=lambda path, w: True)
    assert (q.shape, q.ndim, q.size) == (shape, len(shape), int(np.prod(shape)))
    assert q.dequantize().shape == shape
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_dequantize_params_decodes_codes_alone():
    params = {"w": normal(4, 4), "b": jnp.zeros(4, jnp.float16), "n": jnp.int32(3)}
    quantized = madax.quantize_params(params, FMT)
    plain = madax.dequantize_params(quantized)
    dtypes = {k: x.dtype.name for k, x in plain.items()}
    assert dtypes == {"w": "float32", "b": "float16", "n": "int32"}
    assert plain["b"] is quantized["b"]
    half = madax.dequantize_params(quantized, jnp.bfloat16)
    dtypes = {k: x.dtype.name for k, x in half.items()}
    assert dtypes == {"w": "bfloat16", "b": "bfloat16", "n": "int32"}
    error = np.abs(np.log(plain["w"] / params["w"]))
    assert np.max(error[np.abs(params["w"]) > 0.01]) < 0.51 * FMT.base_step
    # A fixed point: what is on the grid stays there.
    scale = quantized["w"].scale[0, 0] / jnp.sqrt(jnp.mean(plain["w"] ** 2))
    again = madax.quantize_params(plain, FMT, p_scale=float(scale))
    np.testing.assert_array_equal(again["w"].codes, quantized["w"].codes)


def test_an_exact_zero_stays_zero():
    w = normal(8, 8) * (normal(8, 8, seed=1) > 0)
    for fmt in SOME.values():
        q = madax.quantize_params(w, fmt)
        assert np.all(np.asarray(q.codes)[np.asarray(w) == 0] == 0)
        assert np.all(np.asarray(q.dequantize())[np.asarray(w) == 0] == 0)
        if isinstance(fmt, LogFormat):
            np.testing.assert_array_equal(np.sign(q.codes), np.sign(w))


def test_quantizing_under_jit_and_vmap_is_quantizing():
    w = normal(3, 8, 8)
    quantize = lambda w: madax.quantize_params(w, FMT)
    one_by_one = [quantize(x) for x in w]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    for batched in (jax.vmap(quantize)(w), jax.jit(jax.vmap(quantize))(w)):
        np.testing.assert_allclose(batched.scale, stacked.scale, rtol=1e-6)
        differ = np.asarray(batched.codes) != np.asarray(stacked.codes)
        assert np.mean(differ) < 0.01
    values = jax.vmap(lambda q: q.dequantize())(stacked)
    np.testing.assert_allclose(values[1], one_by_one[1].dequantize(), rtol=1e-6)


def test_a_quantized_array_is_a_pytree():
    q = madax.quantize_params(normal(4, 5), FMT)
    leaves, treedef = jax.tree.flatten(q)
    assert [x.shape for x in leaves] == [(4, 5), (1, 1)]
    back = jax.tree.unflatten(treedef, leaves)
    assert is_quantized(back) and back.format == FMT
    other = madax.quantize_params(normal(4, 5), LogFormat(8, 0.05))
    assert jax.tree.structure(q) != jax.tree.structure(other)
    with pytest.raises(ValueError):
        jax.tree.map(jnp.add, q, other)
    paths = jax.tree_util.tree_flatten_with_path({"w": q})[0]
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
    assert names == [f"w/codes:{FMT!r}", "w/scale"]
    # Trees of other things than arrays, as transformations make them.
    shapes = jax.eval_shape(lambda: q)
    assert (shapes.shape, shapes.size, shapes.ndim) == ((4, 5), 20, 2)
    assert "(4, 5)" in repr(shapes)
    mapped = jax.tree.map(lambda x: None, q)
    assert "QuantizedArray" in repr(mapped)


def test_repr_and_nbytes_describe_the_codes():
    q = madax.quantize_params(jnp.full((4, 4), 0.5), FMT)
    assert repr(q) == f"QuantizedArray(shape=(4, 4), scale=1.5, {FMT!r})"
    assert q.nbytes == 16 + 4
    assert q.steps(jnp.zeros((4, 4), jnp.int16), *q.kind).nbytes == 64
    wide = madax.quantize_params(normal(6, 5), LogFormat(9, 0.05), channel_axis=-1)
    assert wide.nbytes == 2 * 30 + 4 * 5
    assert "scale=<(1, 5)>" in repr(wide)
    seen = []
    jax.jit(lambda q: seen.append(repr(q)))(q)
    jax.vmap(lambda q: seen.append(repr(q)))(jax.tree.map(lambda x: x[None], q))
    assert all("QuantizedArray(shape=(4, 4)" in text for text in seen)


def test_code_steps_add_and_leave_the_scale():
    q = madax.quantize_params(normal(4, 4), FMT)
    steps = QuantizedArray(jnp.ones_like(q.codes), jnp.zeros_like(q.scale), FMT)
    moved = optax.apply_updates({"w": q}, {"w": steps})["w"]
    np.testing.assert_array_equal(moved.codes, q.codes + 1)
    assert moved.scale == q.scale
    assert moved.codes.dtype == jnp.int8 and moved.scale.dtype == jnp.float32
