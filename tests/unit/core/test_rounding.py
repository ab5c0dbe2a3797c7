"""Rounding of code steps: unbiased, independent, the same numbers everywhere.

Seeds are fixed, so nothing here is flaky: thresholds are those of a false alarm once
in about a million tests. That a mesh draws the same numbers is shown by test_meshes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import madax
from madax._core.rounding import leaf_keys, random_bits, round_steps

SIGMAS = 5.0
P_VALUE = 1e-6
MILLION = 1 << 20
PATHS = ["a", "b/c", "layers/3/w"]


def key_of(seed, step, path, layer=None):
    return leaf_keys(seed, jnp.int32(step), [path], layer)[0]


def bits_of(seed, step, leaf, shape):
    return np.asarray(random_bits(key_of(seed, step, f"leaf/{leaf}"), shape))


def uniform(bits):
    """The high halves, centred: mean 0, variance 1."""
    return ((bits >> 16) + 0.5) / 2**16 * np.sqrt(12) - np.sqrt(3)


FRACTIONS = [1e-3, -1e-3, 0.02, 0.25, 0.5, -0.3, 0.999, -1.7, 0.0, 2e-5, -7e-6, 1e-6]


def test_stochastic_rounding_is_unbiased():
    """The average over 2**24 even random numbers is right to within 2**-23."""
    bits = jnp.arange(2**24, dtype=jnp.uint32) << 8
    rounding = jax.jit(lambda step: round_steps(step, bits))
    for step in np.float32(FRACTIONS):
        rounded = np.asarray(rounding(jnp.full(bits.shape, step)))
        assert rounded.dtype == np.int32
        assert set(np.unique(rounded)) <= {np.floor(step), np.floor(step) + 1}
        assert abs(rounded.mean() - float(step)) <= 2**-23


def test_whole_steps_are_whole_and_nearest_rounds_halves_to_even():
    """All but to within the spacing of floats, which step and random number share."""
    whole = jnp.array([-32767, -4096, -128, -1, 0, 1, 127, 4096, 65535], jnp.float32)
    for bits in (0, 2**32 - 1, 2**30, 2**31 - 2**24, 2**31 + 2**24):
        every = jnp.full(whole.shape, bits, jnp.uint32)
        rounded = round_steps(whole, every)
        np.testing.assert_array_equal(rounded, whole)
    for bits in (2**31 - 1, 2**31):  # once in 2**25 times
        every = jnp.full(whole.shape, bits, jnp.uint32)
        rounded = round_steps(whole, every)
        np.testing.assert_allclose(rounded, whole, rtol=0, atol=1)
        assert rounded[4] == 0
    halves = jnp.array([-2.5, -1.5, -0.6, -0.5, 0.5, 0.6, 1.5, 2.5], jnp.float32)
    nearest = [-2, -2, -1, 0, 0, 1, 2, 2]
    np.testing.assert_array_equal(round_steps(halves, None), nearest)


@pytest.mark.parametrize("learning_rate", [1e-5, 0.003, 0.02])
def test_weights_move_at_the_right_average_rate(learning_rate):
    """A million weights, one native step from a gradient of constant size."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], (1024, 1024)).astype(np.float32)
    fmt = madax.LogFormat(8, 0.05)
    params = madax.quantize_params(jnp.asarray(sign), fmt)
    tx = madax.madam(learning_rate, seed=11)
    updates, _ = jax.jit(tx.update)(jnp.ones_like(sign), tx.init(params), params)
    p = learning_rate / 0.05
    error = -np.mean(np.asarray(updates.codes, np.float64)) - p
    assert abs(error) <= 2**-23 + SIGMAS * np.sqrt(p * (1 - p) / MILLION)


def test_a_chain_of_its_own_draws_new_bits_each_step():
    """A weight takes a fifth of its steps; of one draw it would take all or none."""
    tx = madax.lns_quantize()
    params = madax.quantize_params(jnp.ones((64, 64)), madax.UniformFormat(16))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.full((64, 64), -0.2), state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=50)
    moved = np.asarray(params.codes - after.codes)
    assert abs(moved.mean() - 10) < SIGMAS * np.sqrt(8 / moved.size)
    assert moved.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.2)


