"""Random trees, formats and hyperparameters: every step is right.

Right is what plain NumPy float64 says, one step at a time: from the weights and the
moments that a step started with, an interval for each element of what it must end
with, as wide as the roundings of the arithmetic. Where the interval holds no tie, that
is one code. The formulas are written out here again; nothing of madax computes them.
"""

import contextlib
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import DTYPES, EXAMPLES, Leaf, f64, gradients, optimizers, seeds, trees
from helpers import enable_x64, is_quantized, mostly_nightly
from helpers import step as run_step
from hypothesis import event, given, settings
from hypothesis import strategies as st
from oracle import decode, decode_moment, encode, levels, octave_of_m, spacing

import madax
from madax import LogFormat, SymlogFormat, UniformFormat


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Thousands of small programs, of no use to other tests, take gigabytes."""
    yield
    jax.clear_caches()


F32 = np.float32(2) ** -23
LARGEST = float(np.finfo(np.float32).max)


def leaves_of(tree):
    return jax.tree.leaves(tree, is_leaf=is_quantized)


# --- trees ----------------------------------------------------------------------------


few_codes_lose_much = pytest.mark.filterwarnings("ignore:.*lost in rounding")


# --- codes, in float64 ----------------------------------------------------------------


def code_error(fmt, x):
    """The error of float32 in the real-valued code of ``x``, in codes, at most."""
    error = 4 * F32 * levels(fmt)
    if isinstance(fmt, LogFormat):
        with np.errstate(divide="ignore"):
            logs = np.minimum(np.abs(np.log(np.abs(x))), 100)
        error = error + F32 * (4 + 2 * logs) / fmt.base_step
    elif isinstance(fmt, SymlogFormat):
        arc = np.abs(np.arcsinh(x / fmt.linear_range))
        error = error + F32 * (4 + 4 * arc) / spacing(fmt)
    return error


def saturate(fmt, code, sign):
    n = levels(fmt)
    if isinstance(fmt, LogFormat):
        positive, negative = np.clip(code, 1, n), np.clip(code, -n, -1)
        return np.where(sign > 0, positive, np.where(sign < 0, negative, 0))
    return np.clip(code, -n, n)


def rounded(low, high, rounding):
    """The integers to which a number in the interval may be rounded."""
    if rounding == "nearest":
        return np.rint(low), np.rint(high)
    return np.floor(low), np.ceil(high)


def log_steps(fmt, c, d):
    """How many codes a log-step moves; rising in d."""
    if isinstance(fmt, UniformFormat):
        return np.where(c == 0, d, c * np.expm1(np.sign(c) * np.clip(d, -87, 88)))
    return d / spacing(fmt)


def check_between(got, low, high, what):
    got = f64(got)
    wrong = ~((low <= got) & (got <= high))
    assert not np.any(wrong), f"{what}: {got[wrong]} not in {low[wrong]}, {high[wrong]}"


def check_codes_between(w, low, high, sign_low, sign_high, what):
    """Codes between the ends of an interval, saturated for the signs at its ends."""
    low, high = (
        np.broadcast_to(saturate(w.format, c, s), w.shape)
        for c, s in ((low, sign_low), (high, sign_high))
    )
    check_between(w.codes, low, high, what)


def check_quantized(leaf, w):
    """``quantize_params``: the scale, and the nearest code."""
    fmt, x = leaf.format, f64(np.asarray(leaf.weights()).astype(leaf.dtype))
    axes = tuple(range(x.ndim))
    if leaf.channel_axis is not None:
        axes = tuple(a for a in axes if a != leaf.channel_axis % x.ndim)
    if x.size:
        rms = np.sqrt(np.mean(x**2, axis=axes, keepdims=True))
        scale = np.maximum(3 * rms, np.max(np.abs(x), axis=axes, keepdims=True))
        np.testing.assert_allclose(w.scale, scale, rtol=2e-6)
        assert w.scale.shape == scale.shape
    assert w.codes.dtype == (np.int8 if fmt.bits <= 8 else np.int16)
    assert w.scale.dtype == np.float32 and w.shape == x.shape
    x = x / np.where(f64(w.scale) > 0, f64(w.scale), 1)
    code, error = encode(fmt, x), code_error(fmt, x)
    ends = rounded(code - error, code + error, "nearest")
    check_codes_between(w, *ends, np.sign(x), np.sign(x), "quantize_params")


# --- moments, in float64 --------------------------------------------------------------


class MomentGrid(NamedTuple):
    """Codes 1, 2, ... from 2**octave up, ``2**mantissa`` of them per octave."""

    octave: int
    mantissa: int
    highest: int
    zero: float = 0.0  # the value of code 0

    def decode(self, code):
        value = decode_moment(code, self.octave, self.mantissa)
        return np.where(f64(code) > 0, value, self.zero)

    def check(self, code, value, error, what):
        """The code below or above a magnitude, or at the end of the range."""
        code = f64(code)
        assert np.all(code <= self.highest)
        below = np.where(code <= 1, 0, self.decode(code - 1))
        above = np.where(code >= self.highest, np.inf, self.decode(code + 1))
        check_between(value, below - error, above + error, what)


def moment_grids(bits, window):
    """Of v and m. Before a window is placed they have two bits less of mantissa."""
    mantissa, m_highest = bits - 6, 2 ** (bits - 1) - 1
    v_highest = min(2**bits - 1, 254 * 2 ** (mantissa - 2))
    if window:
        octave = window - 127
        # Code 0 of v is the float below code 1, and no gradient makes a smaller one.
        before = 2.0**octave * (1 - 2.0 ** (-mantissa - 1))
        return {
            "v": MomentGrid(octave, mantissa, v_highest, before),
            "m": MomentGrid(octave_of_m(octave), mantissa, m_highest),
        }
    normal = 254 * 2 ** (mantissa - 2)
    return {
        "v": MomentGrid(-126, mantissa - 2, min(v_highest, normal)),
        "m": MomentGrid(-62, mantissa - 2, min(m_highest, normal)),
    }


# --- the oracle of one step -----------------------------------------------------------


def largest_square(rule, w):
    """Beyond which a gradient counts as infinite: of the dtype of the moments."""
    wide = rule.moment_bits is None and not is_quantized(w)
    wide = wide and jnp.result_type(w) == jnp.float64
    return float(np.finfo(np.float64 if wide else np.float32).max)


class Moments:
    """The stored moments of leaf i before and after a step, checked as they are read.

    With a format, v and m are what their codes say: on the grid of the octaves that
    they are in, which follow the codes, one step after these; v in units of a scale
    that decays.
    """

    def __init__(self, rule, i, before, after, count):
        self.codes = rule.moment_bits is not None
        states = (before, after)
        self.raw = [
            {
                name: np.asarray(jax.tree.leaves(getattr(state, field))[i])
                for name, field in (("v", "nu"), ("m", "mu"))[
                    : 1 + (rule.b1 is not None)
                ]
            }
            for state in states
        ]
        if not self.codes:
            self.old, self.new = ({k: f64(x) for k, x in r.items()} for r in self.raw)
            return
        windows = [next(iter(state.window.values())) for state in states]
        old, new = (int(window.octave[i]) for window in windows)
        grids = [moment_grids(rule.moment_bits, octave) for octave in (old, new)]
        units = [{"v": float(window.scale), "m": 1.0} for window in windows]
        self.old, self.new = (
            {
                k: u[k] * np.where(x < 0, -1, 1) * g[k].decode(np.abs(f64(x)))
                for k, x in r.items()
            }
            for r, g, u in zip(self.raw, grids, units, strict=True)
        )
        self.grids, self.unit = grids[1], units[1]
        # In float32 little may be left of a tiny b2.
        rate, unit = np.float32(1 - rule.b2), np.float32(units[0]["v"])
        decay = max(unit - rate * unit, 2.0**-100)
        octaves = np.log2(units[1]["v"] / decay)
        down = int(np.round(octaves))
        assert abs(octaves - down) < 1e-5
        # Windows of a short memory follow in every step, and its decay lowers none.
        self.fast = rate > 0.25
        follows = count <= 9 or count % 8 == 1 or self.fast
        peak = np.max(self.raw[0]["v"], initial=0)
        down = 0 if self.fast else down
        if follows and peak:
            octave = np.floor(np.log2(grids[0]["v"].decode(peak)))
            old = int(np.clip(octave + 127 - 54, 1, 190))
        assert new == (max(old - down, 1) if old else 0)

    def check(self, name, value, error, ok):
        """After the step: that value; where not ``ok``, nothing new."""
        if not self.codes:
            np.testing.assert_array_equal(self.new[name][~ok], self.old[name][~ok])
            check_between(self.new[name], value - error, value + error, name)
            return
        new, unit = f64(self.raw[1][name]), self.unit[name]
        assert np.all((np.sign(new) * value >= 0) | (np.abs(value) <= error))
        self.grids[name].check(np.abs(new), np.abs(value) / unit, error / unit, name)

    def fits(self, value):
        """Where v does, and where it may."""
        if not self.codes or self.fast:
            return np.full(np.shape(value), True), np.full(np.shape(value), True)
        grid = self.grids["v"]
        # The greatest code is of all that is beyond.
        top, next_up = self.unit["v"] * grid.decode([grid.highest - 1, grid.highest])
        return value < top * (1 - 1e-5), value < next_up * (1 + 1e-5)


def directions(rule, i, w, g, before, after, count):
    """Checks the moments; the normalised gradient of leaf i, and its error."""
    g = f64(g)
    with np.errstate(all="ignore"):
        g2 = g**2
    ok = np.isfinite(g) & (g2 < largest_square(rule, w))
    g, g2 = np.where(ok, g, 0), np.where(ok, g2, 0)
    moments = Moments(rule, i, before, after, count)
    old = moments.old
    # Codes of v decay all together.
    decays = ok | moments.codes
    b2 = max(rule.b2, 2.0**-100) if moments.codes else rule.b2
    v = np.where(decays, b2 * old["v"], old["v"]) + (1 - rule.b2) * g2
    v_error = 8 * F32 * (old["v"] + g2) + 1e-37
    moments.check("v", v, v_error, ok)
    fits, may_fit = moments.fits(v)
    ok, perhaps = ok & may_fit, ok & may_fit & ~fits
    top, top_error = g, 4 * F32 * np.abs(g)
    if rule.b1 is not None:
        m = np.where(ok, rule.b1 * old["m"] + (1 - rule.b1) * g, old["m"])
        m_error = 8 * F32 * (np.abs(old["m"]) + np.abs(g)) + 1e-37
        m_error += np.where(perhaps, np.abs(g), 0)
        moments.check("m", m, m_error, ok)
        correction = 1 - rule.b1**count
        top, top_error = m / correction, 2 * m_error / correction
    bias = 1 - rule.b2**count
    if moments.codes:
        # The mean of 1 / root of v, of a v with a relative variance.
        variance = 0.5 * 0.7213 / 2 ** (rule.moment_bits - 6)
        top = top * np.exp(-3 / 8 * variance * (1 - (1 - rule.b2) / bias) ** 2)
    v_hat = v / bias
    moves = ok & (v > 0)
    root = np.sqrt(np.where(moves, v_hat, 1))
    direction = np.where(moves, top / root, 0)
    error = np.where(moves, top_error / root, 0) + 2e-6 * np.abs(direction)
    error += np.where(perhaps, np.abs(direction), 0)
    # With a tiny b2 what is left of v may be all rounding.
    error += np.abs(direction) * np.where(moves, v_error / np.where(moves, v, 1), 0)
    return direction, error


def step_interval(rule, direction, error, count):
    """Log-steps between two ends, and whether the rate is one to move by."""
    rate = rule.rate(count - 1)
    low, high = (
        np.clip(x, -rule.g_bound, rule.g_bound)
        for x in (direction - error, direction + error)
    )
    d_low, d_high = -rate * high, -rate * low
    slack = 4 * F32 * np.maximum(np.abs(d_low), np.abs(d_high))
    return d_low - slack, d_high + slack


def sign_log(w, d, floor):
    d = np.clip(d, -80, 80)
    return np.where(np.abs(w) > floor, w * np.expm1(np.sign(w) * d), floor * d)


def grid_scale(rule, rms0, peak0):
    """What a grid reaches to."""
    scale = max(3 * rms0, peak0) if rule.p_scale is None else rule.p_scale * rms0
    return scale if rms0 > 0 else 0.0


def weight_bound(rule, rms0, peak0, w):
    """What no float weight is beyond; by default that of matrices alone."""
    bounded = np.ndim(w) >= 2 and peak0 > 0
    if rule.p_scale is None and not bounded:
        return math.inf
    return grid_scale(rule, rms0, peak0)


def float_interval(rule, rms0, peak0, zero_init, w, d_low, d_high, info):
    """Between which values w + u must be, before any grid."""
    floor = 1.0 if zero_init else rule.floor
    floor = 0 if floor < 2.0**-126 else floor  # float32 flushes what is subnormal.
    floor = min(rms0 * floor, LARGEST / 128)
    ends = []
    for d in (d_low, d_high):
        # About at the floor either rule is right.
        ends += [w + sign_log(w, d, floor * (1 + e)) for e in (-4e-6, 4e-6)]
    low, high = np.minimum.reduce(ends), np.maximum.reduce(ends)
    largest = float(info.max)
    bound = min(weight_bound(rule, rms0, peak0, w), largest)
    low, high = np.clip(low, -bound, bound), np.clip(high, -bound, bound)
    # A weight crosses its whole dtype in two steps.
    low, high = (w + np.clip(end - w, -largest, largest) for end in (low, high))
    eps = float(info.eps)
    slack = 0.0
    for end in (low, high):
        size = np.abs(end) + np.abs(w) * (4 * F32) + np.abs(end - w)
        moved = (end != w) | (np.abs(w) > bound * (1 - 4e-6))
        slack = np.maximum(slack, np.where(moved, (eps + 8 * F32) * size, 0))
    tiny = float(max(info.smallest_subnormal, 2.0**-125))
    return low - slack - tiny, high + slack + tiny


def check_float(rule, rms0, peak0, zero_init, w, new, d_low, d_high):
    dtype = jnp.result_type(w)
    info = jnp.finfo(dtype)
    eps, x = float(info.eps), f64(np.asarray(w, dtype))  # a Python float is a float32
    low, high = float_interval(rule, rms0, peak0, zero_init, x, d_low, d_high, info)
    scale = min(grid_scale(rule, rms0, peak0), LARGEST)
    if rule.grid is None or scale == 0:
        check_between(new, low, high, "float leaf")
        return
    fmt = rule.grid
    here = encode(fmt, x / scale)
    error = code_error(fmt, x / scale)
    start = [
        decode(fmt, saturate(fmt, np.rint(here + s * error), np.sign(x)))
        for s in (-1, 1)
    ]
    u_low, u_high = (low - x) / scale, (high - x) / scale
    # A weight that is on the grid to within 8 roundings steps from its grid point.
    near = [
        np.where(np.abs(x / scale - p) <= 9 * eps * np.abs(p), p, x / scale)
        for p in start
    ]
    t_low = np.minimum.reduce([*near, x / scale]) + u_low - 4 * F32 * np.abs(u_low)
    t_high = np.maximum.reduce([*near, x / scale]) + u_high + 4 * F32 * np.abs(u_high)
    c_low = encode(fmt, t_low) - code_error(fmt, t_low)
    c_high = encode(fmt, t_high) + code_error(fmt, t_high)
    c_low, c_high = rounded(c_low, c_high, rule.rounding)
    c_low = saturate(fmt, c_low, np.sign(t_low))
    c_high = saturate(fmt, c_high, np.sign(t_high))
    got = f64(new)
    code = np.clip(np.rint(encode(fmt, got / scale)), c_low, c_high)
    largest = float(info.max)
    point = np.clip(scale * decode(fmt, code), -largest, largest)
    slack = (2 * eps + 8 * F32) * np.maximum(np.abs(point), np.abs(x))
    slack += (
        np.abs(point) * F32 * np.abs(np.log(np.maximum(np.abs(point) / scale, 1e-30)))
    )
    slack += float(max(info.smallest_subnormal, 2.0**-125))
    check_between(got, point - slack, point + slack, "float leaf on a grid")


def check_native(rule, w, new, d_low, d_high):
    fmt, c = w.format, f64(w.codes)
    low, high = log_steps(fmt, c, d_low), log_steps(fmt, c, d_high)
    slack = 4 * F32 * np.maximum(np.abs(low), np.abs(high))
    low, high = rounded(low - slack, high + slack, rule.rounding)
    sign = np.sign(c)
    check_codes_between(new, c + low, c + high, sign, sign, f"{fmt}")


def check_kind(w, new):
    """A leaf of the same kind, shape and dtype; a Python float has become an array."""
    assert is_quantized(w) == is_quantized(new)
    assert np.shape(w) == np.shape(new)
    if is_quantized(w):
        assert w.format == new.format and new.codes.dtype == w.codes.dtype
        np.testing.assert_array_equal(w.scale, new.scale)
    else:
        assert jnp.result_type(new) == jnp.result_type(w)
        assert np.all(np.isfinite(f64(new)))


class Oracle:
    """Follows an optimizer: it keeps the facts of the first weights, and the count."""

    def __init__(self, rule, params):
        self.rule, self.count, self.first = rule, 0, []
        for w in leaves_of(params):
            scale = (0.0, 0.0, False)
            if not is_quantized(w):
                zero = np.size(w) > 0 and not np.any(f64(w))
                rms = np.sqrt(np.mean(f64(w) ** 2)) if np.size(w) else 1.0
                peak = np.max(np.abs(f64(w)), initial=0)
                scale = (rule.zero_init_scale if zero else rms, peak, zero)
            self.first.append(scale)

    def check(self, grads, state, new_state, params, new):
        self.count += 1
        assert jax.tree.structure(new) == jax.tree.structure(params)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert new_state.count == self.count
        assert all(np.all(np.isfinite(f64(x))) for x in jax.tree.leaves(new_state))
        lists = map(leaves_of, (params, grads, new))
        for i, (w, g, after) in enumerate(zip(*lists, strict=True)):
            check_kind(w, after)
            d, error = directions(
                self.rule, i, w, g, state.direction, new_state.direction, self.count
            )
            ends = step_interval(self.rule, d, error, self.count)
            if is_quantized(w):
                check_native(self.rule, w, after, *ends)
            else:
                check_float(self.rule, *self.first[i], w, after, *ends)


# --- optimizers -----------------------------------------------------------------------


# Compiling takes a hundred times as long as an eager step.
modes = st.sampled_from(["eager"] * 10 + ["no jit"])


def in_mode(mode):
    return jax.disable_jit() if mode == "no jit" else contextlib.nullcontext()


def take_steps(tree, optimizer, seed, mode, steps):
    name, learning_rate, kw, rule = optimizer
    event(f"{name}, {mode}")
    with in_mode(mode), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = jax.tree.map(Leaf.make, tree)
        tokens = jax.tree.leaves(tree)
        for token, w in zip(tokens, leaves_of(params), strict=True):
            if token.kind == "codes":
                check_quantized(token, w)
        tx = getattr(madax if name == "madam" else madax.papers, name)(
            learning_rate, **kw
        )
        state = tx.init(params)
        step = jax.jit(run_step, static_argnums=0) if mode == "jit" else run_step
        oracle = Oracle(rule, params)
        for t in range(steps):
            grads = gradients(params, seed, t)
            new, new_state = step(tx, grads, state, params)
            oracle.check(grads, state, new_state, params, new)
            params, state = new, new_state
    stuck = rule.zero_init_scale == 0 and any(zero for *_, zero in oracle.first)
    messages = [str(w.message) for w in caught]
    assert sum("zero_init_scale" in message for message in messages) == stuck
    # Of weights that do not fit a bound, or a format of few codes.
    others = [m for m in messages if "zero_init_scale" not in m]
    assert all("beyond p_scale" in m or "lost in rounding" in m for m in others)


@settings(max_examples=EXAMPLES)
@given(trees(DTYPES, ends=True), optimizers(), seeds, modes, st.integers(1, 3))
def test_every_step_is_the_oracles(tree, optimizer, seed, mode, steps):
    take_steps(tree, optimizer, seed, mode, steps)


# Each optimizer has a test of its own: a draw would leave some next to no examples.
@pytest.mark.parametrize("name", ["madam", "bbit_madam", "lns_madam"])
@settings(max_examples=EXAMPLES // 8)
@given(trees(DTYPES, ends=True), st.data(), seeds, st.integers(2, 3))
def test_every_compiled_step_is_the_oracles(name, tree, data, seed, steps):
    optimizer = data.draw(optimizers([name]))
    take_steps(tree, optimizer, seed, "jit", steps)


# Few examples, because every operation compiles again.
@pytest.mark.nightly
@pytest.mark.parametrize("mode", mostly_nightly(["eager", "jit"], "jit"))
@settings(max_examples=EXAMPLES // 8)
@given(trees(["float64", "float64", "float32"]), optimizers(), seeds)
def test_every_step_is_the_oracles_with_float64(mode, tree, optimizer, seed):
    with enable_x64(True):
        take_steps(tree, optimizer, seed, mode, 2)


# --- optimizers that know nothing of codes --------------------------------------------


def inner_updates(kind, rate, moments, g, count):
    """What SGD or Adam add to a leaf, and its error; a NaN stays in Adam's moments."""
    g = f64(g)
    if kind == "sgd":
        return -rate * g, 4 * F32 * rate * np.abs(g)
    m_error = 8 * F32 * (np.abs(moments[0]) + np.abs(g))
    moments[0] += (1 - 0.9) * (g - moments[0])
    moments[1] += (1 - 0.999) * (g**2 - moments[1])
    m, v = moments
    step = rate / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
    # Optax takes 0.999**count from 1 in float32.
    return -step * m, step * (m_error + 5e-5 * np.abs(m))


