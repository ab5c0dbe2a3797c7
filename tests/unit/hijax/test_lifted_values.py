"""Lifted codes in other people's functions: the values and derivatives of floats."""

import copy
import inspect
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, OPERATORS, every_format
from helpers import mostly_nightly, needs_hijax, normal, same

import madax

pytestmark = [needs_hijax, pytest.mark.usefixtures("quick_compiles")]

FMT = FORMATS["symlog8"]
X = normal(5, 4, seed=1)


def make(fmt=FMT, dtype=None):
    """Lifted codes, and the floats that they decode to."""
    params = {"a": normal(4, 6), "b": normal(6, 4, seed=2)}
    params = madax.quantize_params(params, fmt, channel_axis=-1)
    params["bias"] = jnp.ones(4)
    floats = madax.dequantize_params(params)
    floats = {k: w.astype(dtype or w.dtype) for k, w in floats.items()}
    return madax.hijax.lift(params, dtype), floats | {"bias": params["bias"]}


def loss(p, x=X):
    hidden = jnp.tanh(x @ p["a"])
    return jnp.mean((hidden @ p["b"] + p["bias"] - 1) ** 2).astype(jnp.float32)


@every_format
def test_gradients_are_those_of_madax(fmt):
    params, floats = make(fmt)
    actual = jax.jit(jax.value_and_grad(loss))(params)
    same(actual, jax.jit(jax.value_and_grad(loss))(floats))
    same(actual, jax.jit(madax.value_and_grad(loss))(madax.hijax.lower(params)))
    assert all(np.any(g != 0) for g in jax.tree.leaves(actual[1]))


def test_they_decode_to_a_dtype_of_choice():
    params, floats = make(dtype=jnp.bfloat16)
    assert params["a"].dtype == (params["a"] @ floats["b"]).dtype == jnp.bfloat16
    actual = jax.jit(jax.value_and_grad(loss))(params)
    assert actual[1]["a"].dtype == jnp.bfloat16
    same(actual, jax.jit(jax.value_and_grad(loss))(floats))


@jax.custom_vjp
def clipped(w):
    return jnp.sin(jnp.asarray(w))


clipped.defvjp(
    lambda w: (clipped(w), jnp.asarray(w)),
    lambda w, g: (jnp.clip(g, -1, 1) * jnp.cos(w),),
)


def hessian_product(p, tangent):
    def dot(p):
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(p), tangent)
        return jax.tree.reduce(operator.add, products)

    return jax.grad(dot)(p)


saved = jax.checkpoint_policies.dots_saveable
TRANSFORMS = {
    "eager": lambda p, _: jax.value_and_grad(loss)(p),
    "grad of jit": lambda p, _: jax.grad(jax.jit(loss))(p),
    "jvp": lambda p, t: jax.jvp(loss, (p,), (t,)),
    "linearize": lambda p, t: jax.linearize(loss, p)[1](t),
    "grad of grad": hessian_product,
    "checkpoint": lambda p, _: jax.grad(jax.checkpoint(loss))(p),
    "a policy": lambda p, _: jax.grad(jax.checkpoint(loss, policy=saved))(p),
    "cond": lambda p, _: jax.grad(
        lambda p: jax.lax.cond(X[0, 0] > 0, loss, lambda p: 2 * loss(p), p)
    )(p),
    "per example": lambda p, _: jax.vmap(jax.grad(loss), (None, 0))(p, X[:, None]),
    "custom_vjp": lambda p, _: jax.grad(lambda p: jnp.sum(clipped(p["a"])))(p),
    "penalty": lambda p, _: jax.grad(
        lambda p: sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
    )(p),
}


@pytest.mark.parametrize(
    "transform", mostly_nightly(TRANSFORMS, "grad of grad", "a policy", "custom_vjp")
)
def test_transformations_see_floats(transform):
    params, floats = make()
    run = TRANSFORMS[transform]
    run = run if transform == "eager" else jax.jit(run)
    same(run(params, floats), run(floats, floats))


def test_quantising_again_keeps_codes_and_scales():
    w = madax.quantize_params(normal(64, 48), FMT)
    quantise = lambda params: madax.quantize_params(params, FMT)
    for run in (quantise, jax.jit(quantise)):
        again = run({"w": madax.hijax.lift(w)})
        assert isinstance(again["w"], madax.QuantizedArray)
        same(again["w"], w)


