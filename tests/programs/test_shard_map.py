"""Inside ``jax.shard_map``, eight devices train as ``jax.jit`` does on one.

Whole leaves get the same bits. Shards share the window of their codes, but round by
random numbers that count from the start of a shard.
"""

import functools

import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import different, mostly_nightly, raises
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import madax
from madax import MomentFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

MESH, AXES = make_mesh("auto"), ("data", "model")
STEPS = 20


def shard_map(fn, in_specs, out_specs, *, check_vma=True):
    """That of any version of JAX, compiled."""
    if hasattr(jax, "shard_map"):
        mapped, kwargs = jax.shard_map, {"check_vma": check_vma}
    else:
        from jax.experimental.shard_map import shard_map as mapped

        kwargs = {"check_rep": check_vma}
    kwargs |= {"mesh": MESH, "in_specs": in_specs, "out_specs": out_specs}
    return jax.jit(mapped(fn, **kwargs))


checked_or_not = pytest.mark.parametrize(
    "check_vma", mostly_nightly([True, False], True)
)

# --- leaves that are whole, and shards of others --------------------------------------

SHARDED, WHOLE = (16, 260), (4, 8)


def weights_and_grads():
    rng = np.random.default_rng(0)
    weights = {"shards": rng.normal(size=SHARDED), "whole": rng.normal(size=WHOLE)}
    # The gradients of one shard are a million times those of the last.
    sizes = np.logspace(0, -6, SHARDED[0])[:, None]
    grads = {
        "shards": rng.normal(size=(STEPS, *SHARDED)) * sizes,
        "whole": rng.normal(size=(STEPS, *WHOLE)),
    }
    return jax.tree.map(np.float32, (weights, grads))


def spec(x):
    """The rows of what has the shape of shards are spread, also in a stack of steps."""
    shape = np.shape(x)
    if shape[-2:] != SHARDED:
        return P()
    return P(*[None] * (len(shape) - 2), AXES)


def trained(tx, params, state, grads):
    def one(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), ()

    return jax.lax.scan(one, (params, state), grads)[0]


def run(tx, check_vma=None, fmt=None):
    """The parameters and state after all steps: in shard_map, or jit if it is None."""
    params, grads = weights_and_grads()
    if fmt is not None:
        params = madax.quantize_params(params, fmt)
    args = params, tx.init(params), grads
    fn = functools.partial(trained, tx)
    if check_vma is None:
        return jax.jit(fn)(*args)
    specs = jax.tree.map(spec, args)
    return shard_map(fn, specs, specs[:2], check_vma=check_vma)(*args)


MOMENTS = madax.madam(0.02, b1=0.9, moment_format=MomentFormat(8))


@functools.cache
def moments_on_one_device():
    return run(MOMENTS)


@checked_or_not
def test_shards_share_the_window_of_their_moments(check_vma):
    params, state = run(MOMENTS, check_vma)
    whole, expected = moments_on_one_device()
    ((window,), (wanted,)) = (s.direction.window.values() for s in (state, expected))
    # Nothing is lost: each device has the window of the whole leaf.
    for shard in window.octave.addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted.octave)
    parts = [
        (params, state.direction.nu, state.direction.mu),
        (whole, expected.direction.nu, expected.direction.mu),
    ]
    found, wanted = ([tree["whole"] for tree in trees] for trees in parts)
    assert different(found, wanted) == []
    # Except for unbiased rounding, moments of shards equal the moments of one device.
    v, v1 = (np.int32(tree["shards"]) for _, tree, _ in parts)
    assert abs(np.mean(v - v1)) < 0.1 and np.min(v1) > 0


@checked_or_not
def test_shards_share_the_window_of_any_state(check_vma):
    tx = madax.with_quantized_state(
        optax.adam(2**-7, b1=0.5, b2=0.75), rounding="nearest"
    )
    assert different(run(tx, check_vma), run(tx)) == []


@checked_or_not
def test_error_feedback_has_one_slope_for_all_shards(check_vma):
    tx = madax.with_quantized_params(optax.adam(0.01), error_feedback=True)
    _, state = run(tx, check_vma, FORMATS["symlog8"])
    _, expected = run(tx, None, FORMATS["symlog8"])
    assert np.all(expected.slope > 0)
    for shard in state.slope.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected.slope)


def test_models_of_their_own_have_windows_of_their_own():
    """Eight models, one on each device, share nothing, as their types tell."""
    rng = np.random.default_rng(0)
    sizes = np.logspace(0, -9, 8)[:, None, None, None]
    weights = np.float32(rng.normal(size=(8, *WHOLE)))
    grads = np.float32(rng.normal(size=(8, STEPS, *WHOLE)) * sizes)
    states = jax.vmap(MOMENTS.init)(weights)
    one = functools.partial(trained, MOMENTS)

    def on_device(*args):
        out = one(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], out)

    spread = P(AXES)
    found = shard_map(on_device, spread, spread)(weights, states, grads)
    alone = jax.jit(one)
    for i in range(8):
        args = jax.tree.map(lambda x, i=i: x[i], (weights, states, grads))
        assert different(jax.tree.map(lambda x, i=i: x[i], found), alone(*args)) == []


# --- layer by layer, the batch spread over the devices --------------------------------

DEPTH, ROWS, COLUMNS = 3, 16, 8


