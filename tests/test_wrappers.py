"""Madam inside what optax and JAX wrap around optimizers.

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
from helpers import jitted_step, mostly_nightly

import madax

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond p_scale")

STEPS = 6
VARIANTS = {
    "madam": {},
    "floored": {"b1": 0.9, "floor": 1.0, "p_scale": 1.5},
    "low_bit_moments": {"b1": 0.9, "moment_format": madax.MomentFormat(bits=8)},
}
every_variant = pytest.mark.parametrize(
    "variant", mostly_nightly(VARIANTS, "low_bit_moments")
)
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
    """Takes one step a gradient; the parameters and the state after the last."""
    state = tx.init(params) if state is None else state
    for g in grads:
        params, state = jitted_step(tx, g, state, params)
    return params, state


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol=1e-5, atol=1e-7):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def assert_same_run(variant, actual, expected):
    """Compares parameters and state, after two ways to compute the same."""
    if variant == "low_bit_moments":
        # A difference in the last bit may tip a moment to its next code, 1/4 away.
        for a, e in zip(*map(jax.tree.leaves, (actual[0], expected[0])), strict=True):
            assert np.mean(np.isclose(a, e, rtol=1e-5, atol=1e-7)) > 0.9
            np.testing.assert_allclose(a, e, rtol=0.05, atol=0.01)
    else:
        assert_close(actual, expected)


def assert_moved(params, start):
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True):
        assert np.all(np.asarray(new) != np.asarray(old))


@pytest.mark.parametrize(
    "schedule",
    [
        optax.constant_schedule(0.02),
        optax.cosine_decay_schedule(0.05, STEPS),
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, STEPS),
        optax.piecewise_constant_schedule(0.1, {2: 0.1, 4: 0.0}),
    ],
    ids=["constant", "cosine", "warmup", "piecewise"],
)
def test_schedule_sets_the_log_step(schedule):
    # Constant gradients have direction sign(g), so the log-steps add up the rates.
    w = jnp.array([1.0, -1.0, 0.5])
    g = jnp.array([-3.0, 1e-3, 2.0])
    params, _ = run(madam(schedule, p_scale=np.inf), w, [g] * STEPS)
    total = sum(float(schedule(t)) for t in range(STEPS))
    expected = np.asarray(w) * np.exp(-np.sign(w * g) * total)
    np.testing.assert_allclose(params, expected, rtol=1e-5)


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


HYPERPARAMS = {
    "learning_rate": 0.3,
    "b2": 0.5,
    "p_scale": 1.25,
    "g_bound": 1.0,
    "b1": 0.75,
    "floor": 0.5,
    "zero_init_scale": 0.25,
    "weight_decay": 0.125,
}


@every_variant
def test_every_hyperparameter_can_be_injected(variant):
    hyperparams = {**VARIANTS[variant], **HYPERPARAMS}
    if variant == "madam":
        del hyperparams["b1"], hyperparams["floor"]
    injectable = {
        name: jnp.asarray(value) if i % 2 else value
        for i, (name, value) in enumerate(hyperparams.items())
        if name != "moment_format"
    }
    static = {k: v for k, v in hyperparams.items() if k not in injectable}
    params = make_params()
    grads = make_grads(params)
    tx = optax.inject_hyperparams(madax.madam)(**injectable, **static)
    state = jax.jit(tx.init)(params)
    assert set(injectable) <= set(state.hyperparams)
    actual, state = run(tx, params, grads, state)
    expected, inner = run(madam(**hyperparams), params, grads)
    assert_same_run(variant, (actual, state.inner_state), (expected, inner))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b2", 0.25),
        ("p_scale", 0.75),
        ("g_bound", 0.5),
        ("floor", 2.0),
        ("weight_decay", 0.5),
    ],
)
def test_hyperparameter_changed_by_hand_takes_effect(name, value):
    params = make_params()
    grads = make_grads(params)
    given = {"learning_rate": 0.1, "floor": 0.5, "p_scale": 3.0, "weight_decay": 0.1}
    tx = optax.inject_hyperparams(madax.madam)(**given)
    middle, state = run(tx, params, grads[:2])
    before, _ = run(tx, middle, grads[2:], state)
    state.hyperparams[name] = jnp.asarray(value)
    after, _ = run(tx, middle, grads[2:], state)
    inner = run(madam(**given), params, grads[:2])[1]
    expected, _ = run(madam(**{**given, name: value}), middle, grads[2:], inner)
    assert_close(after, expected)
    assert np.max(np.abs(after["dense"]["kernel"] - before["dense"]["kernel"])) > 1e-3
    if name == "p_scale":
        rms0 = np.sqrt(np.mean(np.square(params["dense"]["kernel"])))
        largest = np.max(np.abs(after["dense"]["kernel"]))
        assert largest <= value * rms0 * (1 + 1e-6)


def test_masked_leaves_the_others_alone():
    params = make_params()
    grads = make_grads(params)
    mask = {"dense": {"bias": False, "kernel": True}, "norm": False}
    tx = optax.masked(madam(0.1), mask)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(grads[0], state, params)
    assert_equal(updates["norm"], grads[0]["norm"])
    assert_equal(updates["dense"]["bias"], grads[0]["dense"]["bias"])
    actual, _ = run(tx, params, grads)
    kernels = [g["dense"]["kernel"] for g in grads]
    expected, _ = run(madam(0.1), params["dense"]["kernel"], kernels)
    assert_equal(actual["dense"]["kernel"], expected)


@every_variant
def test_partition_madam_for_matrices_adam_for_the_rest(variant):
    params = make_params()
    grads = make_grads(params)
    for_matrices, adam = madam(0.1, **VARIANTS[variant]), optax.adam(1e-2)
    tx = optax.partition(
        {"matrix": for_matrices, "rest": adam},
        lambda tree: jax.tree.map(lambda p: "matrix" if p.ndim >= 2 else "rest", tree),
    )
    actual, _ = run(tx, params, grads)

    def split(tree):  # at its path, of which rounding depends
        kernel = {"dense": {"kernel": tree["dense"]["kernel"]}}
        return kernel, (tree["dense"]["bias"], tree["norm"])

    kernel, rest = split(params)
    expected_kernel, _ = run(for_matrices, kernel, [split(g)[0] for g in grads])
    expected_rest, _ = run(adam, rest, [split(g)[1] for g in grads])
    assert_close(split(actual), (expected_kernel, expected_rest), rtol=1e-6)
    assert_moved(actual, params)


@pytest.mark.parametrize("dtype", mostly_nightly(["float32", "bfloat16"], "float32"))
@every_variant
def test_multi_steps_accumulates(variant, dtype):
    params = make_params(dtype=dtype)
    grads = make_grads(params, steps=8)
    tx = madam(0.1, **VARIANTS[variant])
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    state, actual = multi.init(params), params
    update = jax.jit(multi.update)
    for step, g in enumerate(grads):
        updates, state = update(g, state, actual)
        if step % 4 < 3:
            assert_equal(updates, optax.tree.zeros_like(params))
        actual = optax.apply_updates(actual, updates)
    if dtype != "float32":  # micro-gradients are averaged in bfloat16
        assert_moved(actual, params)
        return

    def mean(micro):
        return jax.tree.map(lambda *g: sum(g) / 4, *micro)

    expected, inner = run(tx, params, [mean(grads[:4]), mean(grads[4:])])
    assert_same_run(variant, (actual, state.inner_opt_state), (expected, inner))
    assert int(state.inner_opt_state[0].count) == int(inner[0].count) == 2


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


def test_extra_args_are_ignored():
    params = make_params()
    (g,) = make_grads(params, steps=1)
    tx = madam(0.1)
    state = tx.init(params)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    expected = jax.jit(tx.update)(g, state, params)
    actual = jax.jit(tx.update)(g, state, params, value=jnp.ones([]), anything=1)
    assert_equal(actual, expected)


def test_extra_args_reach_the_others_of_a_chain():
    params = make_params()
    (g,) = make_grads(params, steps=1)

    def scale_by_value():
        return optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda updates, state, params=None, *, value, **_: (
                optax.tree.scale(value, updates),
                state,
            ),
        )

    tx = optax.chain(madax.scale_by_second_moment(), scale_by_value(), madax.madam())
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(g, state, params, value=jnp.zeros([]))
    assert_equal(updates, optax.tree.zeros_like(params))


@every_variant
def test_map_params_finds_the_moments_and_nothing_else(variant):
    params = make_params()
    tx = madam(0.1, **VARIANTS[variant])
    _, state = run(tx, params, make_grads(params))
    marked = optax.tree.map_params(
        tx, lambda _: "moment", state, transform_non_params=lambda _: "other"
    )
    assert marked[0].v == jax.tree.map(lambda _: "moment", params)
    if "b1" in VARIANTS[variant]:
        assert marked[0].m == marked[0].v
    moments = jax.tree.leaves((marked[0].v, marked[0].m))
    others = [x for x in jax.tree.leaves(marked) if x == "other"]
    assert len(jax.tree.leaves(marked)) == len(moments) + len(others)

    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert_equal(doubled[0].v, jax.tree.map(lambda x: 2 * x, state[0].v))
    assert_equal(doubled[1:], state[1:])
    assert_equal(doubled[0].count, state[0].count)

    # With a second tree, as for the shardings of a state.
    shapes = optax.tree.map_params(tx, lambda _, p: p.shape, state, params)
    assert shapes[0].v["dense"]["kernel"] == (4, 3)


def test_count_can_be_read_by_name():
    params = make_params()
    _, state = run(madam(0.1), params, make_grads(params))
    counts = dict(optax.tree.get_all_with_path(state, "count"))
    assert counts
    assert {int(count) for count in counts.values()} == {STEPS}
    moments = [v for _, v in optax.tree.get_all_with_path(state, "v")]
    assert len(moments) == 1


def test_lookahead():
    start = make_params()
    grads = make_grads(start)
    tx = optax.lookahead(madam(0.1), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(start)
    state = tx.init(params)
    for g in grads:
        params, state = jitted_step(tx, g, state, params)

    fast = slow = start
    inner = madam(0.1).init(fast)
    for t, g in enumerate(grads):
        fast, inner = jitted_step(madam(0.1), g, inner, fast)
        if t % 3 == 2:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
    assert_close(params.fast, fast)
    assert_close(params.slow, slow)
    assert_moved(params.slow, start)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def scan_train(tx, params, grads):
    """All steps in one ``lax.scan``; gradients stacked along the first axis."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


