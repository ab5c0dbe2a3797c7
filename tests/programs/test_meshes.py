"""A mesh of eight devices trains as one device does, to the last bit.

Given the same gradients, that is: a sum over a batch that is spread over devices is
taken in another order, so that there the losses are what can be compared.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, OPTIMIZERS
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers import different, mostly_nightly, needs_flax_0_12, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    EXPLICIT,
    LAYOUTS,
    SHAPES,
    Run,
    enter,
    make_mesh,
    needs_explicit_axes,
    spec,
    start,
    start_all,
    values,
)

import madax
from madax import MomentFormat

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond p_scale")


# What each optimizer trains: two of them all, the others floats and a sample of codes.
LEAVES = {
    "madam": tuple(SHAPES),
    "floor_b1": ("bias", "conv", "symlog8"),
    "moments8": tuple(SHAPES),
    "bbit_madam": ("bias", "conv", "log16"),
    "lns_madam": ("bias", "conv", "log8"),
    "wrapped_adam": tuple(SHAPES),
    "sgd_feedback": tuple(SHAPES),
}
MESHES = [*(("auto", layout) for layout in LAYOUTS), EXPLICIT]
on_every_mesh = pytest.mark.parametrize(("axis_type", "layout"), MESHES)
# The optimizers share what one of them does on every mesh.
RUNS = [("moments8", *mesh) for mesh in MESHES[:-1]]
RUNS += [(name, "auto", "fsdp") for name in LEAVES if name != "moments8"]
RUNS += [(name, *EXPLICIT.values) for name in LEAVES]
NOW = [("moments8", *EXPLICIT.values), ("lns_madam", "auto", "fsdp")]
with_every_optimizer = pytest.mark.parametrize(
    ("name", "axis_type", "layout"),
    [
        pytest.param(*run.values, marks=(*run.marks, *EXPLICIT.marks))
        if run.values[1] == "explicit"
        else run
        for run in mostly_nightly(RUNS, *NOW)
    ],
)


LEAVES["factored"] = "bias", "conv", "log16", "symlog8"  # which reduces over axes


@functools.cache
def run(name, axis_type=None, layout=None):
    params, grads = start(LEAVES[name], axis_type, layout)
    if axis_type is None:
        return Run(name, params, grads)
    with enter(make_mesh(axis_type)):
        # The calls are eager, but for Adam, whose wrapper decodes all codes first.
        init = None
        if name in ("wrapped_adam", "sgd_feedback"):
            init = compiled_init(OPTIMIZERS[name], params, axis_type, layout)
        return Run(name, params, grads, init)


def misplaced(tree, axis_type, layout):
    """Leaves, in a tree like the parameters, that do not lie as the gradients do."""
    mesh = make_mesh(axis_type)
    return [
        k
        for k, x in tree.items()
        if not values(x).sharding.is_equivalent_to(
            NamedSharding(mesh, spec(layout, k)), values(x).ndim
        )
    ]


def moments(state):
    """The trees in a state that are like the parameters."""
    is_moments = lambda x: isinstance(x, dict) and x.keys() <= SHAPES.keys()
    leaves = jax.tree.leaves(state, is_leaf=is_moments)
    return [x for x in leaves if is_moments(x)], [
        x for x in leaves if not is_moments(x)
    ]


def compiled_init(tx, params, axis_type, layout):
    """``tx.init`` under jit, its moments laid out like the parameters.

    Axes of explicit types see to that by themselves. With others the zeros of a new
    moment depend on no input, so a compiler may choose to have them on every device.
    """
    if axis_type == "explicit":
        return jax.jit(tx.init)
    mesh = make_mesh(axis_type)
    like_params = {k: NamedSharding(mesh, spec(layout, k)) for k in params}
    is_moments = lambda x: isinstance(x, dict) and x.keys() == params.keys()
    shardings = jax.tree.map(
        lambda x: like_params if is_moments(x) else NamedSharding(mesh, P()),
        jax.eval_shape(tx.init, params),
        is_leaf=is_moments,
    )
    return jax.jit(tx.init, out_shardings=shardings)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    "name",
    mostly_nightly(["moments8", "lns_madam", "wrapped_adam"], "moments8", "lns_madam"),
)
def test_the_runs_compared_change_every_leaf(name):
    before, _ = start_all()
    for k, after in run(name).params.items():
        changed = np.mean(values(before[k]) != values(after))
        assert changed > 0.7, (k, changed)


@on_every_mesh
def test_codes_and_scales_match_one_device(axis_type, layout):
    params, _ = start_all(axis_type, layout)
    assert misplaced(params, axis_type, layout) == []
    assert different(params, start_all()[0]) == []


@with_every_optimizer
def test_training_matches_one_device(name, axis_type, layout):
    one, mesh = run(name), run(name, axis_type, layout)
    assert different(mesh.state0, one.state0) == []
    assert different(mesh.params, one.params) == []
    assert different(mesh.state, one.state) == []


@with_every_optimizer
def test_moments_lie_as_their_weights_do(name, axis_type, layout):
    mesh = run(name, axis_type, layout)
    assert misplaced(mesh.params, axis_type, layout) == []
    for state in (mesh.state0, mesh.state):
        like_params, rest = moments(state)
        assert len(like_params) >= 1
        for tree in like_params:
            assert misplaced(tree, axis_type, layout) == []
        assert rest
        for x in rest:
            assert x.size <= len(SHAPES) and x.sharding.is_fully_replicated


COLLECTIVE = re.compile(
    r"= (?P<type>\(.*?\)|\S+) (?P<op>all-gather|all-reduce|all-to-all|"
    r"collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter)"
    r"(?:-start)?\("
)


def collectives(program):
    """The operations between devices in a compiled program: (name, elements)."""
    return [
        (
            found["op"],
            sum(
                math.prod(map(int, filter(None, dims.split(","))))
                for dims in re.findall(r"\[([\d,]*)\]", found["type"])
            ),
        )
        for found in COLLECTIVE.finditer(program)
    ]


@with_every_optimizer
def test_a_step_moves_no_array_between_devices(name, axis_type, layout):
    found = collectives(run(name, axis_type, layout).program)
    # The windows of low-bit moments are placed by the largest gradient of a leaf.
    if name == "moments8" and layout != "data_parallel":
        assert {op for op, _ in found} == {"all-reduce"}
        assert max(size for _, size in found) <= len(SHAPES)
    else:
        assert found == []


@pytest.mark.parametrize(
    ("axis_type", "layout"),
    [
        MESHES[1],
        pytest.param(*EXPLICIT.values, marks=[*EXPLICIT.marks, pytest.mark.nightly]),
    ],
)
def test_factored_moments_have_the_bits_of_one_device(axis_type, layout):
    """Their root mean squares do not depend on the order of adding."""
    mesh, one = run("factored", axis_type, layout), run("factored")
    assert different(mesh.params, one.params) == []
    assert different(mesh.state, one.state) == []
    found = collectives(mesh.program)
    assert {op for op, _ in found} == {"all-reduce"}
    rows_and_columns = max(math.prod(s[:-1]) for s in SHAPES.values())
    assert max(size for _, size in found) <= rows_and_columns


def test_collectives_are_seen_where_there_are_some():
    mesh = make_mesh("auto")
    x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("data", "model")))

    def seen(fn, out):
        out = NamedSharding(mesh, out)
        return collectives(jax.jit(fn, out_shardings=out).lower(x).compile().as_text())

    assert ("all-gather", 128) in seen(lambda x: x + 1, P())
    assert ("all-reduce", 1) in seen(jnp.sum, P())
    assert any(op == "all-to-all" for op, _ in seen(jnp.sin, P("model", "data")))


@pytest.mark.parametrize(("axis_type", "layout"), [MESHES[1], EXPLICIT])
def test_init_under_jit_is_eager_init(axis_type, layout):
    eager = run("moments8", axis_type, layout)
    tx, (params, _) = OPTIMIZERS["moments8"], start_all(axis_type, layout)
    with enter(make_mesh(axis_type)):
        state = compiled_init(tx, params, axis_type, layout)(params)
    assert different(state, eager.state0) == []
    for tree in moments(state)[0]:
        assert misplaced(tree, axis_type, layout) == []


# --- Flax models that say how they are sharded ----------------------------------------

NATIVE = madax.madam(0.03, moment_format=MomentFormat(8))
HIDDEN, OUT = ("data", "model"), ("model", "data")


def small_mesh(devices):
    shape = (2, 4) if devices == 8 else (1, 1)
    return jax.make_mesh(
        shape,
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )


def batch(mesh):
    x = np.float32(np.random.default_rng(0).normal(size=(64, 16)))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    return put(x), put(np.sin(2 * x[:, :8]))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.initializers
        dense = lambda n, kernel, bias: linen.Dense(
            n,
            kernel_init=linen.with_partitioning(init.lecun_normal(), kernel),
            bias_init=linen.with_partitioning(init.zeros, bias),
        )
        h = linen.relu(dense(32, HIDDEN, ("model",))(x))
        return dense(8, OUT, ("data",))(h)


def trained_linen(devices, fmt):
    mesh, net = small_mesh(devices), LinenNet()
    x, y = batch(mesh)
    init = lambda key: net.init(key, x)["params"]
    sharding = linen.get_sharding(jax.eval_shape(init, jax.random.key(0)), mesh)
    params = jax.jit(init, out_shardings=sharding)(jax.random.key(0))
    if fmt is not None:
        params = jax.jit(lambda params: madax.quantize_params(params, fmt))(params)
    state = TrainState.create(apply_fn=net.apply, params=params, tx=NATIVE)

    def step(state, _):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        weights = madax.dequantize_params(state.params)
        value, grads = jax.value_and_grad(loss)(weights)
        return state.apply_gradients(grads=grads), value

    state, losses = jax.jit(lambda state: jax.lax.scan(step, state, length=20))(state)
    return state.params, state.opt_state, np.asarray(losses)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers
        linear = lambda n_in, n_out, kernel, bias: nnx.Linear(
            n_in,
            n_out,
            kernel_init=nnx.with_partitioning(init.lecun_normal(), kernel),
            bias_init=nnx.with_partitioning(init.zeros, bias),
            rngs=rngs,
        )
        self.hidden = linear(16, 32, HIDDEN, ("model",))
        self.out = linear(32, 8, OUT, ("data",))

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def trained_nnx(devices, fmt):
    mesh = small_mesh(devices)
    x, y = batch(mesh)
    with enter(mesh):
        model = NnxNet(nnx.Rngs(0))
        graph, params = nnx.split(model, nnx.Param)
        if fmt is not None:
            quantize = jax.jit(lambda params: madax.quantize_params(params, fmt))
            model = nnx.merge(graph, quantize(params))
        optimizer = nnx.Optimizer(model, NATIVE, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss(weights):
                return jnp.mean((nnx.merge(graph, weights)(x) - y) ** 2)

            weights = madax.dequantize_params(nnx.state(model, nnx.Param))
            value, grads = jax.value_and_grad(loss)(weights)
            optimizer.update(model, grads)
            return value

        losses = [float(step(model, optimizer)) for _ in range(20)]
        return nnx.state(model, nnx.Param), nnx.state(optimizer), losses


@pytest.mark.parametrize(
    ("trained", "fmt"),
    [
        pytest.param(
            trained_linen, FORMATS["log8"], id="linen-native", marks=pytest.mark.nightly
        ),
        pytest.param(
            trained_nnx,
            FORMATS["log8"],
            id="nnx-native",
            marks=(needs_flax_0_12, pytest.mark.nightly),
        ),
    ],
)
def test_flax_models_that_say_how_they_are_sharded(trained, fmt):
    params, state, losses = trained(8, fmt)
    specs = {(16, 32): P(*HIDDEN), (32,): P("model"), (32, 8): P(*OUT), (8,): P("data")}
    placed = {}
    for tree in (params, state):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            mesh, expected = x.sharding.mesh, specs.get(x.shape, P())
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, expected), x.ndim), (
                jax.tree_util.keystr(path)
            )
            placed[x.shape] = placed.get(x.shape, 0) + 1
    assert all(placed[shape] == 2 for shape in specs)  # a weight and its v
    # All that is of rank 2, but for the scales of codes.
    dtypes = {x.dtype for x in jax.tree.leaves(params) if x.ndim == 2 < x.size}
    assert dtypes == {np.dtype(np.float32 if fmt is None else np.int8)}
    # A rounding in a gradient may now and then turn a code the other way.
    np.testing.assert_allclose(losses, trained(1, fmt)[2], rtol=1e-2)
    assert losses[-1] < 0.6 * losses[0]


@needs_explicit_axes
@pytest.mark.parametrize("make", [madax.muon, madax.muon_madam])
def test_matrices_may_be_on_axes_of_explicit_types(make):
    """The direction of a leaf on one device; in its layout, whatever axes are cut."""
    shapes = {"w": (16, 24), "stack": (8, 4, 16)}
    specs = {"w": P("data", "model"), "stack": P("model", None, "data")}
    params = {k: normal(*shape) for k, shape in shapes.items()}
    axes = lambda _, leaf: madax.transforms.MatrixDimensionNumbers(-1, -2)
    tx = make(0.1, matrices=axes)

    def update(params):
        return jax.jit(tx.update)(params, tx.init(params), params)[0]

    expected = update(params)
    mesh = make_mesh("explicit")
    with enter(mesh):
        cut = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
        updates = update(jax.device_put(params, cut))
    for k, u in updates.items():
        assert u.sharding.is_equivalent_to(cut[k], u.ndim)
        np.testing.assert_allclose(u, expected[k], rtol=1e-3, atol=1e-5)
