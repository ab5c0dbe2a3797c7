"""Clipping a layer at a time, against optax and against sums of squares by NumPy."""

import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from helpers import mostly_nightly, raises, same

import madax

MAX = 0.1  # below the norms of these gradients, which are 0.2 to 0.4
SGD = optax.sgd(1.0)


def clipped(clip_by, **options):
    options = {"max_norm": MAX, "clip_by": clip_by} | options
    return madax.layerwise(SGD, *layers.FUNCTIONS, **options)


def gradients(params, batch):
    """The gradients of the ends and of each layer, and their norms, by NumPy."""
    grads = jax.jit(jax.grad(layers.whole_loss))(layers.listed(params), batch)
    parts = [grads["ends"], *grads["layers"]]
    return parts, layers.norms_of(parts)


def moves(clip_by, params, batch, state=None):
    """What a step of SGD takes from the ends and each layer, and the new state."""
    init, step = clipped(clip_by)
    state = init(params) if state is None else state
    new, state, _ = jax.jit(step)(params, state, batch)
    taken = layers.listed(jax.tree.map(jnp.subtract, params, new))
    return [taken["ends"], *taken["layers"]], state


def close(found, grads, factors):
    for part, g, factor in zip(found, grads, factors, strict=True):
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(g), strict=True):
            np.testing.assert_allclose(x, factor * y, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}])
def test_the_exact_clip_is_that_of_optax(options):
    tx = optax.chain(optax.clip_by_global_norm(MAX), SGD)
    start = layers.listed(layers.weights())
    params, _, losses = layers.trained(tx.init, layers.ordinary(tx), start)
    found, _, values = layers.trained(*clipped("exact", **options), layers.weights())
    np.testing.assert_allclose(values, losses, rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (layers.listed(found), params)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    _, _, free = layers.trained(SGD.init, layers.ordinary(SGD), start)
    assert abs(free[-1] - losses[-1]) > 0.01


def test_each_layer_may_be_clipped_for_itself():
    params, batch = layers.weights(), layers.batches()[0]
    grads, norms = gradients(params, batch)
    found, state = moves("layer", params, batch)
    close(found, grads, layers.clip_factors(norms, "layer", MAX))
    assert set(state) == {"ends", "layers"}


def test_a_step_is_taken_to_have_the_proportions_of_the_last_ones():
    params, batch = layers.weights(), layers.batches()[0]
    grads, norms = gradients(params, batch)
    found, state = moves("last", params, batch)
    # Without a last step each part is clipped by what is known by then.
    close(found, grads, layers.clip_factors(norms, "last", MAX))
    found, state = moves("last", params, batch, state)
    close(found, grads, layers.clip_factors(norms, "exact", MAX))
    fractions = norms / np.sqrt(np.sum(norms**2))
    kept = [state["fractions"]["ends"], *state["fractions"]["layers"]]
    np.testing.assert_allclose(kept, fractions * np.sqrt(1 - 0.9**2), rtol=1e-5)
    # Other proportions are those of the steps before.
    last = np.float32([0.3, 0.1, 0.2])
    known = {"ends": jnp.asarray(last[0]), "layers": jnp.asarray(last[1:])}
    found, state = moves("last", params, batch, state | {"fractions": known})
    close(found, grads, layers.clip_factors(norms, "last", MAX, last))
    kept = [state["fractions"]["ends"], *state["fractions"]["layers"]]
    squares = 0.9 * last**2 + 0.1 * fractions**2
    np.testing.assert_allclose(kept, np.sqrt(squares), rtol=1e-5)
    # Where the layers had no gradient nothing is known of what the ends will have.
    none = {"ends": jnp.float32(1), "layers": jnp.zeros(layers.DEPTH)}
    found, _ = moves("last", params, batch, state | {"fractions": none})
    close(found, grads, layers.clip_factors(norms, "last", MAX))


@pytest.mark.parametrize("clip_by", mostly_nightly(["exact", "last", "layer"], "last"))
def test_two_stacks_are_clipped_as_one(clip_by):
    params = layers.weights()
    half = lambda i: jax.tree.map(lambda x: x[i : i + 1], params["layers"])
    two = params | {"layers": {"a": half(0), "b": half(1)}}
    embed, layer, loss = layers.FUNCTIONS
    init, step = madax.layerwise(
        SGD, embed, {"a": layer, "b": layer}, loss, max_norm=MAX, clip_by=clip_by
    )
    one, _, expected = layers.trained(*clipped(clip_by), params)
    two, _, losses = layers.trained(init, step, two)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    stacked = jax.tree.map(lambda *x: jnp.concatenate(x), *two["layers"].values())
    for x, y in zip(*map(jax.tree.leaves, (stacked, one["layers"])), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_norms_that_are_not_finite_tell_nothing():
    params = layers.weights()
    bad = params | {"ends": {"table": params["ends"]["table"].at[0, 0].set(jnp.nan)}}
    init, _ = clipped("last")
    old = {"ends": jnp.float32(0.5), "layers": jnp.full(layers.DEPTH, 0.25)}
    _, state = moves(
        "last", bad, layers.batches()[0], init(params) | {"fractions": old}
    )
    same(state["fractions"], old)


def test_a_run_may_begin_to_clip():
    params, batch = layers.weights(), layers.batches()[0]
    init, _ = madax.layerwise(SGD, *layers.FUNCTIONS)
    same(moves("last", params, batch, init(params)), moves("last", params, batch))


@pytest.mark.parametrize("clip_by", ["exact", "layer"])
def test_gradients_in_float16_may_have_norms_beyond_it(clip_by):
    """Of 10,000 elements of 1000 each, whose norm is 100,000."""
    init, step = madax.layerwise(
        SGD,
        lambda ends, batch: batch,
        lambda w, x: x + w,
        lambda ends, x, batch: jnp.sum(x * jnp.float16(1000), dtype=jnp.float32),
        max_norm=1.0,
        clip_by=clip_by,
        dtype=jnp.float16,
    )
    params = {"ends": {}, "layers": jnp.ones((1, 10000))}
    new, *_ = step(params, init(params), jnp.ones((1, 10000), jnp.float16))
    np.testing.assert_allclose(params["layers"] - new["layers"], 0.01, rtol=1e-3)


def test_bad_input_is_refused():
    params, batch = layers.weights(), layers.batches()[0]
    deeper = {"fractions": {"ends": jnp.float32(0), "layers": jnp.zeros(5)}}
    with raises(ValueError, "state['fractions'] is of other layers", "init again"):
        moves("last", params, batch, clipped("last")[0](params) | deeper)
    with raises(ValueError, "max_norm must satisfy max_norm > 0, got 0"):
        clipped("last", max_norm=0)
    with raises(ValueError, "clip_by must be one of", "got 'global'", '"exact" takes'):
        clipped("global")
