"""Training natively on codes: the same as on-the-grid floats, under all of JAX."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers import is_quantized
from sklearn.datasets import load_digits

import madax
from madax import LogFormat, MomentFormat, SymlogFormat, UniformFormat

STEPS, BATCH, SIZES = 500, 32, (64, 128, 64, 10)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- a real network: digits, 17 024 weights -------------------------------------------


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order] / 16, y[order]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def first_weights():
    rng = np.random.default_rng(1)
    shapes = itertools.pairwise(SIZES)
    return {
        f"kernel_{i}": jnp.asarray(
            rng.standard_normal(s) * np.sqrt(2 / s[0]), jnp.float32
        )
        for i, s in enumerate(shapes)
    }


def logits(params, x):
    for i in range(len(SIZES) - 2):
        x = jax.nn.relu(x @ params[f"kernel_{i}"])
    return x @ params[f"kernel_{len(SIZES) - 2}"]


def loss(params, x, y):
    out = logits(madax.dequantize_params(params), x)
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()


def batches(digits, steps=STEPS):
    x, y = digits
    rows = np.random.default_rng(2).integers(0, 1500, (steps, BATCH))
    return x[rows], y[rows]


def gradients(params, x, y):
    return jax.grad(loss)(madax.dequantize_params(params), x, y)


def train(tx, params, data):
    """Parameters after a scan over the batches, and the gradients on the way."""

    def step(carry, batch):
        params, state = carry
        grads = gradients(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), grads

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), data))
    (params, _), grads = run(params)
    return params, grads


@pytest.fixture(scope="module")
def recorded(digits):
    return train(madax.madam(0.01), first_weights(), batches(digits))[1]


def float_chain(learning_rate, fmt, rounding, seed):
    return optax.chain(
        madax.scale_by_second_moment(),
        optax.clip(10.0),
        optax.scale_by_learning_rate(learning_rate),
        madax.scale_by_sign_log(),
        madax.clip_log_weights(),
        madax.lns_quantize(fmt, rounding=rounding, seed=seed),
    )


def float_state(tx, params, codes):
    """The scales of the codes: those of the weights before they were quantised."""
    scales = jnp.stack([w.scale.squeeze() for w in codes.values()])
    *head, clip, grid = tx.init(params)
    return (*head, clip._replace(peak0=scales), grid._replace(scale=scales))


@pytest.mark.parametrize(
    ("fmt", "learning_rate", "rounding"),
    [
        (LogFormat.from_dynamic_range(8, 1000), 0.01, "nearest"),
        (LogFormat.from_dynamic_range(16, 10_000), 2e-4, "stochastic"),
    ],
    ids=["8 bits", "16 bits"],
)
def test_floats_on_the_grid_and_codes_agree(recorded, fmt, learning_rate, rounding):
    """The same 500 recorded gradients to both; compared after every step.

    With nearest rounding a step may be a tie, up to float32's accuracy: told from the
    exact steps, recomputed in float64 from the recorded gradients. A weight counts
    until its first tie, and up to there its codes must agree. With stochastic rounding
    the two may disagree where the random number falls between two float32 roundings of
    one step: for one code in 100 000 after all the steps.
    """
    codes = madax.quantize_params(first_weights(), fmt)
    floats = madax.dequantize_params(codes)
    native = madax.madam(learning_rate, rounding=rounding, seed=5)
    on_grid = float_chain(learning_rate, fmt, rounding, seed=5)

    def encode(w, q):
        code = fmt.saturate(jnp.round(fmt.encode(w / q.scale)), jnp.sign(w))
        off_grid = jnp.abs(q.scale * fmt.decode(code) / w - 1) > 1e-6
        return jnp.where(off_grid, jnp.nan, code)

    def step(carry, grads):
        codes, state, floats, float_state = carry
        updates, state = native.update(grads, state, codes)
        codes = optax.apply_updates(codes, updates)
        updates, float_state = on_grid.update(grads, float_state, floats)
        floats = optax.apply_updates(floats, updates)
        differ = {k: encode(floats[k], q) != q.codes for k, q in codes.items()}
        return (codes, state, floats, float_state), differ

    carry = (codes, native.init(codes), floats, float_state(on_grid, floats, codes))
    run = jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads))
    (last, *_), differ = run(carry, recorded)
    moved = np.mean([np.mean(last[k].codes != codes[k].codes) for k in codes])
    assert moved > 0.2
    if rounding == "stochastic":
        different = sum(d[-1].sum() for d in differ.values())
        assert different <= 1e-5 * sum(d[-1].size for d in differ.values())
        return
    weights = ties = 0
    for k, grads in recorded.items():
        tied = np.asarray(ties_of(np.asarray(grads), learning_rate, fmt.base_step))
        ever_tied = np.logical_or.accumulate(tied, axis=0)
        assert not np.any(np.asarray(differ[k]) & ~ever_tied)
        weights, ties = weights + tied[0].size, ties + ever_tied[-1].sum()
    assert ties < 0.1 * weights


def ties_of(grads, learning_rate, base_step):
    """Where a step in codes is within float32's accuracy of half a code."""
    v = np.zeros(grads.shape[1:])
    tied = np.zeros(grads.shape, bool)
    for t, g in enumerate(grads.astype(np.float64)):
        v += 0.001 * (g * g - v)
        v_hat = v / -np.expm1((t + 1) * np.log(0.999))
        g_hat = np.divide(g, np.sqrt(v_hat), where=v > 0, out=np.zeros_like(g))
        steps = learning_rate * np.clip(g_hat, -10, 10) / base_step
        fraction = np.abs(steps - np.floor(steps) - 0.5)
        tied[t] = fraction < 2e-5 * np.maximum(1, np.abs(steps))
    return tied