def check_wrapped(w, new, u, error, rounding):
    check_kind(w, new)
    fmt, scale = w.format, f64(w.scale)
    still = ~np.isfinite(u)
    np.testing.assert_array_equal(
        np.asarray(new.codes)[still], np.asarray(w.codes)[still]
    )
    u, error = np.where(still, 0, u) / scale, np.where(still, 0, error) / scale
    x = decode(fmt, w.codes)
    error = error + 4 * F32 * np.abs(u)
    moved = x + u
    sum_error = error + 4 * F32 * np.minimum(np.abs(x), np.abs(moved)) * (u != 0)
    # Where a weight all but vanishes, float32 knows neither its sign nor its code.
    sum_error += np.where(np.abs(moved) < 0.5 * np.abs(x), 8 * F32 * np.abs(x), 0)
    low, high = moved - sum_error, moved + sum_error
    c_low = encode(fmt, low) - code_error(fmt, low) * (u != 0)
    c_high = encode(fmt, high) + code_error(fmt, high) * (u != 0)
    exact = np.where(u == 0, f64(w.codes), np.nan)
    c_low, c_high = rounded(c_low, c_high, rounding)
    c_low, c_high = (np.where(u == 0, exact, c) for c in (c_low, c_high))
    check_codes_between(new, c_low, c_high, np.sign(low), np.sign(high), f"{fmt}")