def table(axis, rows=256, columns=4096):
    """Bits with steps, leaves or seeds as rows, elements as columns."""
    one = {
        "steps": lambda i: bits_of(0, i, 0, (columns,)),
        "late_steps": lambda i: bits_of(5, 10**6 + i, 2, (columns,)),
        "leaves": lambda i: np.asarray(random_bits(keys[i], (columns,))),
        "seeds": lambda i: bits_of(i, 0, 0, (columns,)),
    }[axis]
    keys = leaf_keys(0, jnp.int32(0), [f"w/{i}" for i in range(rows)])
    return np.stack([one(i) for i in range(rows)])


@pytest.fixture(scope="module", params=["steps", "late_steps", "leaves", "seeds"])
def bits(request):
    return table(request.param)


def test_every_bit_is_set_half_the_time(bits):
    ones = np.array([np.mean((bits >> k) & 1) for k in range(32)])
    assert np.abs(ones - 0.5).max() * 2 * np.sqrt(bits.size) < SIGMAS


def chi_square(values, bins):
    counts = np.bincount(np.ravel(values), minlength=bins)
    return stats.chisquare(counts).pvalue


def test_both_halves_are_uniform_and_independent_of_each_other(bits):
    high, low = bits >> 16, bits & 0xFFFF
    for half in (high, low):
        assert chi_square(half, 2**16) > P_VALUE
    pairs = (high >> 9 << 7 | low >> 9, (high & 127) << 7 | low & 127)
    for pair in pairs:
        assert chi_square(pair, 2**14) > P_VALUE
    r = np.corrcoef(high.ravel(), low.ravel())[0, 1]
    assert abs(r) * np.sqrt(bits.size) < SIGMAS


LAGS = [1, 2, 3, 4, 7, 8, 16, 64, 128, 255]


def shifted(bits, axis, lag):
    n = bits.shape[axis]
    return bits.take(range(n - lag), axis), bits.take(range(lag, n), axis)


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbours_are_independent(bits, axis):
    """Along elements, and along steps, leaves or seeds: no serial correlation."""
    for half in (bits, bits << 16):
        for lag in LAGS:
            a, b = shifted(half, axis, lag)
            r = np.mean(uniform(a) * uniform(b)) * np.sqrt(a.size)
            assert abs(r) < SIGMAS, lag
        for lag in (1, 2, 64):
            a, b = shifted(half, axis, lag)
            pairs = a >> 25 << 7 | b >> 25
            assert chi_square(pairs, 2**14) > P_VALUE, lag
            # What rounds and what does not: a rare event next to a rare event.
            both = np.mean((a < 2**26) & (b < 2**26))
            p = 2.0**-12
            assert abs(both - p) * np.sqrt(a.size / p) < SIGMAS, lag


@pytest.mark.parametrize("shape", [(1024, 1024), (2**16, 16), (8, 2**17)])
def test_neighbours_in_a_matrix_are_independent(shape):
    """Along both axes and diagonals, as the hash is one of sum and difference."""
    whole = bits_of(3, 5, 0, shape)
    rows, columns = shape
    for down, right in [(1, 0), (0, 1), (1, 1), (1, -1), (2, -2), (3, 1), (4, -8)]:
        a = whole[: rows - down, max(0, -right) : columns - max(0, right)]
        b = whole[down:, max(0, right) : columns - max(0, -right)]
        for x, y in ((a, b), (a << 16, b << 16)):
            r = np.mean(uniform(x) * uniform(y)) * np.sqrt(x.size)
            assert abs(r) < SIGMAS, (down, right)
            assert chi_square(x >> 25 << 7 | y >> 25, 2**14) > P_VALUE, (down, right)


def test_random_bits_have_no_pattern_in_the_plane(bits):
    """The spectrum of white noise: its largest peak is ln(n), give or take a few."""
    for half in (bits, bits << 16):
        power = np.abs(np.fft.rfft2(uniform(half))) ** 2 / half.size
        assert power.max() < np.log(power.size) - np.log(P_VALUE)


def test_seeds_steps_and_leaves_are_not_interchangeable():
    rows = {}
    for seed in range(6):
        for step in range(6):
            for leaf in range(6):
                rows[seed, step, leaf] = bits_of(seed, step, leaf, (512,)).tobytes()
    assert len(set(rows.values())) == 6**3