@every_variant
def test_scan_is_a_python_loop(variant):
    tx = madam(optax.cosine_decay_schedule(0.1, STEPS), **VARIANTS[variant])
    params = make_params()
    grads = make_grads(params)
    actual = jax.jit(lambda p, g: scan_train(tx, p, g))(params, stack(grads))
    expected = run(tx, params, grads)
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
    assert_same_run(variant, actual, expected)


@every_variant
def test_vmap_over_seeds_is_a_python_loop(variant):
    tx = madam(0.1, **VARIANTS[variant])
    starts = [make_params(seed) for seed in range(3)]
    grads = [make_grads(starts[0], seed=10 + seed) for seed in range(3)]
    actual = jax.jit(jax.vmap(lambda p, g: scan_train(tx, p, g)))(
        stack(starts), stack([stack(g) for g in grads])
    )
    expected = [run(tx, p, g) for p, g in zip(starts, grads, strict=True)]
    assert_same_run(variant, actual, stack(expected))


def test_vmap_over_hyperparameters_is_a_python_loop():
    params = make_params()
    grads = make_grads(params)
    values = {
        "learning_rate": [0.0, 0.1],
        "b2": [0.5, 0.9],
        "p_scale": [4.0, 1.0],
        "g_bound": [0.5, 5.0],
        "floor": [0.0, 0.5],
        "zero_init_scale": [0.1, 1.0],
    }

    @jax.jit
    @jax.vmap
    def train(hyperparams):
        return scan_train(madax.madam(**hyperparams), params, stack(grads))[0]

    actual = train({name: jnp.array(v) for name, v in values.items()})
    expected = []
    for i in range(2):
        given = {name: v[i] for name, v in values.items()}
        expected.append(run(madam(**given), params, grads)[0])
    assert_close(actual, stack(expected))
    assert_equal(jax.tree.map(lambda x: x[0], actual), params)