def test_files_hold_codes_and_decoded_trees_floats():
    w = madax.quantize_params(normal(64, 48), FMT)
    params = {"w": madax.hijax.lift(w), "bias": jnp.ones(48)}
    same(madax.to_flat_dict(params), madax.to_flat_dict({**params, "w": w}))

    def loss(params):
        floats = madax.dequantize_params(params)
        return jax.lax.integer_pow(floats["w"], 2).sum()

    assert type(madax.dequantize_params(params)["w"]) is type(jnp.ones(1))
    same(madax.dequantize_params(params, jnp.bfloat16)["w"], w.dequantize(jnp.bfloat16))
    same(jax.jit(jax.grad(loss))(params)["w"], 2 * w.dequantize())


def stack():
    w = madax.quantize_params(normal(3, 4, 4), FMT, channel_axis=0)
    return madax.hijax.lift(w), w.dequantize()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint])
def test_layers_are_scanned(wrap):
    def run(w):
        body = wrap(lambda x, w: (jnp.tanh(x @ w), jnp.sum(w)))
        x, sums = jax.lax.scan(body, X, w, length=3)
        return jnp.sum(x) + jnp.sum(sums)

    w, floats = stack()
    same(jax.jit(jax.grad(run))(w), jax.jit(jax.grad(run))(floats))


def test_codes_are_mapped_over_and_returned():
    w, floats = stack()
    run = jax.jit(jax.vmap(jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(X @ w)))))
    same(run(w), run(floats))
    # Made inside of a map, also where it maps no scale.
    lift = lambda codes, scale: madax.hijax.lift(
        madax.QuantizedArray(codes, scale, FMT)
    )
    lowered = madax.hijax.lower(w)
    again = jax.jit(jax.vmap(lift))(lowered.codes, lowered.scale)
    same(madax.hijax.lower(again), lowered)
    one = jax.vmap(lift, (1, None))(lowered.codes, lowered.scale[0])
    np.testing.assert_array_equal(
        madax.hijax.lower(one).codes, jnp.moveaxis(lowered.codes, 1, 0)
    )
    same(jax.jit(jax.vmap(lambda w: w))(w)[...].T, floats.T)


def results_of_operators(w, x):
    both = [f(*args) for f in OPERATORS for args in ((w, x), (x, w), (w, w))]
    return [*both, -w, +w, abs(w), w @ x.T, x.T @ w, 2 * w, w + 1.0]


def results_of_methods(w):
    return [
        *(w.T, w.mT, w.real, w.sum(), w.mean(0), w.reshape(2, 12), w.astype(jnp.int8)),
        *(w[1], w[:, None, 2:], w[jnp.array([3, 0])], w.at[0].set(1), w.ravel()),
        *(w.max(), w.argmin(1), w.dot(w.T), w.transpose(), w.flatten(), w.clip(0)),
    ]


def results_of_functions(w):
    return [
        *(jnp.einsum("ij,kj->ik", w, w), jnp.take(w, jnp.array([1]), 0)),
        *(jnp.where(w > 0, w, 0), jnp.concatenate([w, w]), jnp.zeros_like(w)),
        *(jnp.stack([w, w]), jnp.full_like(w, 2), jax.nn.relu(w), jnp.linalg.norm(w)),
        *(jax.nn.softmax(w), jnp.sort(w), jnp.broadcast_to(w, (2, 4, 6))),
    ]


def test_arrays_of_jax_do_the_same():
    w, floats = (tree["a"] for tree in make())
    x = normal(4, 6, seed=3)
    for run in (
        lambda w: results_of_operators(w, x),
        results_of_methods,
        results_of_functions,
    ):
        same(jax.jit(run)(w), jax.jit(run)(floats))
        same(run(w), run(floats))


def test_functions_of_lax_take_the_decoded_tree():
    params, floats = make()

    def run(p):
        p = madax.hijax.decode(p)
        logits = jax.lax.dot_general(X, p["a"], (((1,), (0,)), ((), ())))
        return jnp.sum(jax.lax.logistic(logits) * jax.lax.stop_gradient(p["a"][0]))

    same(jax.jit(jax.grad(run))(params), jax.jit(jax.grad(run))(floats))
    same(madax.hijax.decode(params), floats)


