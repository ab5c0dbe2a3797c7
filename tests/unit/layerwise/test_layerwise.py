"""Training a layer at a time equals the ordinary step, to the last bit."""

import functools

import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from cases import FORMATS, OPTIMIZERS
from helpers import different, mostly_nightly, raises

import madax
from madax import MomentFormat

FLOATS = madax.madam(0.02, floor=1.0)
INJECTED = optax.inject_hyperparams(madax.madam)(
    optax.linear_schedule(0.05, 0.01, layers.STEPS), b2=0.9
)
TRAINED = {
    "floats": (FLOATS, None),
    "codes": (OPTIMIZERS["moments8"], FORMATS["symlog8"]),
    "injected": (
        optax.chain(optax.clip(0.01), INJECTED),
        FORMATS["log16"],
    ),
    "adam": (OPTIMIZERS["wrapped_adam"], FORMATS["log8"]),
    "muon": (OPTIMIZERS["muon"], FORMATS["symlog8"]),
    "error_feedback": (OPTIMIZERS["adam_feedback"], FORMATS["symlog8"]),
}


@pytest.mark.parametrize("name", mostly_nightly(TRAINED, "codes"))
def test_layerwise_equals_the_ordinary_step(name):
    if name == "injected" and jax.__version_info__ < (0, 7):
        pytest.skip("the oldest optax makes hyperparameters integers, like codes")
    tx, format = TRAINED[name]
    start = layers.weights(format)
    keys = [jax.random.key(i) for i in range(layers.STEPS)] if name == "codes" else ()
    params, state, losses = layers.trained(
        tx.init, layers.ordinary(tx), layers.listed(start), keys=keys
    )
    run = madax.layerwise(tx, *layers.FUNCTIONS, dtype=jnp.float32)
    found, found_state, found_losses = layers.trained(*run, start, keys=keys)
    assert found_losses == losses
    assert different(layers.listed(found), params) == []
    w, w0 = (jax.tree.leaves(p["layers"]["mlp"])[0] for p in (found, start))
    assert np.all(np.mean(w != w0, axis=(1, 2)) > 0.4)
    if name == "codes":
        assert_same_moments(found_state, state)
    if name == "injected":
        # What belongs to the step is there once, not once per layer.
        rate = found_state["layers"][1].hyperparams["learning_rate"]
        assert rate == state[1].hyperparams["learning_rate"]
        assert rate.shape == found_state["layers"][1].count.shape == ()


def assert_same_moments(stacks, whole):
    for part in ("ends", "layers"):
        found, expected = stacks[part].direction, whole.direction
        expected = {"nu": expected.nu[part], "mu": expected.mu[part]}
        found = {"nu": found.nu[part], "mu": found.mu[part]}
        if part == "layers":
            each = range(layers.DEPTH)
            found = {k: [layers.one(v, i) for i in each] for k, v in found.items()}
        assert different(found, expected) == []
    assert stacks["layers"].count == whole.count
    (window,) = stacks["layers"].direction.window.values()
    assert window.octave.shape == (layers.DEPTH, 2) and window.scale.shape == ()


