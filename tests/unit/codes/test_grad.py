"""Gradients of codes equal the gradients of decoded weights, and take less memory."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS
from helpers import is_quantized, mostly_nightly, raises, same

import madax
from madax import QuantizedArray

pytestmark = pytest.mark.usefixtures("quick_compiles")

WIDTH, LAYERS, WORDS = 16, 3, 40


def codes(seed, shape, fmt=FORMATS["symlog8"], scale_shape=None):
    rng = np.random.default_rng(seed)
    q = rng.integers(-fmt.levels, fmt.levels + 1, shape)
    scale = rng.uniform(
        0.1, 0.3, (1,) * len(shape) if scale_shape is None else scale_shape
    )
    return QuantizedArray(
        jnp.asarray(q, fmt.storage_dtype), jnp.asarray(scale, jnp.float32), fmt
    )


@pytest.fixture(scope="module")
def params():
    """A network with a tied table, stacked layers, codes of channels, and floats."""
    bias = jnp.linspace(-1, 1, LAYERS * WIDTH).reshape(LAYERS, WIDTH)
    return {
        "table": codes(0, (WORDS, WIDTH), FORMATS["log8"]),
        "place": codes(1, (5, WIDTH), FORMATS["uniform16"], (1, WIDTH)),
        "layers": {
            "kernel": codes(2, (LAYERS, WIDTH, WIDTH), scale_shape=(LAYERS, 1, 1)),
            "bias": bias,
        },
    }


IDS = jnp.asarray(np.random.default_rng(3).integers(0, WORDS, (2, 5)))


def layer(x, params):
    return (x + jnp.tanh(x @ params["kernel"] + params["bias"])).astype(x.dtype)


def layers_as(kind):
    """The ways in which a network goes through its layers."""
    if kind == "loop":
        take = lambda p, i: jax.tree.map(lambda w: w[i], p)
        return lambda x, p: [x := layer(x, take(p, i)) for i in range(LAYERS)][-1]
    body = jax.checkpoint(layer) if "checkpoint" in kind else layer
    return lambda x, p: jax.lax.scan(lambda x, p: (body(x, p), None), x, p)[0]


def loss(params, ids, kind="scan"):
    x = params["table"][ids] + params["place"]
    x = layers_as(kind)(x, params["layers"])
    logits = x @ params["table"].T
    return jnp.mean(logits**2)


def of_decoded(fun, dtype=None, transform=jax.value_and_grad, **options):
    """The same derivatives, taken of weights that are decoded beforehand."""

    def run(params, *args):
        decode = lambda x: x.dequantize(dtype) if is_quantized(x) else x
        params = jax.tree.map(decode, params, is_leaf=is_quantized)
        return transform(fun, **options)(params, *args)

    return run


KINDS = itertools.product(
    ["loop", "scan", "scan, checkpoint"], [jnp.float32, jnp.bfloat16]
)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    mostly_nightly(KINDS, ("loop", jnp.bfloat16), ("scan, checkpoint", jnp.float32)),
)
def test_gradients_match_the_decoded_weights(params, kind, dtype):
    fun = partial(loss, kind=kind)
    actual = jax.jit(madax.value_and_grad(fun, dtype=dtype))(params, IDS)
    same(actual, jax.jit(of_decoded(fun, dtype))(params, IDS))
    grads = actual[1]
    assert grads["table"].dtype == grads["layers"]["kernel"].dtype == dtype
    assert grads["layers"]["bias"].dtype == jnp.float32
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads))
    if dtype == jnp.float32:
        same(jax.jit(madax.grad(fun))(params, IDS), grads)


@pytest.mark.nightly
def test_gradients_are_right_outside_of_jit(params):
    fun = lambda p: jnp.sum(jnp.sin(p["table"][:5] * p["place"] + p["table"][2]))
    same(madax.value_and_grad(fun)(params), of_decoded(fun)(params))


def test_arguments_match_jax(params):
    def fun(x, table, bias, *, power):
        y = x @ table.T + bias
        return jnp.sum(y**power), (y, table)

    x, bias = jnp.ones(WIDTH), jnp.ones(WORDS)
    decoded = params["table"].dequantize()
    for argnums in (0, 1, -1, (1,), (2, 1), [0, -2]):
        actual = madax.value_and_grad(fun, argnums, has_aux=True)
        given = actual(x, params["table"], bias, power=2)
        expected = jax.value_and_grad(fun, argnums, has_aux=True)
        (value, (y, _)), grads = expected(x, decoded, bias, power=2)
        (of_codes, (y_of_codes, aux)), grads_of_codes = given
        same((of_codes, y_of_codes, grads_of_codes), (value, y, grads))
        assert type(aux) is QuantizedArray  # no probe leaves the function
        same(aux.codes, params["table"].codes)
        grads_alone = madax.grad(fun, argnums, has_aux=True)
        same(grads_alone(x, params["table"], bias, power=2)[0], grads)
    assert actual.__name__ == "fun"
    for name in ("value_and_grad", "grad"):
        ours, jaxs = (
            inspect.signature(getattr(module, name)).parameters
            for module in (madax, jax)
        )
        assert list(ours)[:2] == list(jaxs)[:2] == ["fun", "argnums"]
        assert ours["has_aux"].default is jaxs["has_aux"].default is False


def test_nested_and_other_derivatives(params):
    """Second derivatives, and forward ones of what is not codes."""
    w = params["place"]
    energy = lambda w, x: jnp.sum(jnp.sin(w * x) ** 2)
    x = jnp.linspace(0.5, 1, WIDTH)

    def norm_of_grad(grad, w, x):
        return jnp.sum(grad(energy)(w, x) ** 2)

    of_grad, of_jax = (partial(norm_of_grad, m.grad) for m in (madax, jax))
    second = jax.jit(madax.value_and_grad(of_grad))(w, x)
    expected = jax.jit(jax.value_and_grad(of_jax))(w.dequantize(), x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), second, expected)
    assert np.all(second[1] != 0)
    # What an inner loss hands on has the derivatives of the outer one.
    handed_on = lambda grad, w: grad(lambda w: (jnp.sum(w[0]), w), has_aux=True)(w)[1]
    of_aux = lambda grad: lambda w: jnp.sum(jnp.sin(handed_on(grad, w)[...]))
    same(madax.grad(of_aux(madax.grad))(w), jax.grad(of_aux(jax.grad))(w.dequantize()))
    forward = jax.jacfwd(madax.grad(energy), argnums=1)(w, x)
    expected = jax.jacfwd(jax.grad(energy), argnums=1)(w.dequantize(), x)
    np.testing.assert_allclose(forward, expected, rtol=1e-5)


def test_vmap_over_examples_and_over_stacks_of_codes(params):
    per_example = lambda grad: jax.vmap(grad, in_axes=(None, 0))
    fun = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)
    stack = params["layers"]["kernel"]
    w = jax.tree.map(lambda x: x[0], stack)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, WIDTH)), jnp.float32)
    same(
        jax.jit(per_example(madax.grad(fun)))(w, x),
        jax.jit(per_example(jax.grad(fun)))(w.dequantize(), x),
    )
    same(
        jax.jit(jax.vmap(madax.grad(fun)))(stack, x[:LAYERS]),
        jax.jit(jax.vmap(jax.grad(fun)))(stack.dequantize(), x[:LAYERS]),
    )


def temporaries(fun, *args, **options):
    compiled = jax.jit(fun, **options).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_blocks_under_checkpoint_have_their_own_weights_in_floats_and_no_others():
    """Temporaries, by XLA's count, hold a layer or two, not all of them."""
    depth, width = 16, 128
    w = codes(0, (depth, width, width), scale_shape=(depth, 1, 1))
    block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    fun = lambda w, x: jnp.sum(jax.lax.scan(block, x, w)[0])
    in_layers = lambda f: temporaries(f, w, jnp.ones((2, width))) / (4 * width**2)
    assert in_layers(of_decoded(fun)) > depth
    assert in_layers(madax.value_and_grad(fun)) < 3


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="drops barriers")
def test_weights_are_decoded_again_and_not_kept():
    """Without checkpoints, no layer's values are kept for the backward pass."""
    # By default XLA may decode all weights first on a CPU, to have more to do at once.
    order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    depth, width = 8, 128
    w = [codes(i, (width, width)) for i in range(depth)]
    fun = lambda w, x: jnp.sum(chain(w, x))

    def chain(w, x):
        for one in w:
            x = jnp.tanh(jnp.einsum("bi,ij->bj", x, one))
        return x

    def in_layers(gradient):
        # XLA must not keep the values instead of the results, which are small.
        norms = lambda w, x: jax.tree.map(jnp.linalg.norm, gradient(w, x))
        return temporaries(norms, w, x, compiler_options=order) / (4 * width**2)

    x = jnp.ones((2, width))
    kept = in_layers(of_decoded(fun, transform=jax.grad))
    assert in_layers(madax.grad(fun)) < kept - depth / 2
    same(
        jax.jit(madax.grad(fun))(w, x),
        jax.jit(of_decoded(fun, transform=jax.grad))(w, x),
    )