def test_python_and_numpy_do_the_same():
    w, floats = (tree["a"] for tree in make())
    np.testing.assert_array_equal(np.asarray(w), floats)
    with pytest.raises(ValueError, match="leave copy=False out"):
        np.asarray(w, copy=False)
    np.testing.assert_array_equal(np.sin(w), np.sin(floats))
    same(list(w), list(floats))
    assert len(w) == 4
    one = madax.hijax.lift(madax.QuantizedArray(jnp.int8(90), jnp.float32(3), FMT))
    assert float(one) == complex(one) == np.asarray(one).item() and bool(one)
    assert int(one) == int(float(one))


def test_it_looks_like_an_array_of_floats():
    w, floats = (tree["a"] for tree in make())
    for name in ("shape", "dtype", "ndim", "size", "weak_type", "sharding"):
        assert getattr(w, name) == getattr(floats, name), name
    assert isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jnp.floating)
    assert w.nbytes == 24 + 4 * 6 and not w.is_deleted()
    assert w.devices() == floats.devices() and w.committed == floats.committed
    assert jax.block_until_ready(w) is w
    assert repr(w) == f"LiftedArray(codes8[4,6], {FMT!r})"
    jax.jit(lambda w: np.testing.assert_equal((*w.shape, w.ndim), (4, 6, 2)))(w)
    jax.jit(lambda w: np.testing.assert_equal(len(w), 4))(w)


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda w: w.copy(),
        lambda w: pickle.loads(pickle.dumps(w)),
        jax.jit(lambda w: w.copy()),
        jax.jit(copy.deepcopy),
    ],
)
def test_copies_are_codes(copied):
    w = make(dtype=jnp.bfloat16)[0]["a"]
    again = copied(w)
    assert type(again) is type(w) and again.dtype == jnp.bfloat16
    same(madax.hijax.lower(again), madax.hijax.lower(w))


def test_programs_are_exported_and_compiled_ahead():
    params, floats = make()
    run = jax.jit(lambda a, x: x @ a)
    same(run.lower(params["a"], X).compile()(params["a"], X), run(floats["a"], X))
    w = madax.hijax.lower(params["a"])
    exported = jax.export.export(run)(params["a"], X)
    assert [x.dtype for x in exported.in_avals] == [jnp.int8, jnp.float32, jnp.float32]
    same(exported.call([w.codes, w.scale], [X]), run(floats["a"], X))


def test_shapes_are_evaluated():
    params, _ = make()
    shapes = jax.eval_shape(jax.grad(loss), params)
    assert shapes["a"].shape == (4, 6) and shapes["a"].dtype == jnp.float32
    lowered = jax.eval_shape(madax.hijax.lower, params)
    assert lowered["a"].codes.dtype == jnp.int8


def temporaries(run, *args):
    return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_they_take_no_more_memory_than_madax_s():
    """Of layers that are looped over and rematerialised, and a table."""
    layers = [normal(64, 64, seed=i) for i in range(6)]
    layers = madax.quantize_params(layers, FMT)

    def run(layers):
        x = normal(2, 64)
        for w in layers:
            x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x)
        return jnp.sum(x)

    lifted = madax.hijax.lift(layers)
    ours = temporaries(madax.grad(run), layers)
    assert temporaries(jax.grad(run), lifted) <= ours + 1000

    rows = 20_000
    table = madax.hijax.lift(madax.quantize_params(jnp.ones((rows, 16)), FMT))
    for take in (
        lambda table, ids: table[ids],
        lambda table, ids: jnp.take(table, ids, axis=0),
    ):
        assert temporaries(take, table, jnp.arange(5)) < 0.01 * 4 * table.size


def test_a_tree_is_lifted_and_lowered_on_the_same_buffers():
    params = {"w": madax.quantize_params(normal(4, 6), FMT), "b": jnp.ones(3)}
    lifted = madax.hijax.lift(params)
    assert lifted["b"] is params["b"]
    lowered = madax.hijax.lower(lifted)
    same(lowered, params)
    assert lowered["w"].codes is params["w"].codes
    same(madax.hijax.lower(params), params)
    # What was lifted before stays.
    more = madax.hijax.lift({"one": lifted["w"], "two": params["w"]})
    assert type(more["one"]) is type(more["two"])


def test_signatures_are_those_of_the_module():
    assert sorted(madax.hijax.__all__) == dir(madax.hijax)
    assert list(inspect.signature(madax.hijax.lift).parameters) == ["params", "dtype"]
