"""A QuantizedArray stands where the array that it decodes to would."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERATORS, formats
from helpers import mostly_nightly

import madax
from madax import QuantizedArray

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHAPE = (6, 4, 5)
KINDS = list(formats("log8", "symlog16", "uniform8").values())
# One for all, as many as the channels of an axis or of two, and of a lower rank.
SCALES = [(), (1, 1, 1), (5,), (1, 4, 1), (6, 1, 5)]


def make(fmt=KINDS[0], scale_shape=(1, 1, 1), shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-fmt.levels, fmt.levels + 1, shape)
    scale = rng.uniform(0.5, 2, scale_shape)
    return QuantizedArray(
        jnp.asarray(codes, fmt.storage_dtype), jnp.asarray(scale, jnp.float32), fmt
    )


def decoded(w):
    return np.asarray(w.scale * w.format.decode(w.codes))


ROWS, J = np.array([[0, 5], [2, 2]]), np.array([3, -1])
INDICES = {
    "all": ...,
    "int": 2,
    "negative": -1,
    "numpy int": np.int64(1),
    "slice": slice(1, 4),
    "steps": slice(None, None, -2),
    "ints": (1, 2, 3),
    "ellipsis": (..., 0),
    "ellipsis between": (1, ..., slice(2)),
    "ellipsis of none": (0, slice(None), ..., slice(3)),
    "new axes": (None, slice(2), None, 1),
    "empty": (slice(0), slice(3, 1)),
    "rows": ROWS,
    "traced rows": jnp.asarray(ROWS),
    "middle": (slice(None), J),
    "last": (..., J),
    "pairs": (ROWS, 1, ROWS % 5),
    "pairs apart": (J, slice(None), J),
    "int and rows apart": (2, slice(1, 3), J),
    "scalar arrays": (jnp.int32(1), slice(None), jnp.int32(2)),
    "mask": np.arange(6) % 2 == 0,
    "mask of two axes": np.ones(SHAPE[:2], bool),
    "nothing": (),
}


@jax.jit
def take_all(w):
    return {name: w[index] for name, index in INDICES.items()}


@pytest.mark.parametrize(
    "scale_shape", mostly_nightly([(x,) for x in SCALES], ((),), ((6, 1, 5),))
)
def test_indexing_takes_what_indexing_the_values_takes(scale_shape):
    w = make(scale_shape=scale_shape)
    values = decoded(w)
    for name, taken in take_all(w).items():
        assert taken.dtype == jnp.float32
        np.testing.assert_array_equal(taken, values[INDICES[name]], err_msg=name)
    for index in ((..., J), 2):
        assert isinstance(w[index], jax.Array)
        np.testing.assert_array_equal(w[index], values[index])


def test_a_bad_index_is_the_error_of_an_array():
    w = make()
    for index in ((0, 0, 0, 0), 0.5, [0, 1], (slice(None), "x")):
        with pytest.raises((IndexError, TypeError)) as of_values:
            w.dequantize()[index]
        with pytest.raises(of_values.type, match=re.escape(str(of_values.value)[:30])):
            w[index]


@pytest.mark.parametrize("operation", OPERATORS, ids=lambda f: f.__name__)
def test_operators_match_the_values(operation):
    w, other = make(), make(KINDS[1], (1, 4, 1), seed=1)
    values = w.dequantize()
    for x in (2, 0.5, np.float32(3), np.arange(5.0, dtype=np.float32), values):
        for pair, of_values in (((w, x), (values, x)), ((x, w), (x, values))):
            result, expected = operation(*pair), operation(*of_values)
            assert isinstance(result, jax.Array)
            assert result.dtype == expected.dtype
            np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(
        operation(w, other), operation(values, other.dequantize())
    )


@pytest.mark.parametrize("fmt", KINDS, ids=repr)
def test_methods_match_the_values(fmt):
    w = make(fmt, (1, 4, 1))
    values = decoded(w)
    same = np.testing.assert_array_equal
    assert (w.dtype, w.shape, w.ndim, w.size, len(w)) == (
        jnp.float32,
        SHAPE,
        3,
        120,
        6,
    )
    same(w.T, values.T)
    same(w.mT, np.swapaxes(values, 1, 2))
    same(w.transpose(2, 0, 1), values.transpose(2, 0, 1))
    same(w.reshape(4, -1), values.reshape(4, -1))
    same(w.reshape((24, 5)), values.reshape(24, 5))
    same(w.astype(jnp.bfloat16), jnp.asarray(values).astype(jnp.bfloat16))
    same(-w, -values)
    same(+w, values)
    same(abs(w), abs(values))
    same(np.stack(list(w)), values)
    same(np.asarray(w), values)
    assert np.asarray(w, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="leave copy=False out"):
        np.asarray(w, copy=False)
    matrix = make(fmt, (1, 1), (4, 5))
    x = np.random.default_rng(1).standard_normal((3, 4), np.float32)
    same(x @ matrix, jnp.asarray(x) @ matrix.dequantize())
    same(jnp.asarray(x) @ matrix, jnp.asarray(x) @ matrix.dequantize())
    same(matrix @ x.T[[0, 1, 2, 3, 0]], matrix.dequantize() @ x.T[[0, 1, 2, 3, 0]])
    scalar = make(fmt, (), ())
    assert float(scalar) == decoded(scalar) and bool(scalar) == bool(decoded(scalar))
    with pytest.raises(TypeError):
        hash(w)


@pytest.mark.parametrize(
    "compute",
    [
        jnp.sqrt,
        lambda w: jnp.sum(w[...]),
        lambda w: 0.1 + w,
        lambda w: jnp.reshape(w, (4, 30)),
        lambda w: jnp.take(w, jnp.arange(2), axis=0),
        lambda w: jnp.einsum("abc,abd->cd", w, w),
        lambda w: jnp.where(w > 0, w, 0),
        lambda w: jnp.concatenate([w, w]),
        lambda w: jnp.asarray(w, jnp.float16),
        lambda w: jax.nn.relu(w),
        lambda w: jax.vmap(lambda row: row @ row.T)(w),
        lambda w: jax.lax.scan(lambda c, row: (c + row[1], row[0]), jnp.ones(5), w),
        lambda w: jax.checkpoint(lambda w: w * w)(w),
        lambda w: jax.lax.map(lambda row: row.T, w),
    ],
)
def test_functions_of_arrays_take_it(compute):
    of_values = lambda w: compute(w.dequantize())
    w = make(scale_shape=(6, 1, 5))
    for wrap in (lambda f: f, jax.jit):
        jax.tree.map(
            np.testing.assert_array_equal, wrap(compute)(w), wrap(of_values)(w)
        )


def test_steps_of_codes_have_no_value():
    w = make()
    params = {"w": w}
    tx = madax.madam(0.1)
    grads = {"w": jnp.ones(SHAPE)}
    steps = tx.update(grads, tx.init(params), params)[0]["w"]
    assert steps.shape == SHAPE and steps.dtype == w.format.step_dtype
    through_jit = jax.jit(lambda u: u)(steps)
    for use in (
        lambda u: u + 1,
        lambda u: 2.0 * u,
        lambda u: u * jnp.ones(5),
        lambda u: jnp.ones(5) * u,
        lambda u: np.ones(5) - u,
        lambda u: -u,
        lambda u: u == u,
        lambda u: u @ u.mT,
        lambda u: u[0],
        lambda u: u.T,
        lambda u: u.astype(jnp.float32),
        lambda u: u.reshape(-1),
        lambda u: u.dequantize(),
        lambda u: next(iter(u)),
        jnp.sqrt,
        np.asarray,
        madax.grad(lambda u: 1.0),
    ):
        for u in (steps, through_jit):
            with pytest.raises(TypeError, match=r"used as a number.*apply_updates"):
                use(u)


def test_a_look_up_in_a_table_decodes_the_rows_it_takes():
    table = make(scale_shape=(1, 1), shape=(5000, 8))
    rows = jnp.arange(3)
    for params in (table, make(scale_shape=(5000, 1), shape=(5000, 8))):
        compiled = jax.jit(lambda w, i: w[i]).lower(params, rows).compile()
        assert "f32[5000,8]" not in compiled.as_text()
        # Not outside of jit, either: every operation is a program of its own there.
        jaxpr = jax.make_jaxpr(lambda w, i: w[i])(params, rows)
        floats = [v.aval for e in jaxpr.eqns for v in e.outvars if v.aval.ndim == 2]
        assert not [a for a in floats if a.size == table.size]
