"""Layer by layer, eight devices get the codes of one, and send codes alone.

This file is also the script that two processes run: ``address process path``.
"""

import functools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import layers
import numpy as np
import processes
import pytest
from cases import FORMATS
from checkpoints import abstract, needs_set_mesh, restore, save
from helpers import different
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import enter, make_mesh, needs_explicit_axes
from processes import address

import madax
from madax import MomentFormat

DEPTH, ROWS, COLUMNS, STEPS = 3, 16, 8, 6
MADAM = madax.madam(0.02, moment_format=MomentFormat(8))
LAYOUTS = {
    "fsdp": P(("data", "model")),
    "tensor_parallel": P(None, "model"),
}
MESHES = [
    ("auto", "fsdp"),
    pytest.param("auto", "tensor_parallel", marks=pytest.mark.nightly),
    pytest.param(
        "explicit",
        "tensor_parallel",
        marks=(needs_explicit_axes, pytest.mark.nightly),
    ),
]


# --- layers that get the gradients they are told, on any mesh to the last bit ---------


def embed(ends, batch):
    return {"sum": 0 * jnp.sum(ends["bias"]), **batch}


def layer(w, x):
    told = jnp.sum(w["w"] * x["w"]) + jnp.sum(w["bias"] * x["bias"])
    return {"sum": x["sum"] + told, "w": 2 * x["w"], "bias": -x["bias"]}


def loss(ends, x, batch):
    return x["sum"] + jnp.sum(ends["bias"] * batch["bias"])


def spec(x, layout):
    """For matrices as the layout says, those of layers and of their state, too."""
    shape, axes = getattr(x, "shape", ()), LAYOUTS[layout]
    if shape[-2:] != (ROWS, COLUMNS):
        return P()
    return P(*[None] * (len(shape) - 2), *axes)


def place(tree, axis_type, layout):
    if axis_type is None:
        return jax.device_put(tree, jax.local_devices(backend="cpu")[0])
    mesh = make_mesh(axis_type)
    on = jax.tree.map(lambda x: NamedSharding(mesh, spec(x, layout)), tree)
    return jax.device_put(tree, on)


def started(axis_type=None, layout=None):
    rng = np.random.default_rng(0)
    w = np.float32(rng.normal(size=(DEPTH, ROWS, COLUMNS)))
    codes = madax.quantize_params(w, FORMATS["symlog8"], channel_axis=0)
    bias = np.ones((DEPTH, COLUMNS), np.float32)
    params = {"ends": {"bias": bias[0]}, "layers": {"w": codes, "bias": bias}}
    normal = lambda *shape: np.float32(rng.normal(size=(STEPS, *shape)))
    told = {"w": normal(ROWS, COLUMNS), "bias": normal(COLUMNS)}
    batches = [{k: g[i] for k, g in told.items()} for i in range(STEPS)]
    params = jax.tree.map(np.asarray, params)
    return place(params, axis_type, layout), place(batches, axis_type, layout)


INIT, STEP = madax.layerwise(MADAM, embed, layer, loss, dtype=jnp.float32)
COMPILED = jax.jit(STEP)


def trained(params, state, batches):
    for batch in batches:
        params, state, _ = COMPILED(params, state, batch)
    return params, state


@functools.cache
def on_one_device():
    params, batches = started()
    return trained(params, INIT(params), batches)


@pytest.mark.parametrize(("axis_type", "layout"), MESHES)
def test_a_mesh_trains_as_one_device(axis_type, layout):
    with enter(make_mesh(axis_type)):
        params, batches = started(axis_type, layout)
        state = INIT(params)
        codes = params["layers"]["w"].codes
        # Moments lie where their weights do, from the first.
        v = state["layers"].direction.nu["layers"]["w"]
        assert v.sharding.is_equivalent_to(codes.sharding, 3)
        params, state = trained(params, state, batches)
    assert len(params["layers"]["w"].codes.sharding.device_set) == 8
    assert different((params, state), on_one_device()) == []


