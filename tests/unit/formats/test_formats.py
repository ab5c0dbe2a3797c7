"""Number formats against their formulas in float64, on every code of every width."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import decode, encode

import madax
from madax import LogFormat, SymlogFormat, UniformFormat

WIDTHS = range(2, 17)


def levels_of(bits):
    return 2 ** (bits - 1) - 1


def formats(bits):
    """All classes, with the extremes of their parameters."""
    steps = {1e-6, 2e-3, 0.05, math.log(2) / 8, 80 / levels_of(bits)}
    steps = sorted(s for s in steps if s <= 80 / levels_of(bits))
    return [
        *(LogFormat(bits, step) for step in steps),
        *(SymlogFormat(bits, r) for r in (1e-6, 1e-3, 1 / 3, 1.0, 1e3)),
        UniformFormat(bits),
    ]


ALL = [fmt for bits in WIDTHS for fmt in formats(bits)]
SOME = [fmt for bits in (2, 8, 16) for fmt in formats(bits)]
every_width = pytest.mark.parametrize("fmt", ALL, ids=repr)
some_formats = pytest.mark.parametrize("fmt", SOME, ids=repr)


def nats(fmt):
    """The argument of the largest exponential, whose rounding is a relative error."""
    if isinstance(fmt, LogFormat):
        return fmt.base_step * levels_of(fmt.bits)
    return math.asinh(1 / fmt.linear_range) if isinstance(fmt, SymlogFormat) else 0


def codes_of(fmt):
    """All codes; of one length whatever the width, so that XLA compiles once."""
    return np.clip(np.arange(-(2**15), 2**15 + 1), -fmt.levels, fmt.levels)


def to_codes(fmt, x):
    return np.asarray(fmt.saturate(jnp.round(fmt.encode(x)), jnp.sign(x)))


@every_width
def test_every_code_round_trips_and_has_the_value_of_its_formula(fmt):
    n, codes = levels_of(fmt.bits), codes_of(fmt)
    assert fmt.levels == n
    assert fmt.storage_dtype == (jnp.int8 if fmt.bits <= 8 else jnp.int16)
    stored = jnp.asarray(codes, fmt.storage_dtype)
    np.testing.assert_array_equal(stored, codes)
    values = fmt.decode(stored)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(to_codes(fmt, values), codes)
    v = np.asarray(values, np.float64)
    np.testing.assert_allclose(
        v, decode(fmt, codes), rtol=1e-6 + 2e-7 * nats(fmt), atol=0
    )
    assert np.all((np.diff(v) > 0) == (np.diff(codes) > 0))
    np.testing.assert_allclose(v[::-1], -v, rtol=1e-6)
    assert v[codes == 0] == 0
    assert v[-1] == pytest.approx(1, rel=2e-6)
    assert fmt.dynamic_range == pytest.approx(1 / decode(fmt, 1), rel=1e-6)


def probe(fmt, rng, size):
    """Values all over the grid, both signs, and beyond both its ends."""
    between = decode(fmt, rng.uniform(-fmt.levels, fmt.levels, size))
    far = rng.choice([-1, 1], size) * 10.0 ** rng.uniform(-37, 3, size)
    x = np.concatenate([between, rng.uniform(-1, 1, size), far])
    return np.sort(x).astype(np.float32)


@some_formats
def test_encode_follows_the_formula_is_monotone_and_odd(fmt, size=4000):
    x = probe(fmt, np.random.default_rng(0), size)
    code = np.asarray(fmt.encode(jnp.asarray(x)), np.float64)
    # A float32 holds log|x| to 1e-7, so a code of the finest grid to 0.1.
    per_code = nats(fmt) / fmt.levels or 1
    tolerance = 2e-7 * fmt.levels + 2e-7 / per_code
    np.testing.assert_allclose(code, encode(fmt, x), rtol=0, atol=tolerance)
    np.testing.assert_array_equal(fmt.encode(-jnp.asarray(x)), -code)
    apart = np.r_[True, np.diff(x) > 1e-5 * np.abs(x[1:])]
    assert np.all(np.diff(to_codes(fmt, x)[apart]) >= 0)


@some_formats
def test_saturation_at_both_ends(fmt):
    n = fmt.levels
    x = jnp.array([-np.inf, -7.0, 0.0, 7.0, np.inf], jnp.float32)
    np.testing.assert_array_equal(fmt.encode(x), [-n, -n, 0, n, n])
    codes = jnp.array([-9 * n, -n - 1, n + 1, 9 * n], jnp.int32)
    expected = [-n, -n, n, n]
    np.testing.assert_array_equal(fmt.saturate(codes, jnp.sign(codes)), expected)


LOGS = [f for f in ALL if isinstance(f, LogFormat)]


@pytest.mark.parametrize("fmt", LOGS, ids=repr)
def test_a_value_that_is_not_zero_has_no_code_zero(fmt):
    tiny = np.finfo(np.float32).tiny  # XLA flushes what is smaller on a CPU
    x = jnp.array([tiny, 2 * tiny, 1e-37, 1e-30, 1e-9, 1, 3e38], jnp.float32)
    codes = to_codes(fmt, x)
    assert codes.min() >= 1
    np.testing.assert_array_equal(to_codes(fmt, -x), -codes)
    assert to_codes(fmt, jnp.zeros(1)) == 0
    # Whatever the steps, the sign stays; only the sign 0 gives the code 0.
    steps = jnp.array([-(2**17), -1, 0, 1, 2**17], jnp.int32)
    for sign in (-1, 1):
        new = np.asarray(fmt.saturate(steps, jnp.full(5, sign))) * sign
        assert new.min() >= 1 and new.max() <= fmt.levels
    assert not np.any(fmt.saturate(steps, jnp.zeros(5)))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "fmt", [LogFormat(8, 0.05), SymlogFormat(8, 0.3), UniformFormat(8)], ids=repr
)
def test_every_shape_is_kept(fmt, shape):
    def everything(code, x):
        real = (fmt.encode(x), fmt.log_step(code, x), fmt.add_step(code, x))
        return *real, fmt.decode(code), fmt.saturate(code, jnp.sign(x))

    code, x = jnp.ones(shape, fmt.storage_dtype), jnp.full(shape, 0.25)
    results = jax.eval_shape(everything, code, x)
    assert {r.shape for r in results} == {shape}
    assert {r.dtype.name for r in results[:4]} == {"float32"}


STEPS = [0.0, 1e-7, -1e-5, 0.01, -0.3, 1.7]


@some_formats
@pytest.mark.parametrize("d", STEPS)
def test_log_step_is_the_exponential_law(fmt, d):
    codes = codes_of(fmt)
    steps = np.asarray(fmt.log_step(jnp.asarray(codes), jnp.float32(d)), np.float64)
    steps = np.broadcast_to(steps, codes.shape)
    d, w = float(np.float32(d)), decode(fmt, codes)
    moved = codes + steps
    if isinstance(fmt, SymlogFormat):
        step = math.asinh(1 / fmt.linear_range) / fmt.levels
        np.testing.assert_allclose(steps, d / step, rtol=1e-5)
        # Far out w exp(sign(w) d), near zero w + linear_range d.
        new = decode(fmt, codes + d / step)
        r = fmt.linear_range
        law = w * math.cosh(d) + r * np.hypot(1, w / r) * math.sinh(d)
        np.testing.assert_allclose(new, law, rtol=1e-9, atol=1e-12 * r)
        return
    there = codes != 0
    if isinstance(fmt, LogFormat):  # where the code is still in range to be decoded
        there &= moved * np.sign(codes) > 0
    law = (w * np.exp(np.sign(w) * d))[there]
    np.testing.assert_allclose(decode(fmt, moved[there]), law, rtol=2e-6, atol=1e-12)
    np.testing.assert_allclose(np.abs(steps[codes != 0]) > 0, d != 0)
    if isinstance(fmt, UniformFormat):  # or zero would be a trap
        np.testing.assert_allclose(steps[codes == 0], d)


@some_formats
def test_add_step_is_the_code_of_the_sum_in_float64(fmt, size=3000):
    rng = np.random.default_rng(1)
    codes = rng.integers(-fmt.levels, fmt.levels + 1, size)
    w = decode(fmt, codes)
    spacing = np.abs(decode(fmt, codes - np.sign(codes)) - w) + 1e-30
    steps = [np.zeros(size), -1.7 * w, 0.3 * w, rng.uniform(-1, 1, size)]
    steps += [c * spacing * rng.standard_normal(size) for c in (1e-3, 0.1, 1, 10)]
    per_code = nats(fmt) / fmt.levels or 1
    for u in steps:
        u = u.astype(np.float32).astype(np.float64)
        got = np.asarray(fmt.add_step(jnp.asarray(codes), jnp.asarray(u, jnp.float32)))
        expected = encode(fmt, w + u) - codes
        # A step may lead out of the range of the codes, to be saturated later.
        lowest = 1 if isinstance(fmt, LogFormat) else -fmt.levels
        sign = np.sign(w + u) if isinstance(fmt, LogFormat) else 1
        moved = sign * np.clip(sign * (codes + np.float64(got)), lowest, fmt.levels)
        error = np.abs(moved - codes - expected)
        allowed = 5e-7 * fmt.levels + 5e-7 / per_code + 1e-4 * np.abs(expected)
        # Where the sum nearly cancels, its logarithm is any number.
        kept = (np.abs(w + u) > 1e-3 * np.abs(w)) | (w == 0)
        assert np.all((error <= allowed)[kept])


@some_formats
def test_adding_nothing_moves_nothing(fmt):
    codes, nothing = jnp.asarray(codes_of(fmt)), jnp.float32(0)
    assert np.count_nonzero(fmt.log_step(codes, nothing)) == 0
    assert np.count_nonzero(fmt.add_step(codes, jnp.zeros(codes.shape))) == 0


WIDE_ENOUGH = [fmt for fmt in SOME if fmt.bits > 2]


@pytest.mark.parametrize("fmt", WIDE_ENOUGH, ids=repr)
def test_small_additive_steps_are_not_lost_in_the_width_of_the_code(fmt):
    """A hundredth of a code, to a relative accuracy of 2 %, whatever the code."""
    codes = np.linspace(2, fmt.levels, 500).astype(int)
    w = decode(fmt, codes)
    u = (decode(fmt, codes - 0.01) - w).astype(np.float32)
    got = np.asarray(fmt.add_step(jnp.asarray(codes), jnp.asarray(u)))
    expected = encode(fmt, w + u.astype(np.float64)) - codes
    normal = np.abs(u) > np.finfo(np.float32).tiny
    np.testing.assert_allclose(got[normal], expected[normal], rtol=0.02)


def test_constructors_compute_the_spacing():
    fmt = LogFormat.from_gamma(bits=8, gamma=8)
    assert fmt.base_step == pytest.approx(math.log(2) / 8, rel=1e-15)
    assert math.log2(fmt.dynamic_range) == pytest.approx(126 / 8)
    fmt = LogFormat.from_gamma(16, 2048)
    assert math.log2(fmt.dynamic_range) == pytest.approx(32766 / 2048)
    for bits in range(3, 17):
        fmt = LogFormat.from_dynamic_range(bits, 1000)
        assert fmt.base_step == pytest.approx(math.log(1000) / (fmt.levels - 1))
        assert fmt.dynamic_range == pytest.approx(1000)
    fmt = SymlogFormat(8, 1 / 3)
    assert fmt.base_step == pytest.approx(math.asinh(3) / 127)
    assert fmt.dynamic_range == pytest.approx(3 / math.sinh(math.asinh(3) / 127))
    assert UniformFormat(8).dynamic_range == 127
    assert isinstance(fmt, madax.formats.Format)


@pytest.mark.parametrize("bits", WIDTHS)
def test_constructors_accept_the_ends_of_the_ranges_they_state(bits):
    n = levels_of(bits)
    for gamma in (math.log(2) * n / 80, math.log(2) / 1e-6):
        LogFormat.from_gamma(bits, gamma)
    if bits > 2:
        for ratio in (math.exp(1e-6 * (n - 1)), math.exp(80 * (n - 1) / n)):
            LogFormat.from_dynamic_range(bits, ratio)


def test_formats_are_values():
    a, b = LogFormat(8, 0.05), LogFormat(bits=8, base_step=0.05)
    assert a == b and hash(a) == hash(b) and repr(a) == repr(b)
    assert repr(a) == "LogFormat(bits=8, base_step=0.05)"
    others = [LogFormat(9, 0.05), LogFormat(8, 0.06), SymlogFormat(8, 0.05)]
    assert len({a, b, *others, UniformFormat(8)}) == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.bits = 4


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), 1, np.int64(1)])
@pytest.mark.parametrize("cls", [LogFormat, SymlogFormat])
def test_equal_formats_print_alike(cls, number):
    """The print is part of a checkpoint's key, so it must not depend on the type."""
    assert repr(cls(4, number)) == repr(cls(4, float(number)))


@pytest.mark.parametrize("u", [1.0, 1e4, 1e6, 1e9, 1e30])
def test_a_step_across_zero_arrives_however_large_it_is(u):
    fmt = SymlogFormat(16, 1e-3)
    code = np.int32([18686, -18686, 1, -1])
    moved = code + np.asarray(fmt.add_step(jnp.asarray(code), -np.sign(code) * u))
    assert np.all(-np.sign(code) * moved > 0.99 * fmt.levels)
