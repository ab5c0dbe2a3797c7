"""Formats, codes and rounding: what goes wrong raises at once, naming what to mend."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import madax
from madax import LogFormat, MomentFormat, SymlogFormat, UniformFormat

FMT = LogFormat(8, 0.05)
INF, NAN = float("inf"), float("nan")


def raises(kind, pattern, call):
    """The type is exact: no subclass, no error from further down."""
    with pytest.raises(kind, match=f"(?s){pattern}") as info:
        call()
    assert type(info.value) is kind


# --- formats --------------------------------------------------------------------------

MAKERS = {
    "LogFormat": lambda bits: LogFormat(bits, 1e-3),
    "SymlogFormat": lambda bits: SymlogFormat(bits, 0.3),
    "UniformFormat": UniformFormat,
    "MomentFormat": MomentFormat,
    "from_gamma": lambda bits: LogFormat.from_gamma(bits, 2048),
    "from_dynamic_range": lambda bits: LogFormat.from_dynamic_range(bits, 1000),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bits(make):
    for bits in (0, 1, -8, 17, 32):
        raises(
            ValueError, rf"bits must be in \d+ to 16, got {bits}\b", partial(make, bits)
        )
    for bits in (8.0, True, "8", None, np.float32(8), jnp.int32(8)):
        got = re.escape(repr(bits))
        raises(TypeError, f"bits must be an int, got {got}", partial(make, bits))


def test_bits_too_few():
    raises(ValueError, "bits must be in 8 to 16, got 7", lambda: MomentFormat(7))
    make = lambda: LogFormat.from_dynamic_range(2, 10)
    raises(ValueError, "bits must be in 3 to 16, got 2", make)


FIELDS = {
    "base_step": (lambda x: LogFormat(8, x), (0, -0.1, 1e-7, 0.7, INF, NAN)),
    "gamma": (lambda x: LogFormat.from_gamma(8, x), (0, -8, 1, 1e6, INF, NAN)),
    "ratio": (
        lambda x: LogFormat.from_dynamic_range(8, x),
        (0, 1, 0.5, -10, 1e35, INF, NAN),
    ),
    "linear_range": (lambda x: SymlogFormat(8, x), (0, -1, 1e-9, 1e4, INF, NAN)),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    make, wrong = FIELDS[name]
    for value in wrong:
        got = re.escape(f"got {value}")
        raises(ValueError, rf"^{name} must be in \[.*\] .*{got}", partial(make, value))
    for value in ("0.5", b"1", True, 1j, [0.5]):
        got = re.escape(f"got {value!r}")
        raises(TypeError, f"^{name} must be .*{got}", partial(make, value))
    traced = lambda x: make(x).levels
    raises(TypeError, f"{name} must be .*static_args", lambda: jax.jit(traced)(0.5))


def test_base_precision():
    """The argument is called base_precision here, whatever the format calls it."""
    make = lambda **kw: madax.bbit_madam(0.01, **kw)
    for bits, value in [(12, 0.5), (12, 0), (12, -1e-3), (15, 0.01), (8, NAN)]:
        call = partial(make, bits=bits, base_precision=value)
        raises(ValueError, rf"^base_precision must be in .*got {value}", call)
    call = partial(make, base_precision="fine")
    raises(TypeError, "^base_precision must be .*'fine'", call)
    for bits in (0, 16, 99):
        raises(ValueError, f"^bits must be .*got {bits}", partial(make, bits=bits))
    for bits in (12.0, True, "12"):
        with pytest.raises((TypeError, ValueError), match=f"^bits must be .*{bits!r}"):
            make(bits=bits)


# --- quantize_params and dequantize_params --------------------------------------------


def ones(*shape):
    return jnp.ones(shape)


def everything(path, leaf):
    return True


BAD_QUANTIZE = {
    # name: (error, pattern, params, arguments)
    "no_format": (TypeError, "format must be .*None", ones(4, 4), {"format": None}),
    "number": (TypeError, "format must be .*8 .*int", ones(4, 4), {"format": 8}),
    "class": (
        TypeError,
        "format must be .*LogFormat",
        ones(4, 4),
        {"format": LogFormat},
    ),
    "moment_format": (
        TypeError,
        "format must be .*MomentFormat",
        ones(4, 4),
        {"format": MomentFormat(8)},
    ),
    "p_scale": (ValueError, "p_scale .*got 0", ones(4, 4), {"p_scale": 0}),
    "p_scale_nan": (ValueError, "p_scale .*got nan", ones(4, 4), {"p_scale": NAN}),
    "p_scale_inf": (ValueError, "p_scale .*got inf", ones(4, 4), {"p_scale": INF}),
    "p_scale_text": (TypeError, "p_scale .*'3'", ones(4, 4), {"p_scale": "3"}),
    "where": (TypeError, "where must be .*3", ones(4, 4), {"where": 3}),
    "axis": (
        ValueError,
        r"channel_axis is 2, but params\['w'\] has shape \(4, 4\)",
        {"w": ones(4, 4)},
        {"channel_axis": 2},
    ),
    "axis_of_a_scalar": (
        ValueError,
        r"channel_axis is -1, but params\['w'\] has shape \(\)",
        {"w": ones()},
        {"channel_axis": -1, "where": everything},
    ),
    "axis_float": (
        TypeError,
        "channel_axis must be .*1.5",
        ones(4, 4),
        {"channel_axis": 1.5},
    ),
    "axis_text": (
        TypeError,
        "channel_axis must be .*'0'",
        ones(4, 4),
        {"channel_axis": "0"},
    ),
    "nan": (
        ValueError,
        r"params\['w'\] .*not finite",
        {"w": ones(4, 4).at[1].set(NAN)},
        {},
    ),
    "inf": (
        ValueError,
        r"params\['w'\] .*not finite",
        {"w": ones(4, 4).at[1].set(INF)},
        {},
    ),
    "bare_nan": (ValueError, r"^params .*not finite", ones(4, 4) * NAN, {}),
    "scale_overflows": (ValueError, r"params\['w'\] ", {"w": ones(4, 4) * 2e38}, {}),
    "scale_underflows": (
        ValueError,
        r"params\['w'\] ",
        {"w": ones(4, 4) * 2e-38},
        {"p_scale": 0.1},
    ),
    "integers": (
        TypeError,
        r"params\['n'\] has dtype int32",
        {"n": jnp.ones((4, 4), jnp.int32)},
        {"where": everything},
    ),
    "bools": (
        TypeError,
        r"params\['n'\] has dtype bool",
        {"n": jnp.ones((4, 4), bool)},
        {"where": everything},
    ),
    "complex": (
        TypeError,
        r"params\['n'\] is complex",
        {"n": jnp.ones((4, 4), jnp.complex64)},
        {"where": everything},
    ),
    "text": (TypeError, r"params\['n'\] must be", {"n": "w"}, {"where": everything}),
}


@pytest.mark.parametrize("case", BAD_QUANTIZE.values(), ids=BAD_QUANTIZE)
def test_quantize_params(case):
    kind, pattern, params, arguments = case
    arguments = {"format": FMT} | arguments
    before = jax.tree.map(lambda x: np.array(x) if hasattr(x, "shape") else x, params)
    raises(kind, pattern, lambda: madax.quantize_params(params, **arguments))
    jax.tree.map(np.testing.assert_array_equal, before, params)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, bool])
def test_dequantize_params(dtype):
    params = madax.quantize_params({"w": ones(4, 4)}, FMT)
    call = lambda: madax.dequantize_params(params, dtype)
    raises(TypeError, "dtype must be a floating dtype", call)


# --- transforms -----------------------------------------------------------------------

GRID = partial(madax.lns_quantize, FMT)
WRAP = partial(madax.with_quantized_params, optax.sgd(0.1))
MOMENT = partial(madax.scale_by_second_moment, moment_format=MomentFormat(8))
A_KEY = jax.random.key(0)

BAD_MAKE = {
    "rounding": (
        ValueError,
        "rounding must be one of .*'up'",
        GRID,
        {"rounding": "up"},
    ),
    "rounding_none": (ValueError, "rounding must be .*None", GRID, {"rounding": None}),
    "rounding_list": (
        ValueError,
        r"rounding must be .*\['nearest'\]",
        GRID,
        {"rounding": ["nearest"]},
    ),
    "madam_rounding": (ValueError, "rounding must be", madax.madam, {"rounding": 1}),
    "wrap_rounding": (ValueError, "rounding must be", WRAP, {"rounding": "Nearest"}),
    "seed_float": (TypeError, "seed must be an integer, got 0.5", GRID, {"seed": 0.5}),
    "seed_bool": (TypeError, "seed must be an integer, got True", GRID, {"seed": True}),
    "seed_key": (
        TypeError,
        "seed must be .*not a jax.random key",
        GRID,
        {"seed": A_KEY},
    ),
    "seed_raw_key": (
        TypeError,
        "seed must be",
        GRID,
        {"seed": jnp.zeros(2, jnp.uint32)},
    ),
    "seed_none": (TypeError, "seed must be .*None", madax.madam, {"seed": None}),
    "wrap_seed": (TypeError, "seed must be .*'0'", WRAP, {"seed": "0"}),
    "moment_seed": (TypeError, "seed must be .*1.0", MOMENT, {"seed": 1.0}),
    "grid_format": (TypeError, "format must be .*8", madax.lns_quantize, {"format": 8}),
    "grid_moment_format": (
        TypeError,
        "format must be .*MomentFormat",
        madax.lns_quantize,
        {"format": MomentFormat(8)},
    ),
    "lns_format": (
        TypeError,
        "format must be .*'int8'",
        madax.lns_madam,
        {"format": "int8"},
    ),
    "moment_format": (
        TypeError,
        "moment_format must be .*LogFormat",
        madax.madam,
        {"moment_format": FMT},
    ),
    "moment_bits": (
        TypeError,
        "moment_format must be",
        madax.madam,
        {"moment_format": 8},
    ),
    "grid_p_scale": (ValueError, "p_scale .*got -1", GRID, {"p_scale": -1}),
    "grid_p_scale_inf": (ValueError, "p_scale .*got inf", GRID, {"p_scale": INF}),
    "bbit_p_scale_inf": (
        ValueError,
        "p_scale .*inf",
        madax.bbit_madam,
        {"p_scale": INF},
    ),
    "lns_p_scale_inf": (ValueError, "p_scale .*inf", madax.lns_madam, {"p_scale": INF}),
    "inner_none": (
        TypeError,
        "inner must be .*None",
        madax.with_quantized_params,
        {"inner": None},
    ),
    "inner_function": (
        TypeError,
        "inner must be .*optax.adam",
        madax.with_quantized_params,
        {"inner": optax.adam},
    ),
    "inner_rate": (
        TypeError,
        "inner must be .*0.1",
        madax.with_quantized_params,
        {"inner": 0.1},
    ),
}


@pytest.mark.parametrize("case", BAD_MAKE.values(), ids=BAD_MAKE)
def test_arguments_of_transforms(case):
    kind, pattern, make, arguments = case
    raises(kind, pattern, partial(make, **arguments))


def test_lns_madam_needs_a_format():
    raises(TypeError, "format must be", lambda: madax.lns_madam(format=None))


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**40, -(2**31) - 1])
def test_a_seed_of_more_than_31_bits_works_or_is_named(seed):
    params = madax.quantize_params(ones(4, 4), FMT)
    try:
        tx = madax.madam(0.1, seed=seed)
    except ValueError as error:
        assert re.match(rf"seed must .*{seed}", str(error))
        return
    tx.update(ones(4, 4), tx.init(params), params)


TRANSFORMS = {
    "madam": madax.madam(0.1),
    "madam_moments": madax.madam(0.1, moment_format=MomentFormat(8), b1=0.9),
    "wrapped": madax.with_quantized_params(optax.adam(0.1)),
}
every_transform = pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)


def mixed():
    params = {"w": ones(4, 4), "b": jnp.ones(4)}
    return madax.quantize_params(params, FMT)


BAD_UPDATES = {
    "missing": (ValueError, "same tree structure", {"w": ones(4, 4)}),
    "more": (
        ValueError,
        "same tree structure",
        {"w": ones(4, 4), "b": ones(4), "c": ones(1)},
    ),
    "other_names": (ValueError, "same tree structure", {"w": ones(4, 4), "c": ones(4)}),
    "shape": (
        ValueError,
        r"updates\['w'\] has shape \(4, 5\), but .*\['w'\] has shape \(4, 4\)",
        {"w": ones(4, 5), "b": ones(4)},
    ),
    "integers": (
        TypeError,
        r"updates\['w'\] has dtype int32",
        {"w": jnp.ones((4, 4), jnp.int32), "b": ones(4)},
    ),
    "codes": (TypeError, r"updates\['w'\] .*QuantizedArray", mixed()),
    "inside_the_codes": (
        ValueError,
        "same tree structure|must be a floating",
        {"w": [ones(4, 4), ones()], "b": ones(4)},
    ),
}


@pytest.mark.parametrize("case", BAD_UPDATES.values(), ids=BAD_UPDATES)
@every_transform
def test_gradients_for_another_tree(tx, case):
    kind, pattern, updates = case
    params = mixed()
    state = tx.init(params)
    before = jax.tree.map(np.array, (params, state))
    with pytest.raises((kind, TypeError), match=pattern):
        tx.update(updates, state, params)
    with pytest.raises((kind, TypeError), match=pattern):
        jax.jit(tx.update)(updates, state, params)
    jax.tree.map(np.testing.assert_array_equal, before, (params, state))


@every_transform
def test_no_params(tx):
    params = mixed()
    grads = madax.dequantize_params(params)
    call = lambda: tx.update(grads, tx.init(params))
    raises(ValueError, "params is None", call)


@every_transform
@pytest.mark.parametrize("bad", [jnp.int32(1), jnp.complex64(1)], ids=repr)
def test_leaves_that_cannot_be_trained(tx, bad):
    params = mixed() | {"n": bad}
    grads = madax.dequantize_params(mixed()) | {"n": jnp.float32(1)}

    def call():
        state = tx.init(params)
        tx.update(grads, state, params)

    raises(TypeError, r"params\['n'\]", call)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_state_of_other_params(jit):
    """Of floats, for codes: the vectors of scalars tell."""
    floats = {"w": ones(4, 4), "b": jnp.ones(4)}
    for tx in (GRID(), madax.scale_by_sign_log(), madax.clip_log_weights()):
        state, params = tx.init(floats), mixed()
        steps = {"w": ones(4, 4), "b": ones(4)}
        call = lambda: jit(tx.update)(steps, state, params)  # noqa: B023
        pattern = "made for 2 float leaves, but params has 1; call init again"
        raises(ValueError, pattern, call)
        state = tx.init(mixed())
        call = lambda: jit(tx.update)(steps, state, floats)  # noqa: B023
        pattern = "made for 1 float leaves, but params has 2; call init again"
        raises(ValueError, pattern, call)


# --- fake_quantize --------------------------------------------------------------------

BAD_FAKE = {
    "format": (TypeError, "^format must be .*8", (jnp.ones(3), 8), {}),
    "backward": (
        TypeError,
        "^backward_format must be .*MomentFormat",
        (jnp.ones(3), FMT),
        {"backward_format": MomentFormat(8)},
    ),
    "integers": (TypeError, "^x has dtype int32", (jnp.arange(3), FMT), {}),
    "complex": (TypeError, "^x is complex", (jnp.ones(3, jnp.complex64), FMT), {}),
    "list": (TypeError, "^x must be .*list", ([1.0, 2.0], FMT), {}),
    "codes": (
        TypeError,
        "^x must be .*QuantizedArray",
        (madax.quantize_params(jnp.ones((4, 4)), FMT), FMT),
        {},
    ),
}


@pytest.mark.parametrize("case", BAD_FAKE.values(), ids=BAD_FAKE)
def test_fake_quantize(case):
    kind, pattern, args, kwargs = case
    raises(kind, pattern, lambda: madax.fake_quantize(*args, **kwargs))