# --- a network, its batch spread over the devices -------------------------------------


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.skipif(
    jax.__version_info__ < (0, 7), reason="XLA gathered float gradients, too"
)
def test_fsdp_gathers_codes_and_nothing_else_of_weights():
    mesh, tx = make_mesh("auto"), madax.madam(0.02)
    on = lambda *axes: NamedSharding(mesh, P(*axes))
    gather = lambda w: jax.lax.with_sharding_constraint(w, on())
    params = layers.weights(FORMATS["symlog8"])

    def shardings(x):
        wide = [None] * x.ndim
        if x.ndim > 1 and x.shape[-1] > 1 and x.shape[-2] > 8:
            wide[-2] = ("data", "model")
        return on(*wide)

    run = madax.layerwise(tx, *layers.FUNCTIONS, dtype=jnp.float32)
    _, _, expected = layers.trained(*run, params)

    init, step = madax.layerwise(
        tx, *layers.FUNCTIONS, dtype=jnp.float32, gather=gather
    )
    placed = jax.device_put(params, jax.tree.map(shardings, params))
    state = jax.eval_shape(init, placed)
    where = jax.tree.map(shardings, (params, state))
    state = jax.jit(init, out_shardings=where[1])(placed)
    batches = jax.device_put(layers.batches(), on(None, ("data", "model")))
    step = jax.jit(step, out_shardings=(*where, on())).lower(placed, state, batches[0])
    step = step.compile()
    losses = []
    for batch in batches:
        placed, state, value = step(placed, state, batch)
        losses.append(value)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)

    sent = re.findall(
        r"= \(?(\w+)\[([\d,]*)\][^=]*all-gather(?:-start)?\(", step.as_text()
    )
    sizes = {}
    for dtype, shape in sent:
        size = np.prod([int(n) for n in shape.split(",") if n])
        sizes[dtype] = max(size, sizes.get(dtype, 0))
    weights = layers.WIDTH**2
    assert sizes.pop("s8") >= weights
    assert max(sizes.values(), default=0) < weights


# --- elsewhere and later --------------------------------------------------------------


@pytest.mark.nightly
@needs_set_mesh
def test_a_checkpoint_is_resumed_on_another_mesh(tmp_path):
    params, batches = started("auto", "fsdp")
    half = trained(params, INIT(params), batches[: STEPS // 2])
    save(tmp_path / "half", half)
    mesh = make_mesh("auto")
    layout = "tensor_parallel"
    asked = jax.tree.map(lambda x: NamedSharding(mesh, spec(x, layout)), half)
    restored = restore(tmp_path / "half", abstract(half, asked))
    _, batches = started("auto", layout)
    assert different(trained(*restored, batches[STEPS // 2 :]), on_one_device()) == []


def in_one_of_two(coordinator, process, path):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, process)
    with enter(make_mesh("auto")):
        params, batches = started("auto", "fsdp")
        out = trained(params, INIT(params), batches)
        assert not out[0]["layers"]["w"].codes.is_fully_addressable
        everywhere = NamedSharding(make_mesh("auto"), P())
        out = jax.jit(lambda tree: tree, out_shardings=everywhere)(out)
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(out))}
    np.savez(path, **leaves)


@pytest.mark.nightly
def test_two_processes_train_as_one_device(tmp_path):
    at, paths = address(), [tmp_path / f"{i}.npz" for i in range(2)]
    processes.finish(
        *(processes.start(__file__, at, i, paths[i], devices=4) for i in range(2))
    )
    expected = [np.asarray(x) for x in jax.tree.leaves(on_one_device())]
    for path in paths:
        with np.load(path) as found:
            assert len(found) == len(expected)
            for i, x in enumerate(expected):
                assert found[str(i)].tobytes() == x.tobytes(), i


if __name__ == "__main__":
    in_one_of_two(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
