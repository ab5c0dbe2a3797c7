"""Wrappers that change what an optimizer sees or does: on floats and on codes.

On codes, a wrapper goes inside with_quantized_params, where everything is floats. The
other way round, arithmetic on trees of codes is an error, never an average of codes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import is_quantized
from optax import contrib

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

RATE = 0.05
X = jax.random.normal(jax.random.key(1), (64, 8))
Y = X @ jax.random.normal(jax.random.key(2), (8, 4))


def madam(**options):
    return madax.madam(RATE, rounding="nearest", **options)


def float_params():
    kernel = 0.5 * jax.random.normal(jax.random.key(0), (8, 4))
    return {"bias": jnp.zeros(4), "kernel": kernel}


def native_params():
    return madax.quantize_params(float_params(), FORMATS["log16"])


def loss(params, x=X, y=Y):
    params = madax.dequantize_params(params)
    return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


def gradient(params, x=X, y=Y):
    return jax.grad(loss)(madax.dequantize_params(params), x, y)


def train(tx, params, steps=30, grads=None, **extra):
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
        now = {name: value(params) for name, value in extra.items()}
        updates, state = tx.update(g, state, params, **now)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        g = gradient(params) if grads is None else grads[i]
        params, state = step(params, state, g)
    return params, state


def on_codes(inner):
    return madax.with_quantized_params(inner, rounding="nearest")


def assert_within_codes(actual, expected, codes):
    """The same weights: biases closely, kernels to within some codes."""
    np.testing.assert_allclose(actual["bias"], expected["bias"], rtol=1e-3, atol=1e-5)
    difference = np.asarray(actual["kernel"].codes, int) - expected["kernel"].codes
    assert np.abs(difference).max() <= codes


def random_grads(steps):
    keys = jax.random.split(jax.random.key(3), steps)
    shape = float_params()
    return [optax.tree.random_like(key, shape) for key in keys]


# What works inside with_quantized_params, and what to check of it.


def test_on_codes_madam_inside_is_madam_native():
    grads = random_grads(12)
    inside, _ = train(on_codes(madam()), native_params(), 12, grads)
    native, _ = train(madam(), native_params(), 12, grads)
    assert_within_codes(inside, native, 2)


def test_multi_steps_accumulates_on_codes():
    grads = random_grads(12)
    multi = optax.MultiSteps(madam(), 4).gradient_transformation()
    actual, _ = train(on_codes(multi), native_params(), 12, grads)
    means = [jax.tree.map(lambda *g: sum(g) / 4, *grads[i : i + 4]) for i in (0, 4, 8)]
    expected, _ = train(madam(), native_params(), 3, means)
    assert_within_codes(actual, expected, 2)


@pytest.mark.parametrize(
    ("skip", "bad"),
    [
        (optax.skip_not_finite, jnp.nan),
        (partial(optax.skip_large_updates, max_squared_norm=1e4), 1e3),
    ],
)
def test_multi_steps_skips_bad_gradients(skip, bad):
    grads = random_grads(4)
    spoiled = jax.tree.map(lambda g: jnp.full_like(g, bad), grads[0])

    def multi(**options):
        inner = optax.MultiSteps(madam(), 2, **options).gradient_transformation()
        return on_codes(inner)

    with_bad = [grads[0], spoiled, *grads[1:]]
    actual, _ = train(multi(should_skip_update_fn=skip), native_params(), 5, with_bad)
    expected, _ = train(multi(), native_params(), 4, grads)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_apply_if_finite_skips_the_whole_step_on_codes():
    grads = random_grads(4)
    one_bad = {**grads[0], "bias": grads[0]["bias"].at[0].set(jnp.nan)}
    tx = optax.apply_if_finite(madam(), 3)
    actual, _ = train(on_codes(tx), native_params(), 5, [grads[0], one_bad, *grads[1:]])
    expected, _ = train(on_codes(madam()), native_params(), 4, grads)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_sam():
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
    tx = on_codes(contrib.sam(madam(), adversary, sync_period=2))
    start = native_params()
    trained, _ = train(tx, start, 60)
    # One step in two goes to the adversary, and is taken back.
    assert loss(trained) < 0.7 * loss(start)
    assert_signs_kept(start, trained)


def assert_signs_kept(start, trained):
    before = madax.dequantize_params(start)["kernel"]
    after = madax.dequantize_params(trained)["kernel"]
    np.testing.assert_array_equal(np.sign(before), np.sign(after))


def test_reduce_on_plateau():
    tx = on_codes(
        optax.chain(
            madam(),
            contrib.reduce_on_plateau(factor=0.5, patience=5, rtol=0.3, min_scale=0.1),
        )
    )
    start = native_params()
    trained, state = train(tx, start, 80, value=loss)
    # It scales u, after the rule, by 1 or less: the weight goes part of the way to
    # where Madam would take it, so signs and bounds are kept.
    assert loss(trained) < 0.9 * loss(start)
    assert_signs_kept(start, trained)
    assert optax.tree.get(state, "scale", filtering=is_plateau) < 1


def is_plateau(path, value):
    del value
    return "ReduceLROnPlateauState" in str(path[-1])


def test_schedule_free_trains_with_a_floor():
    # It moves one sequence of weights by the steps of another, so signs may change. The
    # floor is for that.
    tx = on_codes(contrib.schedule_free(madam(floor=1.0), RATE, b1=0.9))
    start = native_params()
    trained, state = train(tx, start, 100)
    averaged = contrib.schedule_free_eval_params(
        state.inner_state, madax.dequantize_params(trained)
    )
    assert loss(averaged) < 0.3 * loss(start)


def test_schedule_free_breaks_the_papers_rule():
    """The limit that README states: without a floor, signs are not kept."""
    tx = contrib.schedule_free(madam(), RATE, b1=0.5)
    start = float_params()
    z = train(tx, start, 200)[1].z
    assert np.any(np.sign(z["kernel"]) != np.sign(start["kernel"]))


def test_gradients_accumulated_by_microbatches():
    microbatching = pytest.importorskip("optax.microbatching")

    @jax.grad
    def total(weights, x, y):
        return jnp.sum((x @ weights["kernel"] + weights["bias"] - y) ** 2)

    by_parts = microbatching.microbatch(
        total,
        argnums=(1, 2),
        microbatch_size=16,
        accumulator=microbatching.AccumulationType.SUM,
    )
    weights = madax.dequantize_params(native_params())
    whole, parts = total(weights, X, Y), jax.jit(by_parts)(weights, X, Y)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), parts, whole)


@pytest.mark.parametrize(
    "labels",
    [
        {"bias": "adam", "kernel": "madam"},
        lambda tree: {"bias": "adam", "kernel": "madam"},
        lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: "adam" if "bias" in str(path[0]) else "madam",
            tree,
            is_leaf=is_quantized,
        ),
    ],
    ids=["tree", "function", "function of paths"],
)
def test_partition_on_codes(labels):
    tx = optax.partition({"madam": madam(), "adam": optax.adam(0.01)}, labels)
    start = native_params()
    trained, _ = train(tx, start)
    assert loss(trained) < loss(start)
    only_kernel = {"kernel": start["kernel"]}
    first, _ = train(tx, start, 1)
    updates, _ = madam().update(
        {"kernel": gradient(start)["kernel"]}, madam().init(only_kernel), only_kernel
    )
    np.testing.assert_array_equal(
        first["kernel"].codes, optax.apply_updates(only_kernel, updates)["kernel"].codes
    )


def test_map_params_on_codes_finds_the_moments():
    tx = madax.madam(b1=0.9, moment_format=madax.MomentFormat(8))
    state = tx.init(native_params())
    marked = optax.tree.map_params(tx, lambda _: "moment", state)
    names = [x for x in jax.tree.leaves(marked) if isinstance(x, str)]
    assert len(names) == 4  # v and m of two leaves


# What raises, instead of breaking codes.

LOOKAHEAD = optax.LookaheadParams.init_synced
ERRORS = {
    "MultiSteps": optax.MultiSteps(madam(), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(madam(), 2),
    "conditionally": optax.conditionally_transform(madam(), lambda step: step < 1),
    "schedule_free": contrib.schedule_free(madam(), RATE),
    "sam": contrib.sam(madam(), optax.sgd(0.1)),
    "mechanize": contrib.mechanize(madam()),
    "set_to_zero": optax.partition(
        {"a": madam(), "b": optax.set_to_zero()}, {"bias": "a", "kernel": "b"}
    ),
    "a mask of QuantizedArrays": optax.masked(
        madam(),
        lambda tree: jax.tree.map(is_quantized, tree, is_leaf=is_quantized),
    ),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "sgd": optax.sgd(0.1),
}
AFTER = {
    "reduce_on_plateau": contrib.reduce_on_plateau(),
    "scale": optax.scale(0.5),
    "ema": optax.ema(0.9),
    "clip_by_global_norm": optax.clip_by_global_norm(0.5),
    # All numbers are whole, and would stay whole on codes.
    "scale by 2": optax.scale(2),
    "scale by -1": optax.scale(-1),
    "scale_by_learning_rate": optax.scale_by_learning_rate(1),
    "scale_by_schedule": optax.scale_by_schedule(lambda count: 0.5),
    "a schedule": optax.scale_by_learning_rate(optax.constant_schedule(1.0)),
    "apply_every": optax.apply_every(4),
    "trace": optax.trace(1),
    "decay by 1": optax.add_decayed_weights(1),
    "decay": optax.add_decayed_weights(0.1),
    "clip": optax.clip(1),
    "sign": optax.scale_by_sign(),
    "optimistic": optax.scale_by_optimistic_gradient(1, 1),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
}
ERRORS |= {name: optax.chain(madam(), tx) for name, tx in AFTER.items()}
# Caught by JAX and optax, which have their own words for what a dtype does not allow.
DTYPE_ERRORS = {
    "clip_by_global_norm",
    "reduce_on_plateau",
    "scale_by_schedule",
    "a schedule",
    "sign",
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_arithmetic_on_codes_is_an_error(name, jit):
    params = native_params()

    def steps():
        tx = ERRORS[name]
        p, state = params, tx.init(params)
        for _ in range(2):
            more = {"value": loss(p)} if name == "reduce_on_plateau" else {}
            updates, state = tx.update(gradient(p), state, p, **more)
            p = optax.apply_updates(p, updates)
        return p

    words = "QuantizedArray"
    if name in DTYPE_ERRORS:
        words += "|int32|dtype|accepts only NDarrays"
    with pytest.raises((TypeError, ValueError, AttributeError), match=words):
        (jax.jit(steps) if jit else steps)()


def test_decay_of_codes_matches_their_values():
    params, decay = native_params(), optax.add_decayed_weights(0.1)
    grads = gradient(params)
    decayed, _ = decay.update(grads, decay.init(params), params)
    of_values, _ = decay.update(grads, (), madax.dequantize_params(params))
    jax.tree.map(np.testing.assert_array_equal, decayed, of_values)


def test_lookahead_on_codes_is_an_error():
    params = LOOKAHEAD(native_params())
    grads = gradient(native_params())
    tx = optax.lookahead(madam(), sync_period=1, slow_step_size=0.5)
    with pytest.raises(TypeError, match="codes of a QuantizedArray became"):
        tx.update(grads, tx.init(params), params)
    inside = on_codes(tx)
    with pytest.raises(ValueError, match="same tree structure"):
        inside.update(grads, inside.init(params), params)


@pytest.mark.parametrize(
    "average",
    [
        lambda p: optax.incremental_update(p, p, 0.1),
        lambda p: optax.ema(0.9).update(p, optax.ema(0.9).init(p))[0],
        lambda p: jax.tree.map(lambda x: x.mean(), p),
        lambda p: optax.tree.scale(0.5, p),
        lambda p: optax.tree.cast(p, jnp.bfloat16),
    ],
)
def test_averages_of_codes_are_errors(average):
    with pytest.raises(TypeError, match=r"became .*dequantize_params"):
        average(native_params())


def test_steps_of_codes_are_added_by_apply_updates_alone():
    params = native_params()
    updates, _ = madam().update(gradient(params), madam().init(params), params)
    assert updates["kernel"].codes.dtype == FORMATS["log16"].step_dtype
    moved = optax.apply_updates(params, updates)["kernel"]
    assert moved.codes.dtype == FORMATS["log16"].storage_dtype
    assert moved.scale == params["kernel"].scale
    with pytest.raises(TypeError, match=r"optax\.apply_updates adds steps of codes"):
        jax.tree.map(jnp.add, params, updates)


def test_trees_of_other_things_than_arrays_of_numbers_may_be_made_of_codes():
    params = native_params()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for make in (jnp.shape, jnp.ndim, np.size, lambda x: True, lambda x: device):
        jax.tree.map(make, params)
    jax.tree.map(lambda x: x == x, params)
    jax.eval_shape(lambda: params)


def test_flatten_takes_the_start_from_zero_of_a_leaf():
    """All leaves become one, with one scale, and zeros in it are zeros for good."""

    def trained(tx, params):
        return madax.dequantize_params(train(tx, params, 20)[0])

    flat = optax.flatten(madam())
    assert np.all(trained(madam(), float_params())["bias"] != 0)
    assert np.all(trained(flat, float_params())["bias"] == 0)
    assert np.all(trained(on_codes(flat), native_params())["bias"] == 0)
    floored = optax.flatten(madam(floor=1.0))
    assert np.all(trained(floored, float_params())["bias"] != 0)
    with pytest.raises(ValueError, match="has shape"):
        trained(flat, native_params())


@pytest.mark.skipif(
    not hasattr(optax, "selective_transform"), reason="optax has none yet"
)
@pytest.mark.parametrize("frozen", ["bias", "kernel"])
def test_selective_transform(frozen):
    mask = {k: k == frozen for k in ("bias", "kernel")}
    freeze = lambda tx: optax.selective_transform(tx, freeze_mask=mask)
    cases = [(freeze(madam()), float_params()), (on_codes(freeze(madam())), None)]
    if frozen == "bias":
        cases.append((freeze(madam()), None))
    for tx, params in cases:
        params = native_params() if params is None else params
        after, _ = train(tx, params, 3)
        for k, is_frozen in mask.items():
            old, new = (
                jax.tree.leaves(madax.dequantize_params(p[k]))[0]
                for p in (params, after)
            )
            assert np.array_equal(old, new) == is_frozen
    if frozen == "kernel":
        with pytest.raises(ValueError, match="pytree structure error"):
            train(freeze(madam()), native_params(), 1)