def norm_of(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


@pytest.mark.usefixtures("quick_compiles")
def test_microbatches_are_means():
    start, batch = layers.weights(), layers.batches()[0]
    # A step takes the gradient off the parameters.
    tx, key = optax.sgd(1.0), jax.random.key(0)

    def with_norms(ends, x, batch):
        return layers.loss(ends, x, batch), {"tokens": batch.size, "x": jnp.mean(x)}

    functions = layers.embed, layers.layer, with_norms
    init, step = madax.layerwise(
        tx, *functions, dtype=jnp.float32, microbatches=4, has_aux=True
    )
    params, _, (value, metrics) = jax.jit(step)(start, init(start), batch, key)
    parts = [batch[i::4] for i in range(4)]

    def part_loss(params, i):
        x = layers.embed(params["ends"], parts[i])
        for j, w in enumerate(params["layers"]):
            fold = jax.random.fold_in
            x = layers.layer(w, x, fold(fold(key, j), i))
        return layers.loss(params["ends"], x, parts[i])

    def mean_loss(params):
        return jnp.mean(jnp.stack([part_loss(params, i) for i in range(4)]))

    expected, grads = jax.jit(jax.value_and_grad(mean_loss))(layers.listed(start))
    found = jax.tree.map(jnp.subtract, layers.listed(start), layers.listed(params))
    assert value == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        grads,
    )
    assert metrics["aux"]["tokens"] == batch.size / 4
    norms = [norm_of(g) for g in grads["layers"]]
    np.testing.assert_allclose(metrics["grad_norm"]["layers"], norms, rtol=1e-4)
    norm = norm_of(grads["ends"])
    assert metrics["grad_norm"]["ends"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.usefixtures("quick_compiles")
def test_layers_pass_integers_on_and_any_tree_of_floats():
    """Positions, masks and a second stream go with what is trained on."""

    def start(ends, batch):
        tokens = batch[:, :-1]
        return {"x": ends["table"][tokens], "seen": tokens > 3, "sum": jnp.zeros(())}

    def both(w, x):
        new = layers.layer(w, x["x"] * x["seen"][..., None])
        return x | {"x": new, "sum": x["sum"] + jnp.mean(new**2)}

    def end(ends, x, batch):
        return layers.loss(ends, x["x"], batch) + x["sum"]

    def whole(params, batch):
        x = start(params["ends"], batch)
        for w in params["layers"]:
            x = both(w, x)
        return end(params["ends"], x, batch)

    params, batch = layers.weights(), layers.batches()[0]
    init, step = madax.layerwise(optax.sgd(1.0), start, both, end, dtype=jnp.float32)
    new, _, value = jax.jit(step)(params, init(params), batch)
    expected, grads = jax.jit(jax.value_and_grad(whole))(layers.listed(params), batch)
    assert value == pytest.approx(float(expected), rel=1e-6)
    found = jax.tree.map(jnp.subtract, layers.listed(params), layers.listed(new))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        grads,
    )


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="the oldest XLA copies a stack on CPU"
)
def test_no_second_stack_is_made():
    """All memory beside parameters and state is less than all layers' codes."""
    depth, wide = 48, 128
    shapes = {"ends": {"w": (8, wide)}, "layers": {"w": (depth, wide, 4 * wide)}}
    floats = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    quantize = functools.partial(madax.quantize_params, format=FORMATS["symlog8"])
    params = {
        "ends": jax.eval_shape(quantize, floats["ends"]),
        "layers": jax.eval_shape(
            functools.partial(quantize, channel_axis=0), floats["layers"]
        ),
    }
    init, step = madax.layerwise(
        madax.madam(moment_format=MomentFormat(8)),
        lambda ends, batch: batch @ ends["w"],
        lambda w, x: x + jnp.tanh(x @ w["w"]) @ w["w"].T,
        lambda ends, x, batch: jnp.mean((x @ ends["w"].T) ** 2),
        dtype=jnp.float32,
    )
    state, batch = jax.eval_shape(init, params), jax.ShapeDtypeStruct((1, 8), "float32")
    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    used = step.memory_analysis()
    count = depth * wide * 4 * wide
    assert 2 * count < used.argument_size_in_bytes < 2.01 * count
    assert used.alias_size_in_bytes > 0.99 * used.argument_size_in_bytes
    # A layer's values, gradients, moments and steps in float32.
    assert used.temp_size_in_bytes < 0.9 * count


def test_by_default_codes_decode_to_float32_and_floats_stay():
    params = layers.weights(FORMATS["symlog8"])
    params["layers"]["gain"] = params["layers"]["gain"].astype(jnp.float16)
    seen = {}

    def of_layer(w, x):
        seen.update(gain=w["gain"].dtype, codes=w["mlp"]["w"].dtype)
        return x

    init, step = madax.layerwise(madax.madam(), layers.embed, of_layer, layers.loss)
    state = jax.eval_shape(init, params)
    params, *_ = jax.eval_shape(step, params, state, layers.batches()[0])
    assert seen == {"gain": jnp.float16, "codes": jnp.float32}
    assert params["layers"]["gain"].dtype == jnp.float16


# --- what is refused ------------------------------------------------------------------

GLOBAL = {
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), FLOATS),
    "apply_if_finite": optax.apply_if_finite(FLOATS, 3),
    "normalize": optax.chain(optax.normalize_by_update_norm(), FLOATS),
    "inside": madax.with_quantized_params(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))
    ),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_no_layer_needs_the_gradients_of_another(name):
    init, _ = madax.layerwise(GLOBAL[name], *layers.FUNCTIONS)
    with raises(ValueError, "tx must update each layer from its own gradients"):
        jax.eval_shape(init, layers.weights())


