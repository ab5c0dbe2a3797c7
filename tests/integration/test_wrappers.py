"""Madam inside the wrappers of optax and JAX.

Each case is compared with a reference: madam itself without the wrapper, or what the
wrapper does written out by hand.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import jitted_step

import madax

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*beyond p_scale"),
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS = 6
FLOORED = {"b1": 0.9, "floor": 1.0, "p_scale": 1.5}
LOW_BITS = {"b1": 0.9, "moment_format": madax.MomentFormat(bits=8)}
# The same arguments give the same functions, so that steps compile once.
madam = functools.cache(madax.madam)


def make_params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "bias": jnp.zeros(3, dtype),
            "kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype),
        },
        "norm": jnp.ones(3, dtype),
    }


def make_grads(params, steps=STEPS, seed=1):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(steps)
    ]


def run(tx, params, grads, state=None):
    """Takes one step per gradient; returns the last parameters and state."""
    state = tx.init(params) if state is None else state
    for g in grads:
        params, state = jitted_step(tx, g, state, params)
    return params, state


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, actual, expected)


def assert_moved(params, start):
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True):
        assert np.all(np.asarray(new) != np.asarray(old))


# --- optax ----------------------------------------------------------------------------


def test_inject_hyperparams_takes_schedules():
    schedule = optax.cosine_decay_schedule(0.05, STEPS)
    params = make_params()
    grads = make_grads(params)
    injected = optax.inject_hyperparams(madax.madam)(learning_rate=schedule)
    actual, state = run(injected, params, grads)
    assert_close(actual, run(madam(schedule), params, grads)[0])
    np.testing.assert_allclose(
        state.hyperparams["learning_rate"], schedule(STEPS - 1), rtol=1e-6
    )


def test_every_hyperparameter_can_be_injected_and_changed_by_hand():
    before = {
        "learning_rate": 0.1,
        "b2": 0.5,
        "p_scale": 3.0,
        "g_bound": 1.0,
        "b1": 0.75,
        "floor": 0.5,
        "zero_init_scale": 0.25,
        "weight_decay": 0.125,
    }
    # zero_init_scale is for init alone.
    after = {"learning_rate": 0.3, "b2": 0.25, "p_scale": 0.75, "g_bound": 0.5}
    after |= {"b1": 0.5, "floor": 2.0, "weight_decay": 0.5}
    params = make_params()
    grads = make_grads(params)
    # Numbers and arrays.
    given = {k: jnp.asarray(v) if k > "d" else v for k, v in before.items()}
    tx = optax.inject_hyperparams(madax.madam)(**given)
    start = run(tx, params, grads[:2])
    expected = run(madam(**before), params, grads[:2])
    assert_close((start[0], start[1].inner_state), expected)
    unchanged, _ = run(tx, start[0], grads[2:], start[1])
    for name, value in after.items():
        hyperparams = start[1].hyperparams | {name: jnp.asarray(value)}
        state = start[1]._replace(hyperparams=hyperparams)
        changed, _ = run(tx, start[0], grads[2:], state)
        by_hand = madam(**before | {name: value})
        assert_close(changed, run(by_hand, start[0], grads[2:], expected[1])[0])
        difference = changed["dense"]["kernel"] - unchanged["dense"]["kernel"]
        assert np.max(np.abs(difference)) > 1e-3, name


def test_partition_madam_for_matrices_adam_for_the_rest():
    params = make_params()
    grads = make_grads(params)
    for_matrices, adam = madam(0.1, **FLOORED), optax.adam(1e-2)
    tx = optax.partition(
        {"matrix": for_matrices, "rest": adam},
        lambda tree: jax.tree.map(lambda p: "matrix" if p.ndim >= 2 else "rest", tree),
    )
    actual, _ = run(tx, params, grads)

    def split(tree):
        return tree["dense"]["kernel"], (tree["dense"]["bias"], tree["norm"])

    kernel, rest = split(params)
    expected_kernel, _ = run(for_matrices, kernel, [split(g)[0] for g in grads])
    expected_rest, _ = run(adam, rest, [split(g)[1] for g in grads])
    assert_close(split(actual), (expected_kernel, expected_rest))
    assert_moved(actual, params)


def test_multi_steps_accumulates():
    params = make_params()
    grads = make_grads(params, steps=8)
    tx = madam(0.1, **FLOORED)
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    state, actual = multi.init(params), params
    update = jax.jit(multi.update)
    for step, g in enumerate(grads):
        updates, state = update(g, state, actual)
        if step % 4 < 3:
            assert_equal(updates, optax.tree.zeros_like(params))
        actual = optax.apply_updates(actual, updates)

    def mean(micro):
        return jax.tree.map(lambda *g: sum(g) / 4, *micro)

    expected, inner = run(tx, params, [mean(grads[:4]), mean(grads[4:])])
    assert_close((actual, state.inner_opt_state), (expected, inner))
    assert int(state.inner_opt_state.count) == int(inner.count) == 2


def test_apply_if_finite_skips_the_whole_step():
    params = make_params()
    grads = make_grads(params)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads[0])
    tx = optax.apply_if_finite(madam(0.1), max_consecutive_errors=2)
    actual, state = run(tx, params, [*grads[:3], bad, *grads[3:]])
    expected, inner = run(madam(0.1), params, grads)
    assert_equal(actual, expected)
    assert_equal(state.inner_state, inner)
    assert int(state.total_notfinite) == 1


def test_chain_with_gradient_transforms_before():
    params = make_params()
    grads = make_grads(params)
    tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.add_decayed_weights(0.3),
        madam(0.1, b1=0.9),
    )
    actual, _ = run(tx, params, grads)
    inner = madam(0.1, b1=0.9)
    expected, state = params, inner.init(params)
    for g in grads:
        leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(g)]
        norm = np.linalg.norm(np.concatenate(leaves))
        assert norm > 0.5
        g = jax.tree.map(lambda g, w, n=norm: g * (0.5 / n) + 0.3 * w, g, expected)
        expected, state = jitted_step(inner, g, state, expected)
    assert_close(actual, expected)


def test_extra_args_are_ignored_and_reach_the_others_of_a_chain():
    params = make_params()
    (g,) = make_grads(params, steps=1)
    tx = madam(0.1)
    state = tx.init(params)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    expected = jax.jit(tx.update)(g, state, params)
    actual = jax.jit(tx.update)(g, state, params, value=jnp.ones([]), anything=1)
    assert_equal(actual, expected)

    def scale_by_value():
        return optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda updates, state, params=None, *, value, **_: (
                optax.tree.scale(value, updates),
                state,
            ),
        )

    tx = optax.chain(madax.scale_by_second_moment(), scale_by_value(), madax.madam())
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params, value=jnp.zeros([]))
    assert_equal(updates, optax.tree.zeros_like(params))


def test_trees_of_states_know_their_moments_and_nothing_else():
    params = make_params()
    tx = madam(0.1, **LOW_BITS)
    _, state = run(tx, params, make_grads(params))
    marked = optax.tree.map_params(
        tx, lambda _: "moment", state, transform_non_params=lambda _: "other"
    )
    assert (
        marked.direction.nu
        == marked.direction.mu
        == jax.tree.map(lambda _: "moment", params)
    )
    moments = jax.tree.leaves((marked.direction.nu, marked.direction.mu))
    others = [x for x in jax.tree.leaves(marked) if x == "other"]
    assert len(jax.tree.leaves(marked)) == len(moments) + len(others)
    # With a second tree, as for the shardings of a state.
    shapes = optax.tree.map_params(tx, lambda _, p: p.shape, state, params)
    assert shapes.direction.nu["dense"]["kernel"] == (4, 3)
    assert optax.tree.get(state, "count") == STEPS


@pytest.mark.parametrize("b1", [0.9, None])
def test_trees_of_states_know_the_moments_of_muon(b1):
    """Vectors of second moments are none: they have other shapes than parameters."""
    params = make_params() | {"head": {"kernel": jnp.ones((3, 5))}}
    tx = madax.muon(b1=b1, moment_format=madax.MomentFormat(8))
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    marked = optax.tree.map_params(
        tx,
        lambda x, p: is_masked(x) or x.shape == p.shape,
        tx.init(params),
        params,
        transform_non_params=lambda _: "other",
        is_leaf=is_masked,
    )
    found = jax.tree.leaves(marked)
    assert found.count(False) == 0 and found.count(True) >= len(jax.tree.leaves(params))


def test_lookahead():
    start = make_params()
    grads = make_grads(start)
    tx = optax.lookahead(madam(0.1), sync_period=3, slow_step_size=0.5)
    params, _ = run(tx, optax.LookaheadParams.init_synced(start), grads)
    fast = slow = start
    inner = madam(0.1).init(fast)
    for t, g in enumerate(grads):
        fast, inner = jitted_step(madam(0.1), g, inner, fast)
        if t % 3 == 2:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
    assert_close((params.fast, params.slow), (fast, slow))
    assert_moved(params.slow, start)


# --- JAX ------------------------------------------------------------------------------


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def scan_train(tx, params, grads):
    """All steps in one ``lax.scan``; gradients stacked along the first axis."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