@few_codes_lose_much
@settings(max_examples=EXAMPLES // 2)
@given(
    trees(["float32"]),
    st.sampled_from(["sgd", "adam"]),
    st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 30.0]),
    st.sampled_from(["stochastic", "nearest"]),
    seeds,
    st.one_of(modes, modes, st.just("jit")),
    st.integers(1, 3),
)
def test_wrapped_optimizers_move_codes_as_they_would_floats(
    tree, kind, rate, rounding, seed, mode, steps
):
    event(f"{kind}, {mode}")
    with in_mode(mode), np.errstate(all="ignore"):
        params = jax.tree.map(Leaf.make, tree)
        inner = optax.sgd(rate) if kind == "sgd" else optax.adam(rate)
        tx = madax.with_quantized_params(inner, rounding=rounding, seed=seed)
        step = jax.jit(run_step, static_argnums=0) if mode == "jit" else run_step
        state = tx.init(params)
        moments = [np.zeros((2, *np.shape(w))) for w in leaves_of(params)]
        for t in range(steps):
            grads = gradients(params, seed, t)
            # Adam squares 1e25 into an infinity of its own; that is not looked at.
            grads = jax.tree.map(lambda g: np.where(abs(g) > 1e19, np.nan, g), grads)
            new, state = step(tx, grads, state, params)
            assert jax.tree.structure(new) == jax.tree.structure(params)
            assert state.count == t + 1
            lists = map(leaves_of, (params, grads, new))
            for i, (w, g, after) in enumerate(zip(*lists, strict=True)):
                u, error = inner_updates(kind, rate, moments[i], g, t + 1)
                if is_quantized(w):
                    check_wrapped(w, after, u, error, rounding)
                else:
                    want = f64(np.float32(w)) + u
                    size = error + 4 * F32 * (np.abs(want) + np.abs(u))
                    off = np.abs(f64(after) - want)
                    assert np.all((off <= size + 1e-37) | np.isnan(want))
                    assert np.all(np.isnan(f64(after)) == np.isnan(want))
            params = new