def test_scalars_that_depend_on_gradients_are_each_layers_own():
    def update(updates, state, params=None):
        del params
        here = [jnp.max(g) for g in jax.tree.leaves(updates)]
        largest = jnp.maximum(state[1], jnp.max(jnp.stack(here)))
        return updates, (state[0] + 1, largest, state[2] + largest)

    def init(params):
        return jnp.int32(0), jnp.float32(0), jnp.float32(0)

    tx = optax.partition(
        {"watched": optax.GradientTransformation(init, update), "not": FLOATS},
        lambda tree: {k: "watched" if k == "layers" else "not" for k in tree},
    )
    params = {"ends": jnp.ones(2), "layers": {"w": jnp.ones((layers.DEPTH, 4))}}
    start, _ = madax.layerwise(tx, *layers.FUNCTIONS)
    count, largest, total = start(params)["layers"].inner_states["watched"].inner_state
    assert count.shape == () and largest.shape == total.shape == (layers.DEPTH,)


def call(**new):
    args = dict(zip(("embed", "layer", "loss"), layers.FUNCTIONS, strict=True))
    args |= {"tx": FLOATS, "dtype": jnp.float32}
    args |= {"params": layers.weights(), "batch": layers.batches()[0]} | new
    params, batch = args.pop("params"), args.pop("batch")
    init, step = madax.layerwise(**args)
    jax.eval_shape(lambda p, b: step(p, init(p), b), params, batch)


BAD = [
    (TypeError, {"tx": optax.adam}, "tx must be an optax.GradientTransformation"),
    (TypeError, {"layer": 3}, "layer must be a function, got 3"),
    (TypeError, {"dtype": jnp.int8}, "dtype must be a floating dtype"),
    (ValueError, {"microbatches": 0}, "microbatches must be 1 or more, got 0"),
    (TypeError, {"microbatches": "2"}, "microbatches must be an int, got '2'"),
    (ValueError, {"microbatches": 3}, "batch has shape (8, 9)", "microbatches=3"),
    (ValueError, {"params": {"layers": 1}}, "params must be a dict of", "['layers']"),
    (
        ValueError,
        {"params": {"ends": {}, "layers": [np.ones((3, 2)), np.ones((2, 3))]}},
        "params['layers/1'] has shape (2, 3)",
        "leading axis of 3",
    ),
    (
        ValueError,
        {"params": {"ends": {}, "layers": {}}},
        "must be a tree of arrays with a leading axis",
    ),
    (
        ValueError,
        {"layer": lambda w, x: jnp.bfloat16(x)},
        "layer must return x with its shapes and dtypes",
        "bfloat16",
    ),
    (ValueError, {"loss": lambda e, x, b: x}, "loss must return a floating scalar"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[2][:24])
def test_bad_input_is_refused(case):
    kind, new, *message = case
    with raises(kind, *message):
        call(**new)


def test_a_state_of_another_optimizer_is_refused():
    params = layers.weights()
    init, _ = madax.layerwise(FLOATS, *layers.FUNCTIONS)
    _, step = madax.layerwise(OPTIMIZERS["moments8"], *layers.FUNCTIONS)
    with raises(ValueError, "the state of the layers does not match tx"):
        jax.eval_shape(step, params, init(params), layers.batches()[0])


@pytest.mark.parametrize("depth", [1, layers.DEPTH + 1])
def test_a_state_of_another_depth_is_refused(depth):
    params = layers.weights()
    stack = jax.tree.map(lambda w: jnp.stack([w[0]] * depth), params["layers"])
    init, step = madax.layerwise(FLOATS, *layers.FUNCTIONS)
    state = init(params | {"layers": stack})
    with raises(ValueError, f"got an array of shape ({depth}, 16", "call init again"):
        jax.eval_shape(step, params, state, layers.batches()[0])


def test_a_state_of_other_parts_is_refused():
    params = layers.weights()
    init, step = madax.layerwise(FLOATS, *layers.FUNCTIONS)
    with raises(ValueError, "the ends and of the layers", "the init that layerwise"):
        step(params, FLOATS.init(params["ends"]), layers.batches()[0])
    embed, layer, loss = layers.FUNCTIONS
    both = params | {"layers": {"a": params["layers"], "b": params["layers"]}}
    _, step = madax.layerwise(
        FLOATS,
        {"a": embed, "b": lambda ends, batch, x: x},
        {"a": layer, "b": layer},
        loss,
    )
    with raises(ValueError, "the layers ['a', 'b']", "the init that layerwise"):
        step(both, init(params), layers.batches()[0])