def test_the_bits_belong_to_the_global_index():
    """A row and its number in it, whatever the axes of the rows."""
    key = key_of(0, 3, "w")
    rows = random_bits(key, (8, 3))
    assert len(np.unique(rows)) == 24
    for shape in [(8, 1, 3), (4, 2, 3), (2, 1, 2, 2, 3)]:
        np.testing.assert_array_equal(random_bits(key, shape).reshape(8, 3), rows)
    for shape in [(1, 3), (3,), (1, 1, 3)]:
        np.testing.assert_array_equal(random_bits(key, shape).ravel(), rows[0])
    np.testing.assert_array_equal(random_bits(key, ()), rows[0, 0])
    assert random_bits(key, (3, 0)).shape == (3, 0)
    # More elements than a 32-bit product of strides may hold are still addressed.
    shape = jax.eval_shape(lambda: random_bits(key, (2**20, 2**13)))
    assert shape.shape == (2**20, 2**13)


def test_jit_eager_and_vmap_agree():
    seeds, steps = jnp.arange(5), jnp.arange(5) * 7

    def draw(seed, step):
        keys = leaf_keys(seed, step, PATHS)
        return jax.vmap(lambda key: random_bits(key, (8, 5)))(keys)

    eager = jnp.stack(
        [
            jnp.stack([random_bits(key, (8, 5)) for key in leaf_keys(s, t, PATHS)])
            for s, t in zip(range(5), steps, strict=True)
        ]
    )
    for transform in (jax.vmap(draw), jax.jit(jax.vmap(draw))):
        np.testing.assert_array_equal(transform(seeds, steps), eager)
    one = jax.jit(draw, static_argnums=0)(2, steps[2])
    np.testing.assert_array_equal(one, eager[2])


@pytest.mark.parametrize("seed", [0, -1, 2**31 - 1, np.int64(7), np.uint32(2**32 - 1)])
def test_every_kind_of_seed_gives_its_own_numbers(seed):
    keys = leaf_keys(seed, jnp.int32(0), PATHS)
    assert not np.array_equal(keys, leaf_keys(12345, jnp.int32(0), PATHS))
    assert keys.dtype == jnp.uint32 and keys.shape == (3,)


def test_a_path_is_a_key_wherever_its_leaf_is_trained():
    paths = ["a/w", "b/w", "w", "", "a/0/w", "a/1/w", "a/0/w/1", "a/1/w/0", "0/a/w"]
    keys = leaf_keys(0, jnp.int32(5), paths)
    assert len({key.tobytes() for key in np.asarray(keys)}) == len(paths) - 1
    np.testing.assert_array_equal(
        keys[4], keys[8]
    )  # where an index stands is no matter
    for path, key in zip(paths, keys, strict=True):
        np.testing.assert_array_equal(key_of(0, 5, path), key)
    assert leaf_keys(0, jnp.int32(0), []).shape == (0,)


def test_a_layer_of_a_stack_has_the_key_of_that_layer_alone():
    stacked = ["layers/w", "layers/mlp/0/w"]
    for i in (0, 3, 70):
        alone = leaf_keys(1, jnp.int32(5), [f"layers/{i}/w", f"layers/{i}/mlp/0/w"])
        layer = jax.jit(lambda i: leaf_keys(1, jnp.int32(5), stacked, i))(i)
        np.testing.assert_array_equal(layer, alone)


@pytest.mark.parametrize("transform", ["partition", "two seeds"])
def test_leaves_of_one_shape_are_rounded_apart(transform):
    """Those of two optimizers of one seed, and models under vmap with a seed each."""
    fmt, shape = madax.LogFormat(8, 0.05), (64, 64)
    params = madax.quantize_params({k: jnp.ones(shape) for k in "uw"}, fmt)
    grads = {k: jnp.ones(shape) for k in "uw"}
    if transform == "partition":
        tx = optax.partition(
            {"x": madax.madam(0.02), "y": madax.madam(0.02)}, {"u": "x", "w": "y"}
        )
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        a, b = updates["u"].codes, updates["w"].codes
    else:

        def codes(seed):
            tx = madax.madam(0.02, seed=seed)
            return tx.update(grads, tx.init(params), params)[0]["u"].codes

        a, b = jax.jit(jax.vmap(codes))(jnp.arange(2))
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert 0.3 < np.mean(a != 0) < 0.5 and 0.3 < np.mean(b != 0) < 0.5
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * 64 < SIGMAS
