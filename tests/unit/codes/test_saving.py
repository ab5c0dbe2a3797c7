"""Codes in files of every kind, and in a process that has never seen them."""

import copy
import functools
import io
import pickle
import sys
from pathlib import Path

import checkpoints
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
from cases import FORMATS
from flax import nnx, serialization
from helpers import different, long_run, mostly_nightly, raises

import madax
from madax import MomentFormat, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.tanh(nn.Dense(16)(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        return self.last(self.batch_norm(self.first(x)))


FOUR_BITS = UniformFormat(4)  # An int8 may be beyond their range.
X = jnp.linspace(-1, 1, 8)[None]


@functools.cache
def make(fmt=FORMATS["log8"], channel_axis=None):
    params = jax.jit(Net().init)(jax.random.key(0), X)
    return madax.quantize_params(params, fmt, channel_axis=channel_axis)


@pytest.fixture(scope="module")
def params():
    return make()


def through_a_file(flat):
    file = io.BytesIO()
    np.savez(file, **flat)
    file.seek(0)
    with np.load(file) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("name", "channel_axis"),
    mostly_nightly(
        [("log8", None), ("symlog16", -1), ("uniform8", 0)], ("symlog16", -1)
    ),
)
def test_flat_dictionaries_come_back(name, channel_axis):
    params = make(FORMATS[name], channel_axis)
    flat = madax.to_flat_dict(params)
    assert set(flat) == {
        f"params/Dense_{i}/{part}"
        for i in range(2)
        for part in (f"kernel/codes:{FORMATS[name]!r}", "kernel/scale", "bias")
    }
    arrays = through_a_file(flat)
    assert different(madax.from_flat_dict(arrays), params) == []
    floats = madax.dequantize_params(params)
    shapes = jax.eval_shape(lambda: floats)
    for target in (params, floats, shapes, make(UniformFormat(7))):
        assert different(madax.from_flat_dict(arrays, target), params) == []


def test_trees_of_all_kinds_come_back(params):
    tx = madax.madam(0.1, moment_format=MomentFormat(8))
    tree = [params, tx.init(params), (jnp.ones(3), None)]
    arrays = through_a_file(madax.to_flat_dict(tree))
    assert different(madax.from_flat_dict(arrays, tree), tree) == []
    alone = params["params"]["Dense_0"]["kernel"]
    flat = madax.to_flat_dict(alone)
    assert "scale" in flat
    assert different(madax.from_flat_dict(flat), alone) == []
    assert different(madax.from_flat_dict(flat, alone), alone) == []


def test_nnx_state_is_loaded_into_a_model_in_floats():
    def saved(model):
        return nnx.state(model, (nnx.Param, nnx.BatchStat))

    trained, fresh = (NnxNet(nnx.Rngs(seed)) for seed in (0, 1))
    trained = madax.quantize_params(trained, FORMATS["log8"])
    flat = madax.to_flat_dict(saved(trained))
    assert f"first/kernel/codes:{FORMATS['log8']!r}" in flat
    assert "batch_norm/mean" in flat
    nnx.update(fresh, madax.from_flat_dict(through_a_file(flat), saved(fresh)))
    assert different(saved(fresh), saved(trained)) == []
    np.testing.assert_array_equal(fresh(X), trained(X))


def test_what_does_not_fit_is_named(params):
    flat = madax.to_flat_dict(params)
    codes, scale = (
        f"params/Dense_0/kernel/codes:{FORMATS['log8']!r}",
        "Dense_0/kernel/scale",
    )
    bias = "params/Dense_0/bias"
    without = lambda name: {k: v for k, v in flat.items() if k != name}
    error = lambda match: pytest.raises(ValueError, match=match)
    with error("no 'params/Dense_0/kernel/scale'"):
        madax.from_flat_dict(without(f"params/{scale}"))
    with error(r"'params/Dense_0/bias'\] are missing, none are not wanted"):
        madax.from_flat_dict(without(bias), params)
    with error(r"none are missing, \['other'\] are not wanted"):
        madax.from_flat_dict({**flat, "other": jnp.ones(3)}, params)
    with error(
        r"Dense_0/kernel'\] are missing.*Dense_0/kernel/scale'\] are not wanted"
    ):
        madax.from_flat_dict(without(codes), params)
    with error(r"bias' has shape \(4,\), but \(3,\) in target"):
        madax.from_flat_dict({**flat, bias: jnp.ones(4)}, params)
    with error("two arrays of the tree are called 'a/b'"):
        madax.to_flat_dict({"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}})


def changed(codes=lambda x: x, scale=lambda x: x):
    """The arrays of a leaf in a file, of which a byte was changed."""
    flat = madax.to_flat_dict(make(FOUR_BITS, channel_axis=-1))
    path, name = "params/Dense_0/kernel", repr(FOUR_BITS)
    arrays = {f"{path}/codes:{name}": codes, f"{path}/scale": scale}
    return {k: arrays[k](np.array(v)) for k, v in flat.items() if k in arrays}


def with_first(value):
    def change(x):
        x.flat[0] = value
        return x

    return change


WRONG = {
    "dtype of codes": (
        {"codes": lambda x: x.astype(np.int32)},
        "codes of int32 and a scale of float32, but for UniformFormat(bits=4)",
    ),
    "dtype of a scale": (
        {"scale": lambda x: x.astype(np.float16)},
        "codes of int8 and a scale of float16",
    ),
    "beyond, up": ({"codes": with_first(8)}, "codes beyond 7, the max"),
    "beyond, down": ({"codes": with_first(-128)}, "codes beyond 7, the max"),
    "negative scale": ({"scale": with_first(-1)}, "not positive and finite"),
    "infinite scale": ({"scale": with_first(np.inf)}, "not positive and finite"),
    "no scale": ({"scale": with_first(np.nan)}, "not positive and finite"),
    "shape of a scale": ({"scale": lambda x: x[:, :-1]}, "a scale of shape (1, 2)"),
    "rank of a scale": ({"scale": lambda x: x[None]}, "a scale of shape (1, 1, 3)"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_codes_that_are_none_of_their_format_are_named(case):
    arrays, text = changed(**case[0]), case[1]
    with raises(ValueError, "'params/Dense_0/kernel' has", text):
        madax.from_flat_dict(arrays)
    with raises(ValueError, text):
        madax.from_flat_dict({k: jnp.asarray(v) for k, v in arrays.items()})
    # So they are for flax.serialization, which has no names.
    fresh = make(FOUR_BITS, channel_axis=-1)["params"]["Dense_0"]["kernel"]
    parts = {k.rpartition("/")[2]: v for k, v in arrays.items()}
    with raises(ValueError, "a QuantizedArray has", text):
        serialization.from_state_dict(fresh, parts)


CLASHES = {
    "below, first": {"a/b": jnp.ones(2), "a": jnp.ones(3)},
    "below, second": {"a": jnp.ones(3), "a/b": jnp.ones(2)},
    "far below": {"a/b/c": jnp.ones(2), "a": jnp.ones(3)},
    "beside an empty key": {"": jnp.ones(2), "a": jnp.ones(3)},
    "beside an empty key, first": {"a": jnp.ones(3), "": jnp.ones(2)},
}


@pytest.mark.parametrize("arrays", CLASHES.values(), ids=CLASHES)
def test_nothing_is_dropped_where_names_clash(arrays):
    with raises(ValueError, "is an array, and so is", "pass the target"):
        madax.from_flat_dict(arrays)
    # To the keys of a dictionary, they are no clash.
    target = {key: jnp.zeros_like(x) for key, x in arrays.items()}
    assert different(madax.from_flat_dict(arrays, target), dict(arrays)) == []


def test_an_array_has_one_name_and_codes_one_format():
    with raises(ValueError, "two arrays are called 'a/b'"):
        madax.from_flat_dict({"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}})
    w = {fmt: madax.quantize_params(jnp.ones((4, 4)), fmt) for fmt in FORMATS.values()}
    one, other = (
        madax.to_flat_dict({"w": w[FORMATS[k]]}) for k in ("log8", "uniform8")
    )
    with raises(ValueError, "two leaves 'w', of which one is codes"):
        madax.from_flat_dict(one | other)
    with raises(ValueError, "two leaves 'w', of which one is codes"):
        madax.from_flat_dict(one | {"w": jnp.ones((4, 4))})


# int2 and float4 are missing in JAX 0.6.0.
DTYPES = """
bool int8 int16 int32 uint8 uint16 uint32 int4 uint4 float32 float16 complex64 bfloat16
float8_e4m3fn float8_e5m2 float8_e4m3b11fnuz
"""


def test_every_dtype_comes_back_to_the_bit():
    bits = np.arange(256, dtype=np.uint8)
    tree = {"of": {}, "none": jnp.zeros((0, 3), jnp.bfloat16), "one": jnp.bfloat16(3)}
    for name in DTYPES.split():
        dtype = jnp.dtype(name)
        values = bits.astype(dtype) if "int" in name else bits.view(dtype)
        tree["of"][name] = jnp.asarray(bits < 3 if name == "bool" else values)
    flat = madax.to_flat_dict(tree)
    assert {"of/bfloat16:bfloat16", "one:bfloat16", "of/float32"} < set(flat)
    arrays = through_a_file(flat)
    assert different(madax.from_flat_dict(arrays), tree) == []
    assert different(madax.from_flat_dict(arrays, tree), tree) == []
    by_jax = {name: jnp.asarray(x) for name, x in flat.items()}  # of another library
    assert different(madax.from_flat_dict(by_jax), tree) == []
    alone = jnp.bfloat16([1, -0.0, jnp.nan])
    assert different(madax.from_flat_dict(madax.to_flat_dict(alone)), alone) == []


def test_models_and_states_in_bfloat16_come_back():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16), "b": jnp.zeros(4, jnp.bfloat16)}
    params["codes"] = madax.quantize_params(params["w"], FORMATS["symlog16"])
    tx = madax.with_quantized_params(optax.adam(0.1, mu_dtype=jnp.bfloat16))
    tree = [params, tx.init(params)]
    arrays = through_a_file(madax.to_flat_dict(tree))
    assert different(madax.from_flat_dict(arrays, tree), tree) == []


def test_bfloat16_that_numpy_kept_without_a_name_is_read():
    w = jnp.asarray([1.5, -2, np.nan], jnp.bfloat16)
    arrays = through_a_file({"w": w, "half": np.float16([1, 2])})
    assert arrays["w"].dtype == "V2"
    assert different(madax.from_flat_dict(arrays)["w"], w) == []
    with raises(ValueError, "'w' has the dtype |V1, bytes of no type"):
        madax.from_flat_dict({"w": arrays["w"].view("V1")})


def test_numbers_that_jax_would_round_stay_in_numpy():
    arrays = {"w": np.float64([1 / 3]), "n": np.int64([2**40]), "x": np.float32([1])}
    restored = madax.from_flat_dict(arrays)
    assert different({k: np.asarray(x) for k, x in restored.items()}, arrays) == []
    assert isinstance(restored["x"], jax.Array)


@pytest.mark.parametrize(
    "text",
    [
        "PositFormat(bits=8)",
        "LogFormat(bits=99, base_step=0.1)",
        "LogFormat(bits=8, step=0.1)",
        "UniformFormat(8)",
        "UniformFormat(bits=exit())",
        "UniformFormat()",
    ],
)
def test_codes_of_no_format_are_an_error(text):
    arrays = {f"w/codes:{text}": jnp.ones(3, jnp.int8), "w/scale": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"is not a number format.*has LogFormat"):
        madax.from_flat_dict(arrays)


def test_flax_serialization_keeps_every_bit(params):
    data = serialization.to_bytes(params)
    fresh = jax.tree.map(jnp.zeros_like, params)
    assert different(serialization.from_bytes(fresh, data), params) == []
    without_target = serialization.msgpack_restore(data)
    assert different(madax.from_flat_dict(without_target), params) == []
    with pytest.raises(ValueError, match=r"codes were saved as.*LogFormat.*Uniform"):
        serialization.from_bytes(make(UniformFormat(8)), data)


def test_flax_may_be_imported_after_madax():
    lines = [
        "import sys, jax.numpy as jnp, madax",
        "assert 'flax' not in sys.modules",
        "from flax import serialization",
        "w = madax.quantize_params(jnp.ones((4, 4)), madax.UniformFormat(8))",
        "data = serialization.to_bytes({'w': w})",
        "print(serialization.from_bytes({'w': w}, data)['w'])",
    ]
    (out,) = processes.finish(processes.start("-c", "\n".join(lines)))
    assert out.startswith("QuantizedArray(shape=(4, 4)")


def test_pickles_and_copies_keep_every_bit(params):
    for again in (
        pickle.loads(pickle.dumps(params)),
        copy.deepcopy(params),
        copy.copy(params),
    ):
        assert different(again, params) == []


def restore_with_orbax(path):
    return madax.from_flat_dict(checkpoints.restore(path))


def test_orbax_restores_without_a_target(params, tmp_path):
    checkpoints.save(tmp_path / "orbax", params)
    assert different(restore_with_orbax(tmp_path / "orbax"), params) == []


LOADERS = {
    "orbax": restore_with_orbax,
    "weights.npz": lambda path: madax.from_flat_dict(dict(np.load(path))),
    "weights.msgpack": lambda path: madax.from_flat_dict(
        serialization.msgpack_restore(path.read_bytes())
    ),
    "weights.pickle": lambda path: pickle.loads(path.read_bytes()),
}


def infer(folder):
    """The script of a process that has only the files and the code of the model."""
    for name, load in LOADERS.items():
        params = load(folder / name)
        kernel = params["params"]["Dense_0"]["kernel"]
        logits = jax.jit(Net().apply)(params, X)
        print(name, type(kernel).__name__, np.asarray(logits).tobytes().hex())


def test_inference_in_a_fresh_process(params, tmp_path):
    checkpoints.save(tmp_path / "orbax", params)
    np.savez(tmp_path / "weights.npz", **madax.to_flat_dict(params))
    (tmp_path / "weights.msgpack").write_bytes(serialization.to_bytes(params))
    (tmp_path / "weights.pickle").write_bytes(pickle.dumps(params))
    (out,) = processes.finish(processes.start(__file__, tmp_path))
    with long_run():  # compiled as in the other process
        logits = np.asarray(jax.jit(Net().apply)(params, X)).tobytes().hex()
    assert out.splitlines() == [f"{name} QuantizedArray {logits}" for name in LOADERS]


if __name__ == "__main__":
    infer(Path(sys.argv[1]))


def test_a_key_that_would_be_read_as_a_dtype_is_refused():
    with pytest.raises(
        ValueError, match="'a:bfloat16', which would be read as an array"
    ):
        madax.to_flat_dict({"a:bfloat16": np.zeros(3, np.uint16)})