@pytest.mark.nightly
def test_scan_is_a_python_loop():
    tx = madam(optax.cosine_decay_schedule(0.1, STEPS), **FLOORED)
    params = make_params()
    grads = make_grads(params)
    actual = jax.jit(lambda p, g: scan_train(tx, p, g))(params, stack(grads))
    expected = run(tx, params, grads)
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
    assert_close(actual, expected)


def test_vmap_over_seeds_and_hyperparameters_is_a_python_loop():
    values = {
        "learning_rate": [0.0, 0.1],
        "b2": [0.5, 0.9],
        "p_scale": [4.0, 1.0],
        "g_bound": [0.5, 5.0],
        "floor": [0.0, 0.5],
        "zero_init_scale": [0.1, 1.0],
    }
    starts = [make_params(seed) for seed in range(2)]
    grads = [make_grads(starts[0], seed=10 + seed) for seed in range(2)]

    @jax.jit
    @jax.vmap
    def train(hyperparams, params, grads):
        return scan_train(madax.madam(**hyperparams), params, grads)[0]

    hyperparams = {name: jnp.array(v) for name, v in values.items()}
    actual = train(hyperparams, stack(starts), stack([stack(g) for g in grads]))
    expected = []
    for i, start in enumerate(starts):
        tx = madam(**{name: v[i] for name, v in values.items()})
        expected.append(run(tx, start, grads[i])[0])
    assert_close(actual, stack(expected))
    assert_equal(jax.tree.map(lambda x: x[0], actual), starts[0])


