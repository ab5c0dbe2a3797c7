"""Clipping a layer at a time, against optax and against sums of squares by NumPy."""

import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from helpers import raises

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


def test_the_last_norm_counts_or_what_is_known_if_that_is_larger():
    params, batch = layers.weights(), layers.batches()[0]
    grads, norms = gradients(params, batch)
    total = np.sqrt(np.sum(norms**2))
    found, state = moves("last", params, batch)
    np.testing.assert_allclose(state["norm"], total, rtol=1e-5)
    close(found, grads, layers.clip_factors(norms, "last", MAX))
    again, _ = moves("last", params, batch, state | {"norm": jnp.float32(3 * total)})
    close(again, grads, layers.clip_factors(norms, "last", MAX, 3 * total))
    # With the norm of the same gradients it is the exact clip.
    exact, _ = moves("exact", params, batch)
    for x, y in zip(
        *map(jax.tree.leaves, (moves("last", params, batch, state)[0], exact)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_norm_that_is_not_finite_is_not_kept():
    params = layers.weights()
    bad = params | {"ends": {"table": params["ends"]["table"].at[0, 0].set(jnp.nan)}}
    init, _ = clipped("last")
    before = init(params) | {"norm": jnp.float32(0.5)}
    _, state = moves("last", bad, layers.batches()[0], before)
    assert state["norm"] == 0.5


def test_bad_input_is_refused():
    with raises(ValueError, "max_norm must satisfy max_norm > 0, got 0"):
        clipped("last", max_norm=0)
    with raises(ValueError, "clip_by must be one of", "got 'global'", '"exact" takes'):
        clipped("global")
