"""One clear error a mistake: the argument, the value, what to do."""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mostly_nightly, raises

import madax

# Every kind of mistake in a number. One argument is given all of them.
NO_NUMBERS = {
    "text": "0.1",
    "none": None,
    "bool": True,
    "numpy bool": np.True_,
    "list": [0.1],
    "complex": 0.1j,
    "numpy complex": np.complex64(0.1),
    "object": object(),
    "array of text": np.array("a"),
    "array of objects": np.array(None),
    "array of bool": jnp.array(True),
    "unsigned": np.uint8(1),
    "long double": np.longdouble(0.5),
    "key": jax.random.key(0),
}
OUT_OF_RANGE = [
    -1,
    -1e-9,
    np.nan,
    np.inf,
    -np.inf,
    2**31,
    -(10**400),
    1e300,
    np.float64(1e300),
]


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_values_that_are_no_numbers_are_refused(value):
    with raises(TypeError, "learning_rate must be", repr(value), "default: 0.01"):
        madax.madam(value)


@pytest.mark.parametrize("value", OUT_OF_RANGE, ids=lambda value: f"{value}"[:9])
def test_numbers_out_of_range_are_refused(value):
    with raises(ValueError, "learning_rate", f"{value}", "default: 0.01"):
        madax.madam(value)


@pytest.mark.parametrize("wrap", [np.float32, jnp.asarray])
def test_arrays_out_of_range_are_refused(wrap):
    for value in (-1, np.nan, np.inf):
        with raises(ValueError, "learning_rate must satisfy", f"{wrap(value)}"):
            madax.madam(wrap(value))


@pytest.mark.parametrize("value", [np.ones(1), jnp.ones((2, 3))], ids=np.shape)
def test_arrays_of_rates_point_to_vmap(value):
    with raises(ValueError, "learning_rate", "scalar", str(value.shape), "jax.vmap"):
        madax.madam(value)


@pytest.mark.parametrize("value", [0.5, 0, np.float32(0.5), np.array(0.5), np.int64(1)])
def test_numbers_of_every_kind_are_accepted(value):
    madax.madam(value, floor=value, zero_init_scale=jnp.asarray(value))


@pytest.mark.parametrize("steps", mostly_nightly([997, 959, 1000], 997))
@pytest.mark.parametrize("make", [madax.madam, madax.muon, madax.muon_madam])
def test_a_linear_schedule_may_end_just_below_zero(make, steps):
    """As XLA divides by its length; NaN would end the training after its last step."""
    rate = optax.linear_schedule(0.02, 0.0, steps)
    assert steps == 1000 or jax.jit(rate)(steps) < 0
    params, grads = {"b": jnp.ones(3)}, {"b": jnp.ones(3)}
    for tx in (make(rate), optax.inject_hyperparams(make)(rate)):
        state = optax.tree.map_params(tx, lambda x: x, tx.init(params))
        state = jax.tree.map(
            lambda x: jnp.full_like(x, steps) if x.dtype == jnp.int32 else x, state
        )
        updates, _ = jax.jit(tx.update)(grads, state, params)
        np.testing.assert_array_equal(updates["b"], np.zeros(3))
    # A rate that was meant to be negative is still a mistake.
    tx = make(lambda count: jnp.float32(-1e-3))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert np.isnan(updates["b"]).all()


@pytest.mark.parametrize("make", [madax.madam, madax.muon, madax.muon_madam])
def test_a_schedule_that_returns_no_number_is_named(make):
    params = {"b": jnp.ones(3)}
    for value, kind, message in (
        (None, TypeError, "learning_rate(count) must be a number, got None"),
        (np.ones(2), ValueError, "learning_rate(count) must be a scalar"),
    ):
        tx = make(lambda count, value=value: value)
        with raises(kind, message):
            tx.update(params, tx.init(params), params)


def test_no_bound_and_schedules_are_accepted():
    madax.madam(optax.constant_schedule(0.1), p_scale=np.inf, g_bound=np.inf)


# The other arguments are given the values next to the ends of their range.
NOT_NEGATIVE, POSITIVE, DECAY = [-1e-9, np.inf], [0, -1], [1, -1e-9]
FINITE = [0, np.inf]
quantize_to_log = partial(madax.papers.quantize_to_grid, madax.LogFormat(8))

