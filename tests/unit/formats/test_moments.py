"""Stored moments: small floats, against their formula; and what training does to them.

A code c > 0 of v stands for scale (1 + f / 2**M) 2**(octave - 127 + e), where c - 1 =
e 2**M + f and M = bits - 6; a code of m likewise, with half the octaves and a sign, and
no scale.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import long_run, mostly_nightly, raises

import madax
from madax import MomentFormat
from madax.formats._second_moment_codec import SecondMomentCodec, decayed

pytestmark = pytest.mark.usefixtures("quick_compiles")

GRIDS = {"v": "nu_grid", "m": "mu_grid"}
BITS = mostly_nightly(range(8, 17), 8, 16)
WINDOWS = mostly_nightly([1, 2, 77, 100, 101, 190], 1, 100, 190)
SIGMAS = 5.0


def placed(state):
    (window,) = state.window.values()
    return window.octave


def decode(kind, fmt, code, octave):
    grid = getattr(fmt, GRIDS[kind])(octave)
    return np.sign(code) * grid.value(jnp.abs(jnp.asarray(code, jnp.int32)))


def encode(kind, fmt, x, octave, bits):
    """The codes as they are stored: v saturates at both ends, m also falls to zero."""
    grid, x = getattr(fmt, GRIDS[kind])(octave), jnp.asarray(x, jnp.float32)
    if kind == "m":
        return np.sign(x) * grid.encode_from_zero(jnp.abs(x), bits, fmt.max_mu)
    return jnp.clip(grid.encode(x, bits), 0, fmt.max_nu)


def stored_v(fmt, state):
    (window,) = state.window.values()
    return window.scale * decode("v", fmt, state.nu, window.octave[0])


def noise(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 2**32, shape, dtype=np.uint32))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bits", BITS)
def test_every_code_has_its_value_and_round_trips(bits, window):
    fmt, where = SecondMomentCodec(MomentFormat(bits)), jnp.int32(window)
    assert fmt.format.dtype == (jnp.uint8 if bits == 8 else jnp.uint16)
    assert fmt.mu_dtype == (jnp.int8 if bits == 8 else jnp.int16)
    # Codes of one length for all widths, so that XLA compiles once.
    v = np.minimum(np.arange(2**16), fmt.max_nu)
    m = np.clip(np.arange(-(2**15), 2**15), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    octave = window - 127
    both = (("v", v, octave), ("m", m, oracle.octave_of_m(octave)))
    for kind, codes, lowest in both:
        values = decode(kind, fmt, codes, where)
        sizes = oracle.decode_moment(np.abs(codes), lowest, bits - 6)
        expected = np.sign(codes) * sizes
        np.testing.assert_array_equal(values, expected)
        back = encode(kind, fmt, values, where, noise(codes.shape))
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", [8, 9, 12, 16])
def test_codes_span_their_octaves_and_saturate(bits):
    fmt, window = SecondMomentCodec(MomentFormat(bits)), jnp.int32(100)
    top = fmt.max_nu
    lowest, highest = decode("v", fmt, np.array([1, top]), window)
    assert np.log2(highest / lowest) >= 60
    lowest, highest = decode("m", fmt, np.array([1, fmt.max_mu]), window)
    assert np.log2(highest / lowest) >= 30
    v = [0.0, 1e-37, 1e-20, 1e30, 3e38]
    np.testing.assert_array_equal(
        encode("v", fmt, v, window, noise(5)), [0, 0, 0, top, top]
    )
    m = [-3e38, -1e30, 0.0, 1e30, 3e38]
    expected = np.array([-1, -1, 0, 1, 1]) * fmt.max_mu
    np.testing.assert_array_equal(encode("m", fmt, m, window, noise(5)), expected)


@pytest.mark.parametrize("bits", mostly_nightly([8, 11, 16], 8))
@pytest.mark.parametrize(
    ("v", "window"),
    [
        ([0.0], 0),
        ([], 0),
        ([0.0, 1.0], 127 - 54),
        ([2.0, 1e-9], 128 - 54),
        ([2.0**-50], 77 - 54),
        ([2.0**-80], 1),
        ([3e38], 190),
    ],
)
def test_the_octaves_follow_the_largest_v(bits, v, window):
    fmt = SecondMomentCodec(MomentFormat(bits))
    for octave in (0, 1, 30, 55, 190):
        octave = jnp.int32(octave)
        ends = np.array([1, fmt.max_nu])
        reached = np.log2(decode("v", fmt, ends, octave))
        if octave and any(x > 0 and not np.diff(reached < np.log2(x))[0] for x in v):
            continue  # saturated there: they follow in several steps
        codes = encode("v", fmt, v, octave, jnp.zeros(len(v), jnp.uint32))
        for count, due in [(0, 1), (7, 1), (8, 1), (9, 0), (15, 0), (16, 1)]:
            got = fmt.follow(octave[None], jnp.int32(count), [codes], 0, False)
            np.testing.assert_array_equal(got, [window if due else octave])


@pytest.mark.parametrize("bits", BITS)
def test_before_placement_every_octave_is_there(bits):
    fmt, unplaced, m = SecondMomentCodec(MomentFormat(bits)), jnp.int32(0), bits - 8
    octaves = np.repeat(np.arange(-126.0, 128), 2**m)
    fractions = np.tile(np.arange(2**m) / 2**m, 254)
    codes = np.arange(1, 254 * 2**m + 1)
    values = decode("v", fmt, codes, unplaced)
    np.testing.assert_array_equal(values, (1 + fractions) * 2.0**octaves)
    back = encode("v", fmt, values, unplaced, noise(values.shape))
    np.testing.assert_array_equal(back, codes)

    codes = np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))
    values = decode("m", fmt, codes, unplaced)
    assert np.all(np.diff(values) > 0) and np.all(np.isfinite(values))
    assert 64 <= np.log2(values[-1]) <= 66
    back = encode("m", fmt, values, unplaced, noise(values.shape))
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.9, 1.0])
def test_the_scale_decays_without_the_codes(rate):
    scale, octave, exact = jnp.float32(1), 0, 0.0
    for _ in range(200):
        scale, octaves = decayed(scale, jnp.float32(rate))
        octave += int(octaves)
        assert 1 <= float(scale) < 2
        exact += np.log2(max(1 - rate, 2.0**-100))
        assert np.log2(float(scale)) - octave == pytest.approx(exact, abs=1e-4)


VALUES = [1.0, 1.06, 1.9999, 2.3, 3e-9, 777.0]


@pytest.mark.parametrize("bits", mostly_nightly([8, 10, 16], 8, 16))
@pytest.mark.parametrize("kind", ["v", "m"])
def test_stochastic_rounding_is_unbiased(bits, kind):
    fmt, window, n = SecondMomentCodec(MomentFormat(bits)), jnp.int32(87), 2**20
    values = list(VALUES)
    if kind == "m":  # also between zero and the smallest code
        smallest = 2.0 ** oracle.octave_of_m(87 - 127)
        values += [-1.06, -777.0, 0.3 * smallest, -0.01 * smallest, 1.01 * smallest]
    random = noise(n)
    for value in np.float32(values):
        codes = encode(kind, fmt, jnp.full(n, value), window, random)
        drawn = np.asarray(decode(kind, fmt, codes, window), np.float64)
        grid = np.unique(drawn)
        assert len(grid) <= 2
        # 16 random bits leave a bias of one part of them at most.
        bias = np.ptp(grid) * 2.0**-16
        error = abs(drawn.mean() - float(value))
        assert error <= bias + SIGMAS * drawn.std() / np.sqrt(n), value
        assert grid[0] <= value <= grid[-1]


def runner(**options):
    """Returns final state and directions for gradients, compiled once per shape."""
    tx = madax.scale_by_second_moment(**options)

    def step(state, g):
        direction, state = tx.update(g, state)
        return state, direction

    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads))


@pytest.mark.parametrize("bits", mostly_nightly([8, 13], 8))
def test_gradient_scale_is_invisible(bits):
    """Exactly, for powers of 2: the squares' octaves, and the window's, move by two."""
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((30, 40)) * 10.0 ** rng.uniform(-3, 1, 40)
    grads = jnp.asarray(grads * (rng.random((30, 40)) > 0.2), jnp.float32)
    run = runner(b2=0.9, b1=0.9, moment_format=MomentFormat(bits))
    plain, directions = run(grads)
    for exponent in (-20, -19, -13, 1, 2, 19, 20):
        scaled, scaled_directions = run(grads * np.float32(2.0**exponent))
        np.testing.assert_array_equal(directions, scaled_directions)
        np.testing.assert_array_equal(plain.nu, scaled.nu)
        np.testing.assert_array_equal(plain.mu, scaled.mu)
        np.testing.assert_array_equal(placed(scaled), placed(plain) + 2 * exponent)


def test_any_gradient_scale_is_invisible_in_distribution():
    rng = np.random.default_rng(1)
    grads = jnp.asarray(rng.standard_normal((200, 4000)), jnp.float32)
    run = runner(b2=0.99, moment_format=MomentFormat(8))
    for scale in (1, 1e-12, 3e-7, 1e6):
        direction = np.asarray(run(grads * np.float32(scale))[1][-1])
        assert np.mean(direction**2) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("bits", mostly_nightly([8, 9, 16], 8, 16))
def test_v_never_returns_to_zero(bits):
    grads = np.zeros((1000, 64), np.float32)
    grads[0] = 10.0 ** np.linspace(-12, 0, 64)
    grads[800:] = 1e-6
    run = runner(b2=0.9, moment_format=MomentFormat(bits))
    state, directions = run(jnp.asarray(grads))
    assert np.all(np.asarray(state.nu) >= 1)
    assert np.all(np.isfinite(directions))
    # After the pause a gradient is a gradient again, once the octaves have followed.
    assert np.all(np.asarray(directions[830:]) > 0.1)


def test_the_least_v_is_no_trap_and_moves_nothing_by_itself():
    """An element without a gradient stays where it is; one with a tiny one moves."""
    grads = np.zeros((4, 3), np.float32)
    grads[1, 0], grads[2, 1] = 1.0, 1e-9
    tx = madax.scale_by_second_moment(moment_format=MomentFormat(8))
    state, update = tx.init(jnp.zeros(3)), jax.jit(tx.update)
    for g in grads:
        direction, state = update(jnp.asarray(g), state)
        np.testing.assert_array_equal(np.asarray(direction) != 0, g != 0)
        assert state.nu[2] == 0
    assert state.nu[0] > 200 and state.nu[1] == 0


def test_a_gradient_that_is_a_number_of_numpy_overflows_without_a_warning():
    tx = madax.scale_by_second_moment()
    with jax.disable_jit(), warnings.catch_warnings():
        warnings.simplefilter("error")
        direction, _ = tx.update(np.float32(1e30), tx.init(np.float32(1)))
    assert direction == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_a_gradient_that_is_not_finite_is_added_to_no_moment(bits):
    """Also one whose square overflows; also as the first gradient of all."""
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((6, 50)).astype(np.float32)
    bad = rng.random(50) < 0.5
    poison = np.resize([np.nan, np.inf, -np.inf, 1e30], bad.sum())
    grads[0, bad] = grads[5, bad] = poison
    fmt = SecondMomentCodec(MomentFormat(bits))
    tx = madax.scale_by_second_moment(b1=0.9, moment_format=fmt.format)
    state, update = tx.init(jnp.zeros(50)), jax.jit(tx.update)

    def moments(state):
        v, m = stored_v(fmt, state), decode("m", fmt, state.mu, placed(state)[0])
        return np.asarray(v)[bad], np.asarray(m)[bad]

    for i, g in enumerate(grads):
        before = state
        direction, state = update(jnp.asarray(g), state)
        assert np.all(np.isfinite(direction))
        if i in (0, 5):
            (v, m), (v0, m0) = moments(state), moments(before)
            np.testing.assert_array_equal(m, m0)
            np.testing.assert_allclose(v, 0.999 * v0, rtol=1e-6)  # decays all the same
            assert not np.any(np.asarray(direction)[bad])
            assert np.all(np.asarray(direction)[~bad] != 0)
    assert 60 <= int(placed(state)[0]) <= 70


@pytest.mark.parametrize(
    ("bits", "spread"),
    mostly_nightly([(8, 0.4), (10, 0.15), (16, 0.03)], (8, 0.4), (16, 0.03)),
)
def test_codes_track_float_moments_in_distribution(bits, spread):
    """Unbiased, and closer the wider the code; b2 = 0.999 needs thousands of steps."""
    rng = np.random.default_rng(2)
    scales = 10.0 ** rng.uniform(-2, 2, 1000)
    grads = jnp.asarray(rng.standard_normal((2500, 1000)) * scales, jnp.float32)
    options = {"b2": 0.999, "b1": 0.9}
    exact, wanted = runner(**options)(grads)
    fmt = SecondMomentCodec(MomentFormat(bits))
    state, got = runner(moment_format=fmt.format, seed=1, **options)(grads)
    ratio = np.asarray(stored_v(fmt, state) / exact.nu, np.float64)
    assert abs(ratio.mean() - 1) < SIGMAS * ratio.std() / np.sqrt(ratio.size) + 2e-3
    assert ratio.std() < spread
    np.testing.assert_allclose(
        np.quantile(got, [0.01, 0.25, 0.5, 0.75, 0.99]),
        np.quantile(wanted, [0.01, 0.25, 0.5, 0.75, 0.99]),
        rtol=0.1,
        atol=0.01,
    )


def test_a_jump_out_of_the_octaves_is_skipped_until_they_follow():
    grads = np.ones((120, 3), np.float32)
    grads[20:, 0] = 1e8
    _, directions = runner(moment_format=MomentFormat(8))(jnp.asarray(grads))
    jumped, others = np.asarray(directions)[20:, 0], np.asarray(directions)[:, 1:]
    assert jumped[0] == 0 and 0.5 < jumped[-1] < 5
    assert np.all(np.diff(jumped != 0) >= 0)
    assert np.all(others > 0.1)


DECAYS = jnp.array([0.0, 0.1, 0.3, 0.5, 0.7, 0.76, 0.9, 0.99, 0.999])


@pytest.mark.parametrize("bits", mostly_nightly([8, 16], 8))
def test_every_element_moves_whatever_the_decay_rates(bits):
    """All at once, as in a sweep; against NumPy, also leaves of one element."""
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (500,)]
    grads = [np.float32(rng.standard_normal((200, *shape))) for shape in shapes]
    b2, b1 = (x.ravel() for x in jnp.meshgrid(DECAYS, jnp.array([0.0, 0.3, 0.9])))

    def directions(b2, b1):
        make = madax.scale_by_second_moment
        tx = make(b2, b1=b1, moment_format=MomentFormat(bits))

        def step(state, g):
            direction, state = tx.update(g, state)
            return state, direction

        return jax.lax.scan(step, tx.init([g[0] for g in grads]), grads)[1]

    got = jax.jit(jax.vmap(directions))(b2, b1)
    assert all(np.all(np.asarray(x) != 0) for x in got)
    # The largest leaf has enough elements for their mean to equal the floats' mean.
    b2, b1, v, m, sizes = np.float64(b2)[:, None], np.float64(b1)[:, None], 0.0, 0.0, []
    for t, g in enumerate(np.float64(grads[-1]), 1):
        v, m = b2 * v + (1 - b2) * g**2, b1 * m + (1 - b1) * g
        direction = m / (1 - b1**t) / np.sqrt(v / (1 - b2**t))
        sizes.append(np.clip(np.abs(direction), 0, 10))
    mean = np.mean(np.clip(np.abs(got[-1]), 0, 10), axis=(1, 2))
    np.testing.assert_allclose(mean, np.mean(sizes, axis=(0, 2)), rtol=0.05)


def test_a_short_memory_follows_gradients_of_any_size():
    """No element is skipped where it is divided by its own root in the same step."""
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((200, 40)) * 10 ** rng.uniform(-6, 6, (200, 40))
    for b2 in (0.0, 0.5):
        run = runner(b2=b2, moment_format=MomentFormat(8))
        assert np.all(np.asarray(run(jnp.float32(grads))[1]) != 0)


def test_a_state_of_another_format_is_refused():
    state = madax.madam(moment_format=MomentFormat(9)).init(jnp.ones(3))
    for bits in (8, None):
        tx = madax.madam(moment_format=bits and MomentFormat(bits))
        with raises(ValueError, "moment_format is", "made for MomentFormat(bits=9)"):
            tx.update(jnp.ones(3), state, jnp.ones(3))


def jump(i, before, after, at):
    return jnp.where(i < at, before, after)


def outlier(i, g, at, size):
    return g.at[0].set(jnp.where(i == at, size, g[0]))


HARD = {
    # name: what becomes of the gradients g of step i
    "constant": lambda i, g: g,
    "growth": lambda i, g: g * 10.0 ** (6 * jnp.minimum(i / 1000, 1) - 6),
    "fall": lambda i, g: g * 10.0 ** (-6 * jnp.minimum(i / 1000, 1)),
    "sudden_growth": lambda i, g: g * jump(i, 1e-6, 1.0, 100),
    "sudden_fall": lambda i, g: g * jump(i, 1.0, 1e-6, 100),
    "outlier": lambda i, g: outlier(i, g, 100, 1e8),
    "outlier_first": lambda i, g: outlier(i, g, 0, 1e8),
    "one_alone_first": lambda i, g: jnp.where(i > 0, g, outlier(i, 0 * g, 0, 1e-5)),
    "rare": lambda i, g: jnp.where(i % 100 == jnp.arange(g.size) % 100, g, 0),
}


@pytest.mark.parametrize("name", mostly_nightly(HARD, "rare"))
def test_directions_match_float_moments_under_hard_conditions(name):
    """The mean of |direction|, clipped as madam does; v does not stay saturated."""
    n, steps = 2000, 2000

    def run(moment_format):
        tx = madax.scale_by_second_moment(b1=0.9, moment_format=moment_format)

        def step(state, i):
            g = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (n,))
            direction, state = tx.update(HARD[name](i, g), state)
            return state, jnp.mean(jnp.clip(jnp.abs(direction), 0, 10))

        return jax.lax.scan(step, tx.init(jnp.zeros(n)), jnp.arange(steps))

    run = jax.jit(run, static_argnums=0)
    with long_run():
        exact = np.asarray(run(None)[1])
        ran = {bits: run(MomentFormat(bits)) for bits in (8, 16)}
    for bits, (state, got) in ran.items():
        # Whatever has changed, at step 100 or before, is followed within 100 steps.
        got, want = (np.mean(x.reshape(-1, 50), axis=1) for x in (got, exact))
        off = np.abs(np.asarray(got) / want - 1)
        assert np.max(np.delete(off, [2, 3])) < 0.1, bits
        assert np.mean(off[10:]) < 0.04, bits
        assert np.mean(np.asarray(state.nu) == 2**bits - 1) < 1e-3


@pytest.mark.nightly
def test_a_warm_up_after_a_last_layer_of_zeros():
    """Gradients of hidden layers begin near zero and grow by orders of magnitude."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    y = jnp.sin(3 * x[:, :4])
    hidden = jnp.asarray(rng.standard_normal((3, 32, 32)) / 32**0.5, jnp.float32)
    params = {"hidden": list(hidden), "last": jnp.zeros((32, 4))}
    schedule = optax.warmup_cosine_decay_schedule(0, 0.01, 4000, 9000)
    tx = madax.madam(schedule, moment_format=MomentFormat(8))
    exact = madax.scale_by_second_moment()

    def loss(params):
        h = x
        for w in params["hidden"]:
            h = h + jnp.tanh(h @ w)
        return jnp.mean((h @ params["last"] - y) ** 2)

    def step(carry, _):
        params, state, exact_state = carry
        g = jax.grad(loss)(params)
        own = exact_state._replace(count=state.count, **state.direction._asdict())
        got, _ = stored.update(g, own)
        want, exact_state = exact.update(g, exact_state)
        updates, state = tx.update(g, state, params)
        size = lambda d: jnp.mean(jnp.clip(jnp.abs(d), 0, 10))
        sizes = jax.tree.map(lambda *d: jnp.stack(list(map(size, d))), got, want)
        top = jax.tree.map(lambda v: jnp.mean(v == 255), state.direction.nu)
        carry = optax.apply_updates(params, updates), state, exact_state
        return carry, (sizes, top, jnp.max(jnp.abs(g["hidden"][0])))

    stored = madax.scale_by_second_moment(moment_format=MomentFormat(8))
    carry = params, tx.init(params), exact.init(params)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=1200))
    _, (sizes, top, largest) = scan(carry)
    assert np.max(largest) > 1e5 * largest[1]
    for leaf in jax.tree.leaves(sizes):
        got, want = np.mean(np.reshape(leaf[100:], (11, 100, 2)), axis=1).T
        np.testing.assert_allclose(got, want, rtol=0.1)
    assert max(float(jnp.max(t[100:])) for t in jax.tree.leaves(top)) < 0.01


@pytest.mark.parametrize("bits", mostly_nightly([8, 16], 8))
def test_training_with_stored_moments_is_as_good(bits):
    """Linear regression: the loss falls as with float32 moments."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((256, 30)), jnp.float32)
    y = x @ jnp.asarray(rng.standard_normal((30, 1)), jnp.float32)
    w0 = jnp.asarray(rng.standard_normal((30, 1)) * 0.5, jnp.float32)

    def train(moment_format):
        schedule = optax.cosine_decay_schedule(0.05, 600)
        tx = madax.madam(schedule, floor=0.1, moment_format=moment_format, b1=0.9)

        def step(carry, _):
            w, state = carry
            loss, g = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
            updates, state = tx.update(g, state, w)
            return (optax.apply_updates(w, updates), state), loss

        return jax.lax.scan(step, (w0, tx.init(w0)), length=600)[1]

    exact, stored = train(None), train(MomentFormat(bits))
    assert exact[-1] < 0.01 * exact[0]
    assert stored[-1] < 0.01 * exact[0]