def accuracy(params, digits):
    x, y = digits
    out = logits(madax.dequantize_params(params), x[1500:])
    return float(jnp.mean(jnp.argmax(out, -1) == y[1500:]))


@pytest.mark.nightly
def test_with_stored_moments_every_format_learns(digits):
    rate, data = optax.cosine_decay_schedule(0.03, 200), batches(digits, 200)
    for fmt in (SymlogFormat(8, 0.3), UniformFormat(8)):
        codes = madax.quantize_params(first_weights(), fmt, channel_axis=-1)
        tx = madax.madam(rate, moment_format=MomentFormat(8))
        assert accuracy(train(tx, codes, data)[0], digits) > 0.9, fmt


# --- the rest on a small mixed tree ---------------------------------------------------

FMT = LogFormat.from_dynamic_range(bits=8, ratio=1000)


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
    moments = state[0].v["kernel"]
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


def test_linen_train_state():
    class Mlp(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(jnp.tanh(linen.Dense(32)(x)))

    x = jnp.linspace(-1, 1, 64)[:, None]
    variables = jax.jit(Mlp().init)(jax.random.key(0), x)
    params = madax.quantize_params(variables["params"], FMT)
    state = TrainState.create(apply_fn=Mlp().apply, params=params, tx=NATIVE(seed=1))
    state = state.replace(step=jnp.zeros([], jnp.int32))  # flax starts at a Python 0

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - x**2) ** 2)

        decoded = madax.dequantize_params(state.params)
        value, grads = jax.value_and_grad(loss)(decoded)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(100):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    assert is_quantized(state.params["Dense_0"]["kernel"])
    assert step._cache_size() == 1


class Regressor(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(1, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def test_nnx():
    x = jnp.linspace(-1, 1, 64)[:, None]
    graph, params = nnx.split(Regressor(nnx.Rngs(0)), nnx.Param)
    params = madax.quantize_params(params, FMT)
    tx = NATIVE(seed=1)
    state = tx.init(params)

    def loss(decoded):
        return jnp.mean((nnx.merge(graph, decoded)(x) - x**2) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(madax.dequantize_params(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(100):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert step._cache_size() == 1
    assert losses[-1] < 0.3 * losses[0]
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    assert sum(map(is_quantized, leaves)) == 2


def test_mixed_trees_treat_each_leaf_as_if_alone():
    params, grads = small()
    tx = madax.madam(0.03, rounding="nearest")
    together = steps(tx, params, grads)
    for name in params:
        alone = steps(tx, {name: params[name]}, [{name: g[name]} for g in grads])
        same(alone[name], together[name])


def test_many_small_steps_add_up():
    """16 bits at a rate of 1e-5, a thirtieth of a code: on average to the full."""
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


def test_bfloat16_weights_rounded_to_nearest_stall(bits=8):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.uniform(0.5, 2, (128, 128)), jnp.float32)
    half = w.astype(jnp.bfloat16)
    fmt = LogFormat.from_dynamic_range(bits, 1000)
    codes = madax.quantize_params(w, fmt)
    n, ones = 100, jnp.ones(w.shape)

    def run(params, rounding="stochastic"):
        tx = madax.madam(1e-3, rounding=rounding)
        step = lambda c, _: (advance(tx, *c, ones), None)
        return jax.lax.scan(step, (params, tx.init(params)), length=n)[0][0]

    np.testing.assert_array_equal(run(half, "nearest"), half)
    for before, after in [(half, run(half)), (codes[...], run(codes)[...])]:
        ratio = np.log(np.float32(after) / np.float32(before))
        assert np.mean(ratio) == pytest.approx(-n * 1e-3, rel=0.03)


@pytest.mark.parametrize(("bits", "bound"), [(8, 2.1), (16, 3.1)])
def test_memory(bits, bound):
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
