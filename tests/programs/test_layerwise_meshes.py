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
import optax
import processes
import pytest
from cases import FORMATS
from checkpoints import abstract, needs_set_mesh, restore, save
from helpers import different, mostly_nightly
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


MAX = 3.0  # between the norms of the ends and of all in a step of size 1
CLIPS = "exact", "last", "layer"


@functools.cache
def compiled(clip_by=None):
    clip = {} if clip_by is None else {"max_norm": MAX, "clip_by": clip_by}
    functions = embed, layer, loss
    init, step = madax.layerwise(MADAM, *functions, dtype=jnp.float32, **clip)
    return init, jax.jit(step)


INIT, _ = compiled()


def trained(params, state, batches, clip_by=None):
    for batch in batches:
        params, state, _ = compiled(clip_by)[1](params, state, batch)
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


# --- clips ----------------------------------------------------------------------------

# Of the gradients of each step. Directions of madam do not depend on a constant, and
# the clip by the last steps is the exact one as long as fractions stay.
SIZES = {
    "w": np.float32([1, 30, 0.01, 5, 0.1, 100]),
    "bias": np.float32([300, 1, 30, 0.1, 90, 3]),
}


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * np.float32(factor), tree)


def sized(batches):
    return [
        {k: x * SIZES[k][i] for k, x in batch.items()}
        for i, batch in enumerate(batches)
    ]


@functools.cache
def clipped_on_one_device(clip_by):
    params, batches = started()
    return trained(params, compiled(clip_by)[0](params), sized(batches), clip_by)


@functools.cache
def optimizer(is_exact):
    """Updates by madam from gradients, clipped by optax if that is so."""
    clip = optax.clip_by_global_norm(MAX) if is_exact else optax.identity()
    tx = optax.chain(clip, MADAM)

    @jax.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, update


def told_and_clipped(clip_by):
    """The codes of all layers after training as a list, by gradients clipped before."""
    params, batches = started()
    params, last = layers.listed(params), None
    init, update = optimizer(clip_by == "exact")
    state = init(params)
    for told in sized(batches):
        grads = [{"bias": told["bias"]}]
        for i in range(DEPTH):
            grads.append({"w": 2.0**i * told["w"], "bias": (-1.0) ** i * told["bias"]})
        if clip_by != "exact":
            norms = layers.norms_of(grads)
            factors = layers.clip_factors(norms, clip_by, MAX, last)
            now = 0.1 * norms**2 / np.sum(norms**2)
            last = np.sqrt(now if last is None else 0.9 * last**2 + now)
            grads = list(map(scaled, grads, factors))
        params, state = update(params, state, {"ends": grads[0], "layers": grads[1:]})
    return np.stack([layer["w"].codes for layer in params["layers"]])


@pytest.mark.parametrize(("axis_type", "layout"), MESHES)
@pytest.mark.parametrize("clip_by", mostly_nightly(CLIPS, "layer"))
def test_a_mesh_clips_as_one_device(clip_by, axis_type, layout):
    expected = told_and_clipped(clip_by)
    with enter(make_mesh(axis_type)):
        params, batches = started(axis_type, layout)
        state = compiled(clip_by)[0](params)
        found = trained(params, state, sized(batches), clip_by)
    assert different(found, clipped_on_one_device(clip_by)) == []
    codes = np.int32(found[0]["layers"]["w"].codes)
    # Factors that differ in the last bit round few codes in another way.
    gaps = np.abs(codes - expected)
    assert gaps.max() <= 1 and gaps.mean() < 0.01
    for other in {None, *CLIPS} - {clip_by}:
        others = clipped_on_one_device(other)[0]["layers"]["w"].codes
        assert np.mean(codes != others) > 0.1


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