BAD = {
    madax.madam: {
        "learning_rate": NOT_NEGATIVE,
        "b1": DECAY,
        "b2": DECAY,
        "p_scale": POSITIVE,
        "g_bound": POSITIVE,
        "floor": NOT_NEGATIVE,
        "zero_init_scale": NOT_NEGATIVE,
    },
    madax.papers.bbit_madam: {
        "learning_rate": NOT_NEGATIVE,
        "b2": DECAY,
        "p_scale": FINITE,
        "g_bound": POSITIVE,
        "zero_init_scale": NOT_NEGATIVE,
        "bits": [0, 16],
        "base_step": [0, 0.02, np.nan],
    },
    madax.papers.lns_madam: {
        "learning_rate": NOT_NEGATIVE,
        "b2": DECAY,
        "p_scale": FINITE,
        "g_bound": POSITIVE,
        "zero_init_scale": NOT_NEGATIVE,
    },
    madax.scale_by_second_moment: {"b1": DECAY, "b2": DECAY},
    madax.scale_by_sign_log: {"floor": NOT_NEGATIVE, "zero_init_scale": NOT_NEGATIVE},
    madax.clip_log_weights: {"p_scale": POSITIVE, "zero_init_scale": NOT_NEGATIVE},
    quantize_to_log: {"p_scale": FINITE, "zero_init_scale": NOT_NEGATIVE},
}


@pytest.mark.parametrize("make", BAD)
def test_every_argument_is_checked_and_named(make):
    for name, values in BAD[make].items():
        for value in values:
            with raises(ValueError, name, f"got {value}"):
                make(**{name: value})
        # An int in a range: both at fault.
        with raises(
            (TypeError, ValueError) if name == "bits" else TypeError, name, "'x'"
        ):
            make(**{name: "x"})
        with raises((TypeError, ValueError), name):
            make(**{name: jnp.ones(2)})


W = jnp.array([1.0, -2.0])
TREE = {"a": {"kernel": W}, "b": jnp.ones((2, 3))}

TRANSFORMS = {
    "madam": madax.madam(b1=0.9),
    "bbit_madam": madax.papers.bbit_madam(),
    "lns_madam": madax.papers.lns_madam(),
    "second_moment": madax.scale_by_second_moment(),
    "sign_log": madax.scale_by_sign_log(),
    "clip": madax.clip_log_weights(),
    "lns_quantize": madax.lns_quantize(),
    "quantize_to_grid": quantize_to_log(),
}
EVERY = pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
NEEDS_PARAMS = pytest.mark.parametrize(
    "tx",
    [tx for name, tx in TRANSFORMS.items() if name != "second_moment"],
    ids=[name for name in TRANSFORMS if name != "second_moment"],
)

BAD_LEAVES = {
    "complex": (jnp.ones(2, jnp.complex64), "complex64"),
    "int": (jnp.ones(2, jnp.int32), "int32"),
    "bool": (jnp.ones(2, bool), "bool"),
    "numpy int": (np.ones(2, np.int8), "int8"),
    "python int": (3, "3"),
    "python bool": (True, "True"),
    "string": ("kernel", "'kernel'"),
    "array of strings": (np.array(["w"]), "<U1"),
    "function": (len, "len"),
    "key": (jax.random.key(0), "key<fry>"),
}


@EVERY
def test_leaves_and_gradients_that_are_not_real_floats_are_refused(tx):
    params = {"a": {"kernel": W}, "b": W}
    state = tx.init(params)
    for bad, shown in BAD_LEAVES.values():
        with raises(TypeError, "params['a/kernel']", shown):
            tx.init({"a": {"kernel": bad}, "b": W})
        with raises(TypeError, "params", shown):
            tx.init(bad)
        with raises(TypeError, "updates['b']", shown):
            tx.update({"a": {"kernel": W}, "b": bad}, state, params)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@NEEDS_PARAMS
def test_floats_too_narrow_for_updates_are_refused(tx, dtype):
    params = {"a": W, "b": W.astype(dtype)}
    with raises(TypeError, "params['b']", dtype.__name__, "quantize_params"):
        tx.init(params)
    codes = madax.quantize_params(jnp.ones((4, 4), dtype), madax.UniformFormat(8))
    tx.init({"a": W, "b": codes})


@NEEDS_PARAMS
def test_missing_params_are_refused(tx):
    with raises(ValueError, "params is None", "update(grads, state, params)"):
        tx.update(TREE, tx.init(TREE))