@pytest.mark.parametrize("kind", ["loop", "scan, checkpoint"])
def test_no_tracer_outlives_the_loop_that_it_is_of(params, kind):
    with jax.checking_leaks():
        jax.jit(madax.value_and_grad(partial(loss, kind=kind))).trace(params, IDS)


def test_probes_are_not_there():
    """A step from codes to codes has no float array of a weight's size but two."""
    w = codes(0, (512, 512))
    x = jnp.ones((4, 512))
    fun = lambda w, x: jnp.sum(jnp.tanh(x @ w))

    def step(w, x):
        return jnp.sign(madax.grad(fun)(w, x)).astype(jnp.int8)

    # The weight for the forward pass, and its gradient.
    assert temporaries(step, w, x) < 2.2 * 4 * w.size
    ours, decoded = (
        jax.jit(f).lower(w, x).compile().as_text().count("f32[512,512]")
        for f in (madax.grad(fun), of_decoded(fun, transform=jax.grad))
    )
    assert ours == decoded


def test_a_look_up_and_its_gradient_decode_the_rows_it_takes():
    table = codes(0, (5000, 8))
    fun = lambda w, ids: jnp.sum(jnp.tanh(w[ids]))
    jaxpr = jax.make_jaxpr(madax.grad(fun))(table, jnp.arange(3))
    decoded = [e for e in jaxpr.eqns if e.primitive.name == "convert_element_type"]
    assert not [e for e in decoded if e.invars[0].aval.shape == table.shape]