def embed(ends, batch):
    # What starts as zeros is the same on all devices at first.
    return {"sum": jnp.zeros(()), "x": batch + 0 * ends["shift"]}


def layer(w, x):
    """A sum whose gradients are exact, so that they are the same in any order."""
    return {"sum": x["sum"] + jnp.sum(w["w"] * jnp.mean(x["x"], 0)), "x": 2 * x["x"]}


def loss(ends, x, batch, *, mean=lambda x: x):
    value = mean(x["sum"] + jnp.mean(batch) * ends["shift"][0])
    return value, value


def layered(mean, **options):
    return madax.layerwise(
        MOMENTS,
        embed,
        layer,
        functools.partial(loss, mean=mean),
        dtype=jnp.float32,
        microbatches=2,
        has_aux=True,
        **options,
    )


CLIPS = [{"max_norm": 2.0, "clip_by": by} for by in ("exact", "last", "layer")]


@pytest.mark.parametrize("clip", mostly_nightly([{}, *CLIPS], CLIPS[0]))
def test_layerwise_trains_as_on_one_device(clip):
    rng = np.random.default_rng(0)
    w = np.float32(rng.normal(size=(DEPTH, ROWS, COLUMNS)))
    codes = madax.quantize_params(w, FORMATS["symlog8"], channel_axis=0)
    params = {"ends": {"shift": np.ones(COLUMNS, np.float32)}, "layers": {"w": codes}}
    batches = np.float32(rng.integers(-9, 10, (STEPS, 32, ROWS, COLUMNS)))

    def steps(mean):
        _, step = layered(mean, **clip)

        def one(carry, batch):
            *carry, value = step(*carry, batch)
            return tuple(carry), value

        return lambda params, state, batches: jax.lax.scan(
            one, (params, state), batches
        )

    state = jax.jit(layered(None, **clip).init)(params)
    expected, values = jax.jit(steps(lambda x: x))(params, state, batches)
    everywhere = lambda x: jax.lax.pmean(x, AXES)
    specs = (P(), P(), P(None, AXES))
    found, found_values = shard_map(steps(everywhere), specs, P())(
        params, state, batches
    )
    assert different(found, expected) == []
    assert np.mean(found[0]["layers"]["w"].codes != codes.codes) > 0.9
    assert found[0]["ends"]["shift"][0] != 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found_values,
        values,
    )


def test_layers_may_be_cut_over_devices():
    """A layer that sums over them has gradients, and norms, of the whole."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape) / 4)
    stack = {"a": normal(DEPTH, 8, 16), "b": normal(DEPTH, 16, 8)}
    params, batch = {"ends": normal(4, 8), "layers": stack}, normal(8, 4)
    max_norm, sgd = 0.1, optax.sgd(1.0)
    last = np.float32(np.linspace(0.2, 0.1, 1 + DEPTH))
    same = lambda x: x

    def layer(w, x, add=same):
        return x + add(jnp.tanh(x @ w["a"]) @ w["b"])

    def run(add, mean, clip_by):
        return madax.layerwise(
            sgd,
            lambda ends, batch: batch @ ends,
            functools.partial(layer, add=add),
            lambda ends, x, batch: (mean(jnp.mean(x**2)), ()),
            has_aux=True,
            max_norm=max_norm,
            clip_by=clip_by,
        )

    def whole_loss(params, batch):
        x = batch @ params["ends"]
        for w in params["layers"]:
            x = layer(w, x)
        return jnp.mean(x**2)

    value, grads = jax.value_and_grad(whole_loss)(layers.listed(params), batch)
    parts = [grads["ends"], *grads["layers"]]
    norms = layers.norms_of(parts)
    cut = {"a": P(None, None, "model"), "b": P(None, "model")}
    specs = {"ends": P(), "layers": cut}
    add = lambda x: jax.lax.psum(x, "model")
    for clip_by in ("exact", "last", "layer"):
        init, step = run(add, lambda x: jax.lax.pmean(x, "data"), clip_by)
        state = init(params)
        if clip_by == "last":
            state |= {"fractions": {"ends": last[0], "layers": last[1:]}}
        step = shard_map(step, (specs, P(), P("data")), (specs, P(), P()))
        new, _, (found, metrics) = step(params, state, batch)
        factors = layers.clip_factors(norms, clip_by, max_norm, last)
        taken = [params["ends"] - new["ends"]]
        moved = jax.tree.map(jnp.subtract, stack, new["layers"])
        taken += [layers.one(moved, i) for i in range(DEPTH)]
        scale = lambda g, f: jax.tree.map(lambda x: x * np.float32(f), g)
        expected = list(map(scale, parts, factors))
        if clip_by == "exact":
            clip = optax.clip_by_global_norm(max_norm)
            expected, _ = clip.update(parts, clip.init(parts))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, taken, expected)
        close(found, value)
        close([metrics["grad_norm"]["ends"], *metrics["grad_norm"]["layers"]], norms)


def test_layerwise_refuses_what_would_sum_no_gradients():
    _, step = layered(lambda x: jax.lax.pmean(x, AXES))
    mapped = shard_map(lambda batch: step({}, {}, batch), P(), P(), check_vma=False)
    with raises(ValueError, "layerwise inside jax.shard_map needs check_vma=True"):
        mapped(np.ones((16, ROWS, COLUMNS)))
