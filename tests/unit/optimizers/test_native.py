"""Training natively on codes: the same as on-the-grid floats, under all of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import is_quantized, same

import madax
from madax import LogFormat, MomentFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = FORMATS["log8"]


def small(seed=0, fmt=FMT):
    """A quantised kernel, a float bias and scalar, and five gradients."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"kernel": normal(6, 5), "bias": jnp.zeros(5), "gain": jnp.float32(1.5)}
    grads = [
        {"kernel": normal(6, 5), "bias": normal(5), "gain": normal()} for _ in range(5)
    ]
    return madax.quantize_params(params, fmt), grads


def steps(tx, params, grads, jit=jax.jit):
    state, update = tx.init(params), jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


NATIVE = partial(madax.madam, 0.03, moment_format=MomentFormat(8))


def test_jit_with_donation_scan_and_eager_agree():
    params, grads = small()
    params = {"kernel": params["kernel"]}
    grads = [{"kernel": g["kernel"]} for g in grads[:3]]
    tx = NATIVE(seed=4)
    expected = steps(tx, params, grads, jit=lambda f: f)
    assert np.any(expected["kernel"].codes != params["kernel"].codes)

    def update(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    scan = jax.jit(
        lambda p: jax.lax.scan(
            lambda c, g: (update(*c, g), None), (p, tx.init(p)), stacked
        )
    )
    same(scan(params)[0][0]["kernel"], expected["kernel"])
    step = jax.jit(update, donate_argnums=(0, 1))
    mine = jax.tree.map(jnp.copy, params)
    before, state = mine["kernel"].codes, tx.init(mine)
    moments = state.direction.nu["kernel"]
    for g in grads:
        mine, state = step(mine, state, g)
    same(mine["kernel"], expected["kernel"])
    assert before.is_deleted() and moments.is_deleted()
    assert step._cache_size() == 1


def test_nothing_changes_its_type():
    params, grads = small()
    tx = NATIVE()
    types = lambda tree: [
        (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)
    ]
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads[0], state, params)
    assert types(after) == types(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert types(optax.apply_updates(params, updates)) == types(params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["kernel"].scale == 0


@pytest.mark.nightly
def test_vmap_over_seeds_is_one_seed_at_a_time():
    params, grads = small()
    run = lambda seed: steps(NATIVE(seed=seed), params, grads)["kernel"].codes
    many = jax.jit(jax.vmap(run))(jnp.arange(4))
    for seed in range(4):
        np.testing.assert_array_equal(many[seed], run(seed))
    assert len({m.tobytes() for m in np.asarray(many)}) == 4


def test_masks_and_labels_of_codes():
    """Trees of booleans or labels, a leaf of them for each QuantizedArray."""
    params, grads = small()
    mask = jax.tree.map(is_quantized, params, is_leaf=is_quantized)
    assert mask == {"kernel": True, "bias": False, "gain": False}
    tx = optax.masked(NATIVE(), mask)
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    alone = {"kernel": params["kernel"]}
    inner = NATIVE()
    expected, _ = inner.update({"kernel": grads[0]["kernel"]}, inner.init(alone), alone)
    same(updates["kernel"], expected["kernel"])
    same(updates["bias"], grads[0]["bias"])

    labels = jax.tree.map(
        lambda w: "codes" if is_quantized(w) else "floats", params, is_leaf=is_quantized
    )
    tx = optax.partition({"codes": NATIVE(), "floats": optax.sgd(0.5)}, labels)
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    same(updates["kernel"], expected["kernel"])
    np.testing.assert_allclose(updates["bias"], -0.5 * grads[0]["bias"], rtol=1e-6)
    moved = optax.apply_updates(params, updates)
    assert moved["kernel"].codes.dtype == jnp.int8


def test_mixed_trees_treat_each_leaf_as_if_alone():
    params, grads = small()
    tx = madax.madam(0.03, rounding="nearest")
    together = steps(tx, params, grads)
    for name in params:
        alone = steps(tx, {name: params[name]}, [{name: g[name]} for g in grads])
        same(alone[name], together[name])


def test_many_small_steps_add_up():
    """At 16 bits, steps of a thirtieth of a code move weights in full on average."""
    fmt = LogFormat.from_dynamic_range(16, 10_000)
    rng = np.random.default_rng(0)
    w = rng.choice([-1, 1], (200, 200)) * np.exp(rng.uniform(-3, 0, (200, 200)))
    params = madax.quantize_params(jnp.asarray(w, jnp.float32), fmt)
    tx, n, rate = madax.madam(1e-5, seed=2), 300, 1e-5
    ones = jnp.ones((n, *w.shape))
    step = lambda c, g: (advance(tx, *c, g), None)
    (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), ones)
    moved = np.asarray(after.codes, int) - np.asarray(params.codes, int)
    p = rate / fmt.base_step
    spread = np.sqrt(n * p * (1 - p))
    assert abs(moved.mean() + n * p) < 5 * spread / 200 + n * 2**-17
    assert moved.std() == pytest.approx(spread, rel=0.03)


def advance(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(("bits", "bound"), [(8, 2.1), (16, 3.1)])
def test_parameters_and_state_take_few_bytes(bits, bound):
    w = jnp.ones((256, 256))
    params = madax.quantize_params({"w": w}, LogFormat(bits))
    tx = madax.madam(moment_format=MomentFormat(8))

    def nbytes(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    params, state = jax.jit(partial(advance, tx))(params, tx.init(params), {"w": w})
    total = nbytes(params) + nbytes(state)
    assert total / w.size <= bound
    assert nbytes(params) == params["w"].nbytes
    assert params["w"].nbytes / w.size <= bits / 8 + 0.001