def test_gradients_are_right_on_a_mesh():
    """Gradients equal those of decoded weights, and are on the same devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    weights = {"in": codes(0, (64, 128)), "out": codes(1, (128, 64))}

    def placed(x):
        names = ("data", "model") if x.size > 1 else ()
        spec = jax.sharding.PartitionSpec(*names)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    fun = lambda w, x: jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"]) ** 2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 64)), jnp.float32)
    on_one = jax.jit(madax.grad(fun))(weights, x)
    weights, x = jax.tree.map(placed, (weights, x))
    actual = jax.jit(madax.grad(fun))(weights, x)
    expected = jax.jit(of_decoded(fun, transform=jax.grad))(weights, x)
    same(actual, expected)
    for name, g in actual.items():
        assert len(g.sharding.device_set) == 8
        assert g.sharding == expected[name].sharding
        np.testing.assert_allclose(g, on_one[name], atol=1e-6)


@pytest.mark.parametrize(
    "derive",
    [
        lambda f, w: jax.grad(f, allow_int=True)(w),
        lambda f, w: jax.vjp(f, w)[1](1.0),
        lambda f, w: jax.value_and_grad(f, allow_int=True)({"w": w}),
    ],
)
def test_what_jax_would_say_of_codes_is_an_error(derive):
    fun = lambda tree: jnp.sum(jax.tree.leaves(tree, is_leaf=is_quantized)[0][...] ** 2)
    w = codes(0, (4, 4))
    with pytest.raises(TypeError, match=r"madax\.value_and_grad or madax\.grad"):
        derive(fun, w)
    with pytest.raises(TypeError, match="int8"):
        jax.grad(fun)(w)


def by_leaves(fun, tree):
    """The gradients of the floating leaves of a tree, of which codes have a scale."""
    leaves, treedef = jax.tree.flatten(tree)
    floats = {i: x for i, x in enumerate(leaves) if jnp.result_type(x) == jnp.float32}
    merged = lambda new: [new.get(i, x) for i, x in enumerate(leaves)]
    return jax.grad(lambda new: fun(treedef.unflatten(merged(new))))(floats)


def by_names(fun, tree):
    """The same, of the arrays of a file."""
    arrays = madax.to_flat_dict(tree)
    floats = {k: x for k, x in arrays.items() if x.dtype == jnp.float32}
    return jax.grad(lambda new: fun(madax.from_flat_dict(arrays | new)))(floats)


X = jnp.linspace(-1, 1, 20).reshape(5, 4)
SCALED = {
    "product": lambda p: jnp.sum(X @ p["w"] + p["b"]),
    "a row": lambda p: jnp.sum(p["w"][0] * p["b"]),
    "scan": lambda p: jax.lax.scan(lambda s, w: (s + w.sum(), None), 0.0, p["w"])[0],
    "checkpoint": jax.checkpoint(lambda p: jnp.sum(X @ p["w"])),
}


@pytest.mark.parametrize("fun", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("derive", [by_leaves, by_names])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_the_scale_is_no_weight(fun, derive, wrap):
    """Whoever filters floats would train scales alone."""
    w = codes(0, (4, 4), scale_shape=(4, 1))
    with raises(TypeError, "with respect to the scale", "use madax.value_and_grad"):
        wrap(partial(derive, fun))({"w": w, "b": jnp.ones(4)})
    # Frozen codes beside floats are read as ever.
    of_bias = jax.grad(lambda b: fun({"w": w, "b": b}))(jnp.ones(4))
    of_floats = jax.grad(lambda b: fun({"w": w.dequantize(), "b": b}))(jnp.ones(4))
    same(of_bias, of_floats)


def test_by_default_codes_decode_to_float32_and_no_other_leaf_is_cast():
    params = {"w": codes(0, (4, 4)), "b": jnp.ones(4, jnp.bfloat16)}
    seen = []

    def loss(params):
        seen.append({name: x.dtype for name, x in params.items()})
        return jnp.sum(params["w"] * params["b"])

    grads = madax.grad(loss)(params)
    expected = {"w": jnp.float32, "b": jnp.bfloat16}
    assert seen == [expected]
    assert {name: g.dtype for name, g in grads.items()} == expected


def test_bad_arguments_are_named():
    w = codes(0, (4, 4))
    with pytest.raises(TypeError, match="fun must be a function, got 3"):
        madax.value_and_grad(3)
    for dtype in (jnp.int8, "complex64"):
        with pytest.raises(TypeError, match="dtype must be a floating dtype"):
            madax.grad(jnp.sum, dtype=dtype)
    with pytest.raises(ValueError, match="names argument 2, but 1 positional"):
        madax.grad(jnp.sum, 2)(w)
    for argnums in ("0", 0.0, (0, None)):
        with pytest.raises(TypeError, match="argnums must be an int or a sequence"):
            madax.grad(jnp.sum, argnums)(w)
    with pytest.raises(TypeError, match="int32"):
        madax.grad(lambda p: 1.0)({"w": w, "count": jnp.int32(3)})
    with pytest.raises(TypeError, match="scalar-output"):
        madax.grad(lambda w: w * 2)(w)


def test_repr_of_codes_in_a_loss():
    seen = []
    madax.grad(lambda w: seen.append(repr(w)) or jnp.sum(w[...]))(codes(0, (4, 4)))
    assert seen[0].startswith("QuantizedArray(shape=(4, 4)")