def buffers(tree):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size]


def test_params_and_state_can_be_donated():
    tx = madam(0.1, **LOW_BITS)
    params = make_params()
    grads = make_grads(params)
    expected, _ = run(tx, params, grads)
    state = jax.jit(tx.init)(params)
    pointers = buffers((params, state))
    assert len(set(pointers)) == len(pointers)
    step = jax.jit(
        lambda g, state, params: jitted_step(tx, g, state, params),
        donate_argnums=(1, 2),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        for g in grads:
            old = params, state
            params, state = step(g, state, params)
            # No step reads the bounds of the last one.
            read = old[0], old[1]._replace(geometry=old[1].geometry[:2])
            assert all(x.is_deleted() for x in jax.tree.leaves(read))
    assert_equal(params, expected)
    pointers = buffers((params, state))
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("options", [FLOORED, LOW_BITS], ids=["floored", "low bits"])
def test_types_are_stable(options, dtype="bfloat16"):
    tx = madax.madam(jnp.asarray(0.1), **options)
    params = make_params(dtype=dtype)
    (g,) = make_grads(params, steps=1)
    state = tx.init(params)

    def types(tree):  # with jax.typeof, weak types count
        return jax.tree.map(jax.typeof, tree)

    # A branch that steps and one that does not have the same types.
    @jax.jit
    def maybe_step(go, params, state):
        return jax.lax.cond(
            go,
            lambda: tx.update(g, state, params),
            lambda: (optax.tree.zeros_like(params), state),
        )

    stepped = maybe_step(True, params, state)
    assert types(stepped) == types((params, state))
    assert not any(x.weak_type for x in jax.tree.leaves(types(state)))
    assert_equal(stepped, jax.jit(tx.update)(g, state, params))
    assert_equal(maybe_step(False, params, state)[1], state)
