"""Formats, codes and rounding: what goes wrong raises at once, naming what to mend."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS

import madax
from madax import LogFormat, MomentFormat, SymlogFormat, UniformFormat

FMT = FORMATS["log8"]
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
def test_widths_out_of_range_are_refused(make):
    for bits in (0, 1, -8, 17):
        raises(
            ValueError, rf"bits must be in \d+ to 16, got {bits}\b", partial(make, bits)
        )
    for bits in (8.0, True, "8", None, np.float32(8), jnp.int32(8)):
        got = re.escape(repr(bits))
        raises(TypeError, f"bits must be an int, got {got}", partial(make, bits))


def test_moments_need_eight_bits_and_octaves_a_power_of_two():
    raises(ValueError, "bits must be in 8 to 16, got 7", lambda: MomentFormat(7))
    for octaves in (5, 8.0, True):
        pattern = f"octaves must be 2, 4, 8, 16, 32 or None, got {octaves}"
        raises(ValueError, pattern, partial(MomentFormat, 8, octaves))
    pattern = (
        r"is MomentFormat\(bits=9, octaves=8\), but .* pass MomentFormat\(bits=9\)"
    )
    make = partial(madax.madam, moment_format=MomentFormat(9, octaves=8))
    raises(ValueError, pattern, make)
    make = lambda: LogFormat.from_dynamic_range(2, 10)
    raises(ValueError, "bits must be in 3 to 16, got 2", make)


FIELDS = {
    "base_step": (lambda x: LogFormat(8, x), (0, -0.1, 9e-7, 0.64, INF, NAN)),
    "gamma": (lambda x: LogFormat.from_gamma(8, x), (0, -8, 1, 1e6, INF, NAN)),
    "ratio": (
        lambda x: LogFormat.from_dynamic_range(8, x),
        (0, 1, 0.5, -10, 1e35, INF, NAN),
    ),
    "linear_range": (lambda x: SymlogFormat(8, x), (0, -1, 9e-7, 1100, INF, NAN)),
    "base_step of bbit_madam": (
        lambda x: madax.papers.bbit_madam(base_step=x),
        (0, -1e-3, 0.02, NAN),
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_out_of_range_are_refused(name):
    make, wrong = FIELDS[name]
    name = name.split()[0]
    for value in wrong:
        got = re.escape(f"got {value}")
        raises(ValueError, rf"^{name} must be in \[.*\] .*{got}", partial(make, value))
    for value in ("0.5", b"1", True, 1j, [0.5]):
        got = re.escape(f"got {value!r}")
        raises(TypeError, f"^{name} must be .*{got}", partial(make, value))
    traced = lambda x: make(x) and 0
    raises(TypeError, f"{name} must be .*static_args", lambda: jax.jit(traced)(0.5))


# --- quantize_params and dequantize_params --------------------------------------------


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


ALL = {"where": lambda path, leaf: True}
W = {"w": ones(4, 4)}
BAD_QUANTIZE = {
    # name: (error, pattern, params, arguments)
    "no format": (TypeError, "format must be .*None", W, {"format": None}),
    "number": (TypeError, "format must be .*8 .*int", W, {"format": 8}),
    "class": (TypeError, "format must be .*LogFormat", W, {"format": LogFormat}),
    "moments": (TypeError, "format must .*MomentF", W, {"format": MomentFormat(8)}),
    "p_scale": (ValueError, "p_scale .*got 0", W, {"p_scale": 0}),
    "p_scale inf": (ValueError, "p_scale .*got inf", W, {"p_scale": INF}),
    "p_scale text": (TypeError, "p_scale .*'3'", W, {"p_scale": "3"}),
    "where": (TypeError, "where must be .*3", W, {"where": 3}),
    "axis": (
        ValueError,
        r"channel_axis is 2, but params\['w'\] has shape \(4, 4\)",
        W,
        {"channel_axis": 2},
    ),
    "axis of a scalar": (
        ValueError,
        r"channel_axis is -1, but params\['w'\] has shape \(\)",
        {"w": ones()},
        {"channel_axis": -1, **ALL},
    ),
    "axis float": (TypeError, "channel_axis must .*1.5", W, {"channel_axis": 1.5}),
    "axis bool": (TypeError, "channel_axis must .*True", W, {"channel_axis": True}),
    "nan": (ValueError, r"params\['w'\] .*not finite", {"w": ones(4, 4) * NAN}, {}),
    "inf": (ValueError, r"params\['w'\] .*not finite", {"w": ones(4, 4) * INF}, {}),
    "bare nan": (ValueError, r"^params .*not finite", ones(4, 4) * NAN, {}),
    "scale overflows": (ValueError, r"params\['w'\] ", {"w": ones(4, 4) * 2e38}, {}),
    "scale underflows": (
        ValueError,
        r"params\['w'\] ",
        {"w": ones(4, 4) * 2e-38},
        {"p_scale": 0.1},
    ),
    "ints": (TypeError, r"\['n'\] has dtype", {"n": ones(4, 4, dtype=int)}, ALL),
    "bools": (TypeError, r"\['n'\] has dtype", {"n": ones(4, 4, dtype=bool)}, ALL),
    "complex": (TypeError, r"\['n'\] is complex", {"n": 1j * ones(4, 4)}, ALL),
    "text": (TypeError, r"params\['n'\] must be", {"n": "w"}, ALL),
}


@pytest.mark.parametrize("case", BAD_QUANTIZE.values(), ids=BAD_QUANTIZE)
def test_quantize_params_refuses_bad_arguments(case):
    kind, pattern, params, arguments = case
    call = lambda: madax.quantize_params(params, **{"format": FMT} | arguments)
    raises(kind, pattern, call)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, bool])
def test_dequantize_params_refuses_other_dtypes(dtype):
    call = lambda: madax.dequantize_params(madax.quantize_params(W, FMT), dtype)
    raises(TypeError, "dtype must be a floating dtype", call)


# --- transforms -----------------------------------------------------------------------

GRID = partial(madax.papers.quantize_to_grid, FMT)
WRAP = partial(madax.with_quantized_params, optax.sgd(0.1))
MOMENT = partial(madax.scale_by_second_moment, moment_format=MomentFormat(8))
MADAM, LNS, WRAPPED = madax.madam, madax.papers.lns_madam, madax.with_quantized_params
A_KEY, RAW_KEY = jax.random.key(0), jnp.zeros(2, jnp.uint32)

BAD_MAKE = [
    (ValueError, "rounding must be one of .*'up'", GRID, {"rounding": "up"}),
    (ValueError, "rounding must be .*None", GRID, {"rounding": None}),
    (ValueError, "rounding must be .*nearest'", GRID, {"rounding": ["nearest"]}),
    (ValueError, "rounding must be", MADAM, {"rounding": 1}),
    (ValueError, "rounding must be", WRAP, {"rounding": "Nearest"}),
    (TypeError, "seed must be an integer, got 0.5", GRID, {"seed": 0.5}),
    (TypeError, "seed must be an integer, got True", GRID, {"seed": True}),
    (TypeError, "seed must be .*not a jax.random key", GRID, {"seed": A_KEY}),
    (TypeError, "seed must be", GRID, {"seed": RAW_KEY}),
    (TypeError, "seed must be .*None", MADAM, {"seed": None}),
    (TypeError, "seed must be .*'0'", WRAP, {"seed": "0"}),
    (TypeError, "seed must be .*1.0", MOMENT, {"seed": 1.0}),
    (TypeError, "format must be .*8", GRID.func, {"format": 8}),
    (TypeError, "format must .*Moment", GRID.func, {"format": MomentFormat()}),
    (TypeError, "format must be .*'int8'", LNS, {"format": "int8"}),
    (TypeError, "format must be", LNS, {"format": None}),
    (TypeError, "moment_format must be .*LogFormat", MADAM, {"moment_format": FMT}),
    (TypeError, "moment_format must be", MOMENT, {"moment_format": 8}),
    (TypeError, "inner must be .*None", WRAPPED, {"inner": None}),
    (TypeError, "inner must be .*optax.adam", WRAPPED, {"inner": optax.adam}),
]


@pytest.mark.parametrize("case", BAD_MAKE, ids=lambda case: f"{case[1]}")
def test_transforms_refuse_bad_arguments(case):
    kind, pattern, make, arguments = case
    raises(kind, pattern, partial(make, **arguments))


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**40, -(2**31) - 1])
def test_a_seed_of_more_than_31_bits_works(seed):
    params = madax.quantize_params(ones(4, 4), FMT)
    tx = madax.madam(0.1, seed=seed)
    tx.update(ones(4, 4), tx.init(params), params)


CHAINS = {
    "madam": madax.madam(0.1),
    "madam_moments": madax.madam(0.1, moment_format=MomentFormat(8), b1=0.9),
    "wrapped": madax.with_quantized_params(optax.adam(0.1)),
}
every_chain = pytest.mark.parametrize("tx", list(CHAINS.values()), ids=list(CHAINS))


def mixed():
    return madax.quantize_params({"w": ones(4, 4), "b": jnp.ones(4)}, FMT)


SHAPES = r"updates\['w'\] has shape \(4, 5\), but .*\['w'\] has shape \(4, 4\)"
BAD_UPDATES = [
    (ValueError, "same tree structure", {"w": ones(4, 4)}),
    (ValueError, "same tree structure", {"w": ones(4, 4), "c": ones(4)}),
    (ValueError, SHAPES, {"w": ones(4, 5), "b": ones(4)}),
    (TypeError, r"\['w'\] has dtype", {"w": ones(4, 4, dtype=int), "b": ones(4)}),
    (TypeError, r"updates\['w'\] .*QuantizedArray", mixed()),
    (
        (TypeError, ValueError),
        "same tree structure|must be a floating",
        {"w": [ones(4, 4), ones()], "b": ones(4)},
    ),
]


@every_chain
def test_gradients_for_another_tree_are_refused(tx):
    params = mixed()
    state = tx.init(params)
    before = jax.tree.map(np.array, (params, state))
    for kind, pattern, updates in BAD_UPDATES:
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(kind, match=pattern):
                update(updates, state, params)
    jax.tree.map(np.testing.assert_array_equal, before, (params, state))
    grads = madax.dequantize_params(params)
    raises(ValueError, "params is None", lambda: tx.update(grads, state))


@every_chain
def test_leaves_that_cannot_be_trained_are_refused(tx):
    for bad in (jnp.int32(1), jnp.complex64(1)):
        params = mixed() | {"n": bad}
        grads = madax.dequantize_params(mixed()) | {"n": jnp.float32(1)}
        call = lambda: tx.update(grads, tx.init(params), params)  # noqa: B023
        raises(TypeError, r"params\['n'\]", call)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_state_of_other_params_is_refused(jit):
    """Of floats, for codes: the vectors of scalars tell."""
    floats = {"w": ones(4, 4), "b": jnp.ones(4)}
    for tx in (GRID(), madax.scale_by_sign_log(), madax.clip_log_weights()):
        for made_for, params, counts in (
            (floats, mixed(), (2, 1)),
            (mixed(), floats, (1, 2)),
        ):
            state = tx.init(made_for)
            call = lambda: jit(tx.update)(floats, state, params)  # noqa: B023
            message = "made for {} float leaves, but params has {}; call init again"
            raises(ValueError, message.format(*counts), call)


# --- fake_quantize --------------------------------------------------------------------

X = jnp.ones(3)
BAD_FAKE = [
    (TypeError, "^format must be .*8", (X, 8), {}),
    (TypeError, "^backward_format must .*Format", (X, FMT), {"backward_format": 8}),
    (TypeError, "^x has dtype int32", (jnp.arange(3), FMT), {}),
    (TypeError, "^x is complex", (1j * X, FMT), {}),
    (TypeError, "^x must be .*list", ([1.0, 2.0], FMT), {}),
    (TypeError, "^x must be .*QuantizedArray", (mixed()["w"], FMT), {}),
]


@pytest.mark.parametrize("case", BAD_FAKE, ids=lambda case: case[1])
def test_fake_quantize_refuses_bad_arguments(case):
    kind, pattern, args, kwargs = case
    raises(kind, pattern, lambda: madax.papers.fake_quantize(*args, **kwargs))
