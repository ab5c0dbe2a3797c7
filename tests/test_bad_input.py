"""One clear error a mistake: the argument, the value, what to do."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import madax

REMEDY = r"\b(pass|use|call|take|train|split|leave|initialise|must be|must satisfy)\b"

RATE = ("learning_rate",)
POSITIVE = ("p_scale", "g_bound")
NON_NEGATIVE = ("floor", "zero_init_scale")
DECAY = ("b1", "b2")
SEED = ("seed",)

NUMBERS = {
    madax.madam: (*RATE, *POSITIVE, *NON_NEGATIVE, *DECAY, *SEED),
    madax.bbit_madam: (
        *("learning_rate", "bits", "base_precision", "b2", "p_scale", "g_bound"),
        "zero_init_scale",
    ),
    madax.lns_madam: (*RATE, *POSITIVE, "zero_init_scale", "b2"),
    madax.scale_by_second_moment: (*DECAY, *SEED),
    madax.scale_by_sign_log: NON_NEGATIVE,
    madax.clip_log_weights: ("p_scale", "zero_init_scale"),
    madax.lns_quantize: ("p_scale", "zero_init_scale", *SEED),
}
PAIRS = [(make, name) for make, names in NUMBERS.items() for name in names]


def pair_id(value):
    return getattr(value, "__name__", None) or str(value)


def raises(kind, *parts):
    """The error must hold each part, and say what to do."""
    pattern = ".*".join(map(re.escape, parts))
    return pytest.raises(kind, match=f"(?s)(?=.*{pattern}).*{REMEDY}")


@pytest.mark.parametrize(
    "value",
    ["0.1", None, True, np.True_, [0.1], (0.1,), {}, object(), 0.1j],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(("make", "name"), PAIRS, ids=pair_id)
def test_wrong_types(make, name, value):
    if name in ("b1", "p_scale") and value is None:
        return
    # An int in a range: both at fault.
    kind = (TypeError, ValueError) if name == "bits" else TypeError
    with raises(kind, name, repr(value)):
        make(**{name: value})


@pytest.mark.parametrize(
    "value", [np.array("a"), np.array(None), np.array(True), jnp.array(True)], ids=repr
)
def test_arrays_of_something_else_than_numbers(value):
    with raises(TypeError, "learning_rate", "pass"):
        madax.madam(value)


OUT_OF_RANGE = {
    "learning_rate": [-1, -1e-9, np.nan, np.inf, -np.inf],
    "p_scale": [0, -1, np.nan, -np.inf],
    "g_bound": [0, -1, np.nan, -np.inf],
    "floor": [-1, np.nan, np.inf],
    "zero_init_scale": [-0.1, np.nan, np.inf],
    "b1": [1, 1.5, -0.1, np.nan, np.inf],
    "b2": [1, 1.5, -0.1, np.nan, np.inf],
    "bits": [0, 16, -1],
    "base_precision": [0, -0.1, 2.0, np.nan, np.inf],
}
VALUES = [
    (make, name, value) for make, name in PAIRS for value in OUT_OF_RANGE.get(name, ())
]


@pytest.mark.parametrize("wrap", [lambda x: x, np.float32, jnp.asarray])
@pytest.mark.parametrize(("make", "name", "value"), VALUES, ids=pair_id)
def test_out_of_range(make, name, value, wrap):
    if name in ("bits", "base_precision") and wrap is jnp.asarray:
        return  # static: any array is a wrong type
    wrapped = wrap(value)
    with raises(ValueError, name, f"{wrapped}"):
        make(**{name: wrapped})


@pytest.mark.parametrize("value", [np.ones(1), np.ones((2, 3)), jnp.ones(4)])
@pytest.mark.parametrize(("make", "name"), PAIRS, ids=pair_id)
def test_arrays_where_a_scalar_belongs(make, name, value):
    with raises((TypeError, ValueError), name):
        make(**{name: value})


def test_arrays_of_rates_point_to_vmap():
    with pytest.raises(ValueError, match=r"learning_rate.*scalar.*\(3,\).*jax\.vmap"):
        madax.madam(np.ones(3))


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.array(0.5)])
def test_numbers_of_every_kind_are_fine(value):
    madax.madam(value, p_scale=value, floor=value, zero_init_scale=jnp.asarray(value))


def test_unbounded_and_schedules_are_fine():
    madax.madam(optax.constant_schedule(0.1), p_scale=np.inf, g_bound=np.inf)


W = jnp.array([1.0, -2.0])
TREE = {"a": {"kernel": W}, "b": jnp.ones((2, 3))}

TRANSFORMS = {
    "madam": madax.madam(b1=0.9),
    "bbit_madam": madax.bbit_madam(),
    "lns_madam": madax.lns_madam(),
    "second_moment": madax.scale_by_second_moment(),
    "sign_log": madax.scale_by_sign_log(),
    "clip": madax.clip_log_weights(),
    "lns_quantize": madax.lns_quantize(),
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
    "function": (len, "len"),
}


@pytest.mark.parametrize("name", BAD_LEAVES)
@EVERY
def test_leaves_that_cannot_be_trained(tx, name):
    bad, shown = BAD_LEAVES[name]
    with raises(TypeError, "params['a/kernel']", shown):
        tx.init({"a": {"kernel": bad}, "b": W})
    with raises(TypeError, "params", shown):
        tx.init(bad)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@NEEDS_PARAMS
def test_floats_in_which_updates_are_lost(tx, dtype):
    params = {"a": W, "b": W.astype(dtype)}
    with raises(TypeError, "params['b']", dtype.__name__, "quantize_params"):
        tx.init(params)
    codes = madax.quantize_params(jnp.ones((4, 4), dtype), madax.UniformFormat(8))
    tx.init({"a": W, "b": codes})


@pytest.mark.parametrize("name", BAD_LEAVES)
@EVERY
def test_updates_that_are_no_gradients(tx, name):
    bad, shown = BAD_LEAVES[name]
    params = {"a": W, "b": W}
    with raises(TypeError, "updates['b']", shown):
        tx.update({"a": W, "b": bad}, tx.init(params), params)


@NEEDS_PARAMS
def test_missing_params(tx):
    with raises(ValueError, "params is None", "update(grads, state, params)"):
        tx.update(TREE, tx.init(TREE))


@pytest.mark.parametrize("made_for", ["codes", "floats"])
def test_a_state_of_codes_is_none_of_floats(made_for):
    w = jnp.ones((4, 4))
    both = {"floats": w, "codes": madax.quantize_params(w, madax.UniformFormat(8))}
    state = madax.madam().init(both.pop(made_for))
    (params,) = both.values()
    with raises(ValueError, "state was made for", "call init again"):
        madax.madam().update(w, state, params)


MISMATCHES = {
    "missing key": {"a": {"kernel": W}},
    "other key": {"a": {"bias": W}, "b": jnp.ones((2, 3))},
    "extra leaf": {**TREE, "c": W},
    "None for a node": {"a": None, "b": jnp.ones((2, 3))},
    "another container": ({"kernel": W}, jnp.ones((2, 3))),
    "bare array": W,
}


@pytest.mark.parametrize("name", MISMATCHES)
@EVERY
def test_updates_of_another_structure(tx, name):
    with raises(ValueError, "updates", "same tree structure", "gradients"):
        tx.update(MISMATCHES[name], tx.init(TREE), TREE)


@EVERY
def test_updates_of_another_shape(tx):
    updates = {**TREE, "b": jnp.ones((3, 2))}
    with raises(ValueError, "updates['b']", "(3, 2)", "(2, 3)"):
        tx.update(updates, tx.init(TREE), TREE)
    # No broadcasting, either.
    with raises(ValueError, "updates['b']", "(3,)", "(2, 3)"):
        tx.update({**TREE, "b": jnp.ones(3)}, tx.init(TREE), TREE)


@EVERY
def test_state_made_for_other_params(tx):
    state = tx.init({"a": {"kernel": W}})
    with raises(ValueError, "state"):
        tx.update(TREE, state, TREE)


def test_moments_made_for_other_shapes():
    state = TRANSFORMS["madam"].init({**TREE, "b": jnp.ones((3, 2))})
    with raises(ValueError, "state.v['b']", "(3, 2)"):
        TRANSFORMS["madam"].update(TREE, state, TREE)


@NEEDS_PARAMS
def test_shapes_instead_of_values_at_init(tx):
    shapes = jax.eval_shape(lambda: TREE)
    with raises(TypeError, "jax.ShapeDtypeStruct", "jax.eval_shape(tx.init, params)"):
        tx.init(shapes)
    state = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(TREE))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@NEEDS_PARAMS
def test_params_that_are_not_finite_at_init(tx, bad):
    with raises(ValueError, "params['a/kernel']", "NaN or an infinity", "initialise"):
        tx.init({"a": {"kernel": W.at[1].set(bad)}, "b": W})


BARE = {
    "nan params": (lambda tx: tx.init(W * jnp.nan), ValueError, "params holds"),
    "shape": (
        lambda tx: tx.update(jnp.ones(3), tx.init(W), W),
        ValueError,
        r"updates has shape \(3,\), but (params|state\.v) has shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_bare_arrays_have_no_path_to_name(name):
    mistake, kind, message = BARE[name]
    with pytest.raises(kind, match=message):
        mistake(TRANSFORMS["madam"])


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
    "under jit": (lambda: jax.jit(PAPER.init)(STUCK)),
    "under eval_shape": (lambda: jax.eval_shape(PAPER.init, STUCK)),
    "by default": (lambda: madax.madam().init(STUCK)),
    "with other leaves": (lambda: PAPER.init({"w": W, "empty": jnp.zeros(0)})),
}


@pytest.mark.parametrize("name", SILENT)
def test_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SILENT[name]()
