"""Trees of codes: what is no arithmetic of weights is refused, or gives NaN or inf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from flax import nnx
from helpers import different, normal, raises
from jax.flatten_util import ravel_pytree

import madax
from madax import QuantizedArray, UniformFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = FORMATS["symlog8"]
PARAMS = {"w": madax.quantize_params(normal(4, 4), FMT), "b": jnp.ones(4)}
X = jnp.ones((2, 4))
GRADS = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}


def floats_as(dtype):
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return lambda tree: jax.tree.map(
        lambda x: x.astype(dtype) if floating(x) else x, tree
    )


REFUSED = {
    "average": lambda p: jax.tree.map(lambda a, b: (a + b) / 2, p, p),
    "interpolation": lambda p: jax.tree.map(lambda a: 0.9 * a, p),
    "cast to bfloat16": floats_as(jnp.bfloat16),
    "cast to float16": floats_as(jnp.float16),
    "sum of squares": lambda p: optax.tree.norm(p, squared=True),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_changes_the_dtype_of_codes_or_scales_is_refused(change):
    for wrap in (lambda f: f, jax.jit, lambda f: lambda p: madax.grad(f)(p)):
        with raises(TypeError, "of a QuantizedArray became", "dequantize_params"):
            wrap(change)(PARAMS)


NO_VALUE = {
    "negative": lambda p: jax.tree.map(jnp.negative, p),
    "subtract": lambda p: optax.tree.sub(p, p),
    "floor_divide": lambda p: jax.tree.map(lambda x: x // 2, p),
}


@pytest.mark.parametrize("change", NO_VALUE.values(), ids=NO_VALUE)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_codes_whose_scale_is_not_positive_are_nan(change, fmt):
    params = {"w": madax.quantize_params(normal(4, 4, scale=0.1), fmt)}
    for changed in (change(params), jax.jit(change)(params)):
        assert np.all(np.isnan(changed["w"].dequantize()))
        assert np.isnan(changed["w"][0, 0])
        with raises(ValueError, "params['w'] holds codes without a scale"):
            madax.madam().init(changed)


PENALTIES = {
    "all": lambda p: sum(jnp.sum(x**2.0) for x in jax.tree.leaves(p)),
    "matrices": lambda p: sum(
        jnp.sum(x**2.0) for x in jax.tree.leaves(p) if x.ndim > 1
    ),
    "of magnitudes": lambda p: sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p)),
    "reduced": lambda p: jax.tree.reduce(lambda sum, x: sum + jnp.vdot(x, x), p, 0.0),
    "method": lambda p: sum(x.sum() for x in jax.tree_util.tree_leaves(p)),
    "function": lambda p: sum(map(jnp.linalg.norm, jax.tree.leaves(p))),
    "by path": lambda p: sum(
        jnp.mean(x * x) for _, x in jax.tree_util.tree_leaves_with_path(p)
    ),
    "in a scan": lambda p: jax.lax.scan(
        lambda sum, x: (sum + jnp.vdot(*[jax.tree.leaves(x)[-1]] * 2), None), 0.0, p
    )[0],
}


STACK = madax.quantize_params(normal(8, 4, 4), FMT, channel_axis=0)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_penalty_over_the_leaves_of_codes_is_refused(penalty, wrap):
    loss = lambda w: jnp.sum(w**2) + wrap(penalty)(w)
    with raises(TypeError, "leaf of codes", "jax.tree.leaves(madax.dequantize_params"):
        madax.value_and_grad(loss)(STACK)


def test_so_is_the_penalty_of_a_module():
    def loss(model):
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        return model(X, lambda w: w[...]).sum() + sum(jnp.sum(x**2) for x in params)

    with raises(TypeError, "leaf of codes", "madax.dequantize_params"):
        madax.value_and_grad(loss)(madax.quantize_params(Product(), FMT))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_cannot_be_refused_is_infinite(dtype):
    for leaves in (lambda p: jax.tree.flatten(p)[0], lambda p: [ravel_pytree(p)[0]]):
        loss = lambda w, leaves=leaves: sum(jnp.sum(x**2.0) for x in leaves(w))
        for wrap in (lambda f: f, jax.jit):
            assert np.isinf(wrap(madax.value_and_grad(loss, dtype=dtype))(STACK)[0])


def test_leaves_tell_their_shapes_and_make_a_tree_again():
    def loss(w):
        leaves, treedef = jax.tree.leaves(w), jax.tree.structure(w)
        assert [x.shape for x in leaves] == [(8, 4, 4), (8, 1, 1), (8, 4, 4)]
        assert sum(x.size for x in leaves) == 264 and len(leaves[0]) == 8
        assert leaves[0].dtype == jnp.int8 and not hasattr(leaves[0], "format_of")
        assert repr(leaves[1]) == "LeafOfCodes(shape=(8, 1, 1), dtype=float32)"
        return jnp.sum(treedef.unflatten(leaves) ** 2)

    got = madax.value_and_grad(loss)(STACK)
    expected = jax.value_and_grad(lambda w: jnp.sum(w**2))(STACK.dequantize())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, expected)


def test_a_penalty_over_decoded_leaves_matches_the_weights():
    penalty = lambda p: PENALTIES["all"](madax.dequantize_params(p))
    value, grads = jax.jit(madax.value_and_grad(penalty))(PARAMS)
    values = np.float64(PARAMS["w"].dequantize())
    np.testing.assert_allclose(value, np.sum(values**2) + 4, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], 2 * values, rtol=1e-6)


def test_probes_are_zero_again_behind_every_boundary():
    """A leaf of a probe is huge; what is put together of leaves must not be."""
    stack = madax.quantize_params(normal(3, 4, 4), FMT, channel_axis=0)

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ jax.tree.map(lambda leaf: leaf, w)), None

    def loss(stack):
        x, _ = jax.lax.scan(layer, jnp.ones(4), stack)
        mapped = jax.vmap(lambda w: jnp.sum(jnp.cos(w[...])))(stack)
        return jnp.sum(x) + jnp.sum(mapped)

    got = jax.jit(madax.value_and_grad(loss))(stack)
    expected = jax.jit(jax.value_and_grad(loss))(stack.dequantize())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), got, expected)


def test_a_scale_without_its_codes_is_not_trained():
    """As of equinox.filter_grad, to which codes are no weights, and scales are."""
    floating = lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None
    with raises(TypeError, "has a scale but no codes", "madax.value_and_grad"):
        jax.tree.map(floating, PARAMS)


# --- messages -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optax.adam, optax.sgd, optax.adamw])
def test_a_plain_optimizer_names_the_wrapper(make):
    tx = make(0.1)
    with pytest.raises(ValueError, match=r"madax\.with_quantized_params"):
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        optax.apply_updates(PARAMS, updates)


def test_multi_steps_is_told_apart_from_its_transformation():
    steps = optax.MultiSteps(optax.adam(0.1), 2)
    with raises(TypeError, "got <", "MultiSteps", ".gradient_transformation()"):
        madax.with_quantized_params(steps)
    madax.with_quantized_params(steps.gradient_transformation()).init(PARAMS)


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda xw, ct: (ct @ xw[1].T, xw[0].T @ ct)
)


class Product(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(normal(4, 4))

    def __call__(self, x, take):
        return product(x, take(getattr(self.w, "get_value", lambda: self.w.value)()))


def test_a_custom_vjp_takes_arrays():
    x = normal(2, 4)
    loss = lambda w: jnp.sum(product(x, w))
    with raises(TypeError, "a jax.custom_vjp got codes", "w[...]"):
        madax.grad(loss)(PARAMS["w"])
    expected = np.tile(np.sum(x, 0)[:, None], 4)
    got = madax.grad(lambda w: loss(w[...]))(PARAMS["w"])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    model = madax.quantize_params(Product(), FMT)
    with raises(TypeError, "a jax.custom_vjp got codes", "w[...]"):
        madax.grad(lambda model: jnp.sum(model(x, lambda w: w)))(model)
    grads = madax.grad(lambda model: jnp.sum(model(x, lambda w: w[...])))(model)
    np.testing.assert_allclose(jax.tree.leaves(grads)[0], expected, rtol=1e-6)


def test_a_custom_jvp_takes_codes_and_their_tangent():
    @jax.custom_jvp
    def cube(w):
        return w[...] ** 3

    cube.defjvp(lambda w, t: (cube(*w), 3 * w[0] ** 2 * t[0]))
    got = madax.grad(lambda w: jnp.sum(cube(w)))(PARAMS["w"])
    values = np.float64(PARAMS["w"].dequantize())
    np.testing.assert_allclose(got, 3 * values**2, rtol=1e-6)


def test_other_errors_of_a_loss_are_left_alone():
    def loss(w):
        raise ValueError("of the loss")

    with pytest.raises(ValueError, match="of the loss"):
        madax.grad(loss)(PARAMS["w"])


# --- what quantize_params leaves alone ------------------------------------------------


def test_leaves_that_are_no_arrays_stay():
    """As in a module of Equinox, whose activation is a leaf."""
    params = {"w": normal(4, 4), "activation": jax.nn.relu, "name": "mlp", "use": True}
    quantized = madax.quantize_params(params, FMT)
    assert isinstance(quantized["w"], QuantizedArray)
    assert {k: v for k, v in quantized.items() if k != "w"} == {
        k: v for k, v in params.items() if k != "w"
    }
    everything = madax.quantize_params(
        params, FMT, where=lambda path, leaf: path == "w"
    )
    assert different(everything["w"], quantized["w"]) == []


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def donated(tree):
    jax.jit(lambda x: jax.tree.map(lambda y: y + y, x), donate_argnums=0)(tree)
    jax.tree.map(lambda x: x.delete(), tree)  # what donation comes to, on any device


def test_what_is_donated_was_not_given():
    codes = madax.quantize_params(normal(4, 4), UniformFormat(8))
    params = {"w": normal(4, 4), "b": jnp.ones(4), "codes": codes, "n": jnp.int32(3)}
    quantized = madax.quantize_params(params, FMT, where=lambda path, leaf: path == "w")
    again = madax.quantize_params(quantized, FMT)
    donated(jax.tree.leaves(quantized))
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, again)))

    net = Net(nnx.Rngs(0))
    quantized = madax.quantize_params(net, FMT)
    donated([x for x in jax.tree.leaves(nnx.split(quantized)[1])])
    assert not any(x.is_deleted() for x in jax.tree.leaves(nnx.split(net)[1]))