def buffers(tree):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size]


@pytest.mark.parametrize(
    "jit_init", [True, pytest.param(False, marks=pytest.mark.nightly)]
)
@every_variant
def test_params_and_state_can_be_donated(variant, jit_init):
    tx = madam(0.1, **VARIANTS[variant])
    params = make_params()
    grads = make_grads(params)
    expected, _ = run(tx, params, grads)
    state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    pointers = buffers((params, state))
    assert len(set(pointers)) == len(pointers)

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        for g in grads:
            old = params, state
            params, state = step(params, state, g)
            assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert_equal(params, expected)
    pointers = buffers((params, state))
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("dtype", mostly_nightly(["bfloat16", "float32"], "bfloat16"))
@pytest.mark.parametrize(
    ("variant", "rate"),
    [
        ("madam", jnp.asarray(0.1)),
        ("floored", optax.linear_schedule(0.1, 0.0, 4)),
        ("low_bit_moments", 0.1),
    ],
    ids=["madam-array", "floored-schedule", "low_bit_moments-float"],
)
def test_types_are_stable(variant, rate, dtype):
    tx = madax.madam(rate, **VARIANTS[variant])
    params = make_params(dtype=dtype)
    (g,) = make_grads(params, steps=1)
    state = tx.init(params)

    def types(tree):  # with jax.typeof, weak types count
        return jax.tree.map(jax.typeof, tree)

    updates, new_state = jax.eval_shape(tx.update, g, state, params)
    shapes = jax.eval_shape(lambda: (params, state))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), new_state) == (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), shapes[1])
    )
    assert jax.tree.map(lambda x: x.dtype, updates) == (
        jax.tree.map(lambda x: x.dtype, params)
    )
    assert not any(x.weak_type for x in jax.tree.leaves(types(state)))

    # A branch that steps and one that does not have the same types.
    @jax.jit
    def maybe_step(go, params, state):
        return jax.lax.cond(
            go,
            lambda: tx.update(g, state, params),
            lambda: (optax.tree.zeros_like(params), state),
        )

    stepped = maybe_step(True, params, state)
    assert types(stepped[1]) == types(state)
    assert_equal(stepped, jax.jit(tx.update)(g, state, params))
    assert_equal(maybe_step(False, params, state)[1], state)