@NEEDS_PARAMS
def test_a_state_of_another_layout_is_refused(tx):
    """As a checkpoint that is restored into nothing is dictionaries."""
    state = tx.init(TREE)
    parts = state if type(state) is tuple else (state,)
    layouts = [s._asdict() if hasattr(s, "_asdict") else s for s in parts]
    state = tuple(layouts) if type(state) is tuple else layouts[0]
    with raises(TypeError, "state must be a ", "got dict", "version of madax"):
        tx.update(TREE, state, TREE)


def test_a_grid_for_a_state_without():
    state = madax.lns_quantize().init(TREE)
    with raises(TypeError, "state must be a QuantizeToGridState, got LnsQuantizeState"):
        quantize_to_log().update(TREE, state, TREE)


MISMATCHES = {
    "missing key": {"a": {"kernel": W}},
    "other key": {"a": {"bias": W}, "b": jnp.ones((2, 3))},
    "extra leaf": {**TREE, "c": W},
    "None for a node": {"a": None, "b": jnp.ones((2, 3))},
    "another container": ({"kernel": W}, jnp.ones((2, 3))),
    "bare array": W,
}


@EVERY
def test_updates_of_another_structure_or_shape_are_refused(tx):
    state = tx.init(TREE)
    for updates in MISMATCHES.values():
        with raises(ValueError, "updates", "same tree structure", "gradients"):
            tx.update(updates, state, TREE)
    # No broadcasting, either.
    for shape in ((3, 2), (3,)):
        with raises(ValueError, "updates['b']", f"{shape}", "(2, 3)"):
            tx.update({**TREE, "b": jnp.ones(shape)}, state, TREE)


@pytest.mark.parametrize("name", [k for k in TRANSFORMS if k != "lns_quantize"])
def test_a_state_for_other_params_is_refused(name):
    tx = TRANSFORMS[name]
    state = tx.init({"a": {"kernel": W}})
    with raises(ValueError, "state"):
        tx.update(TREE, state, TREE)


def test_moments_for_other_shapes_are_refused():
    state = TRANSFORMS["madam"].init({**TREE, "b": jnp.ones((3, 2))})
    with raises(ValueError, "state.nu['b']", "(3, 2)"):
        TRANSFORMS["madam"].update(TREE, state, TREE)


@NEEDS_PARAMS
def test_shapes_instead_of_values_at_init_are_refused(tx):
    shapes = jax.eval_shape(lambda: TREE)
    with raises(TypeError, "jax.ShapeDtypeStruct", "jax.eval_shape(tx.init, params)"):
        tx.init(shapes)
    state = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(TREE))


@NEEDS_PARAMS
def test_params_that_are_not_finite_at_init_are_refused(tx):
    for bad in (np.nan, np.inf, -np.inf):
        with raises(ValueError, "params['a/kernel']", "NaN or an infinity"):
            tx.init({"a": {"kernel": W.at[1].set(bad)}, "b": W})
    with raises(ValueError, "params holds a NaN"):  # A bare array has no path.
        tx.init(W * jnp.nan)


# --- the warning ----------------------------------------------------------------------

STUCK = {"dense": {"bias": jnp.zeros(3), "kernel": W}, "gate": jnp.zeros(())}
PAPER = madax.madam(zero_init_scale=0)


@pytest.mark.parametrize("tx", [PAPER, madax.scale_by_sign_log(zero_init_scale=0.0)])
def test_warning_for_leaves_that_can_never_move(tx):
    with pytest.warns(UserWarning) as record:
        tx.init(STUCK)
    assert len(record) == 1
    message = str(record[0].message)
    assert re.match(r"dense/bias, gate: .*zeros.*zero_init_scale", message)
    assert "kernel" not in message


def test_warning_names_a_bare_array():
    with pytest.warns(UserWarning, match="^params: "):
        PAPER.init(jnp.zeros(3))


def test_warning_points_to_the_call_of_init():
    with pytest.warns(UserWarning) as record:
        madax.scale_by_sign_log(zero_init_scale=0.0).init(STUCK)
    assert record[0].filename == __file__


SILENT = {
    "under jit": lambda: jax.jit(PAPER.init)(STUCK),
    "under eval_shape": lambda: jax.eval_shape(PAPER.init, STUCK),
    "by default": lambda: madax.madam().init(STUCK),
    "with other leaves": lambda: PAPER.init({"w": W, "empty": jnp.zeros(0)}),
}


@pytest.mark.parametrize("name", SILENT)
def test_good_input_warns_of_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SILENT[name]()
