"""Bad gradients, bad rates, numbers at the ends of their range; and what comes after.

The rule: where a gradient is not finite (or its square is not), the step has not been
but for the count. Neither the weight nor its moments change, and no other element
notices. So there is nothing to recover from: the next clean step is the one that an
optimizer with the moments of before and the count of now would take.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import SOME
from helpers import (
    enable_x64,
    is_quantized,
    jitted_step,
    moment_values,
    mostly_nightly,
    raises,
    same,
)
from helpers import step as eager_step

import madax
from madax import MomentFormat, QuantizedArray

pytestmark = pytest.mark.usefixtures("quick_compiles")

LR = 0.05
MADAMS = {
    "madam": madax.madam,
    "b1_floor": partial(madax.madam, b1=0.9, floor=1.0),
    "nearest": partial(madax.madam, rounding="nearest"),
    "moments8": partial(madax.madam, b1=0.9, moment_format=MomentFormat(8)),
    "bbit_madam": madax.papers.bbit_madam,
    "lns_madam": madax.papers.lns_madam,
}
WRAPPED = {
    "wrapped_sgd": lambda lr: madax.with_quantized_params(optax.sgd(lr)),
    "wrapped_adam": lambda lr: madax.with_quantized_params(optax.adam(lr)),
}
GRIDS = ("bbit_madam", "lns_madam")  # float leaves, too, are on a grid
every_madam = pytest.mark.parametrize("name", MADAMS)


@functools.cache
def compiled(make):
    """A step with the rate as an argument, compiled once for all tests of a shape."""
    step = lambda lr, *args: eager_step(make(lr), *args)
    return jax.jit(step)


def step_of(name):
    return compiled((MADAMS | WRAPPED)[name])


def init(name, params):
    return (MADAMS | WRAPPED)[name](LR).init(params)


@functools.cache
def mixed():
    """A leaf of every kind: floats, zeros, codes of every format, channels."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    codes = {k: madax.quantize_params(w, fmt) for k, fmt in SOME.items()}
    return codes | {
        "channels": madax.quantize_params(w, SOME["log8"], channel_axis=-1),
        "float32": w[:2],
        "bfloat16": w[:2].astype(jnp.bfloat16),
        "float16": w[:2].astype(jnp.float16),
        "zeros": jnp.zeros(5),
        "scalar": jnp.float32(-0.5),
    }


def gradients(seed, params=None, scale=1.0):
    rng = np.random.default_rng(seed)

    def like(w):
        dtype = jnp.float32 if is_quantized(w) else w.dtype
        return jnp.asarray(scale * rng.standard_normal(w.shape), dtype)

    params = mixed() if params is None else params
    return jax.tree.map(like, params, is_leaf=is_quantized)


def masks_of(where, params):
    """For each leaf, which elements: one of each leaf, or all."""
    masks = {}
    for i, (name, w) in enumerate(params.items()):
        masks[name] = np.full(w.shape, where == "all")
        masks[name].reshape(-1)[i % w.size] = True
    return masks


def poisoned(grads, masks):
    """The gradients with all that is not finite in the masks, one after the other."""

    def fault(g, mask):
        values = np.resize([np.nan, np.inf, -np.inf], g.shape)
        return jnp.asarray(np.where(mask, values, np.asarray(g)), g.dtype)

    return {k: fault(g, masks[k]) for k, g in grads.items()}


def arrays(tree):
    """Leaf by leaf, what an element is stored as: codes or floats."""
    return {k: np.asarray(w.codes if is_quantized(w) else w) for k, w in tree.items()}


def same_on_grid(name, one, other):
    """The same bits; but a float that is kept on a grid may take a last rounding.

    It is where its grid point is, to within a rounding, and a step of no codes may
    round it there again.
    """

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        if name not in GRIDS or a.dtype.kind == "i":
            np.testing.assert_array_equal(a, b)
        else:
            eps = float(jnp.finfo(a.dtype).eps)
            a, b = a.astype(np.float64), b.astype(np.float64)
            np.testing.assert_allclose(a, b, rtol=1.01 * eps)

    jax.tree.map(compare, one, other)


def all_finite(tree):
    return all(
        np.all(np.isfinite(np.asarray(x).astype(np.float64)))
        for x in jax.tree.leaves(tree)
    )


def check_valid(params):
    """Finite, and codes within their format; no scale has moved."""
    assert all_finite(params)
    for w in jax.tree.leaves(params, is_leaf=is_quantized):
        if is_quantized(w):
            assert w.codes.dtype == w.format.storage_dtype
            assert np.abs(np.asarray(w.codes, int)).max() <= w.format.levels
            assert np.all(np.isfinite(w.dequantize()))


def counted(state, steps):
    """The state with its counts of steps moved on, and nothing else."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + steps if getattr(path[-1], "name", "") == "count" else x,
        state,
    )


# --- gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_nightly(MADAMS, "moments8", "lns_madam"))
def test_an_element_misses_its_faulty_steps_and_no_other_notices(name):
    """Bit for bit, during the faults and in the clean steps after them."""
    step, params = step_of(name), mixed()
    masks = masks_of("element", params)
    state = init(name, params)
    for seed in range(2):
        params, state = step(LR, gradients(seed), state, params)
    clean, clean_state = faulty, faulty_state = params, state
    for seed in range(2, 5):
        g = gradients(seed)
        before, before_state = arrays(faulty), faulty_state
        clean, clean_state = step(LR, g, clean_state, clean)
        faulty, faulty_state = step(LR, poisoned(g, masks), faulty_state, faulty)
        check_valid(faulty)
        assert all_finite(faulty_state)
        for k, mask in masks.items():
            now, other = arrays(faulty)[k], arrays(clean)[k]
            same_on_grid(name, now[mask], before[k][mask])
            np.testing.assert_array_equal(now[~mask], other[~mask])
            states = faulty_state, before_state, clean_state
            for moment, *trees in zip(
                "vm", *(moment_values(s.direction) for s in states), strict=True
            ):
                if trees[0] is None:
                    continue
                now, old, other = (np.asarray(tree[k]) for tree in trees)
                if name == "moments8" and moment == "v":  # decays all together
                    old = np.float32(0.999) * old
                np.testing.assert_allclose(now[mask], old[mask], rtol=2e-7)
                np.testing.assert_array_equal(now[~mask], other[~mask])
    # The clean steps after: of the faulted elements as with the old moments.
    as_if, as_if_state = params, counted(state, 3)
    for seed in range(5, 8):
        g = gradients(seed)
        clean, clean_state = step(LR, g, clean_state, clean)
        faulty, faulty_state = step(LR, g, faulty_state, faulty)
        as_if, as_if_state = step(LR, g, as_if_state, as_if)
        for k, mask in masks.items():
            now = arrays(faulty)[k]
            if name != "moments8":
                same_on_grid(name, now[mask], arrays(as_if)[k][mask])
            np.testing.assert_array_equal(now[~mask], arrays(clean)[k][~mask])
    for k, mask in masks.items():
        moved = arrays(faulty)[k][~mask] != arrays(params)[k][~mask]
        assert np.any(moved) or mask.all()


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize("faults", [1, 5, 200, 5000])
def test_the_first_clean_step_after_a_faulty_start(faults, b1):
    """The count has gone on while v has not: a longer step, and known how long.

    With v = (1 - b2) g**2 and the bias corrected for n steps, g_hat is the root of
    (1 - b2**n) / (1 - b2), times (1 - b1) / (1 - b1**n) with a first moment; no more
    than g_bound.
    """
    w = jnp.float32([0.5, -2.0])
    tx = madax.madam(0.01, p_scale=100.0, b1=b1)
    state = tx.init(w)._replace(count=jnp.int32(faults))
    after, state = jitted_step(tx, jnp.float32([3.0, 0.1]), state, w)
    n = faults + 1
    g_hat = np.sqrt((1 - 0.999**n) / (1 - 0.999))
    if b1:
        g_hat *= (1 - 0.9) / (1 - 0.9**n)
    want = -0.01 * min(g_hat, 10.0) * np.sign(w)
    np.testing.assert_allclose(np.log(after / w), want, rtol=2e-4)
    assert all_finite(state)


def test_stored_moments_are_placed_by_the_first_clean_gradients():
    """Neither a fault nor its neighbours may misplace the octaves."""
    w = jnp.ones((4, 4))
    tx = madax.madam(0.01, moment_format=MomentFormat(8))
    clean = jnp.full((4, 4), 1e-6)

    def window_after(*grads):
        state = tx.init(w)
        for g in grads:
            _, state = jitted_step(tx, g, state, w)
        (window,) = state.direction.window.values()
        return int(window.octave[0])

    placed = window_after(clean, clean)
    assert placed > 0
    bad = [clean.at[0, 0].set(x) for x in (jnp.nan, jnp.inf, -jnp.inf, 1e30)]
    for g in bad:
        # To within an octave: the codes that place it are rounded stochastically.
        for grads in [(g, clean), (clean, g), (g, g), (g, g, clean)]:
            assert abs(window_after(*grads) - placed) <= 1
    lost = clean * jnp.nan
    assert window_after(lost, lost, lost) == 0
    assert abs(window_after(lost, lost, clean, clean) - placed) <= 1


def test_float64_gradients_too_large_for_the_moments_do_not_place_them():
    with enable_x64():
        w = jnp.ones(4, jnp.float64)
        tx = madax.madam(0.01, moment_format=MomentFormat(8))
        clean = jnp.full(4, 1e-3, jnp.float64)
        windows = []
        for first in (clean, clean.at[0].set(1e25)):
            _, state = jitted_step(tx, first, tx.init(w), w)
            _, state = jitted_step(tx, clean, state, w)
            (window,) = state.direction.window.values()
            windows.append(int(window.octave[0]))
        assert windows[0] > 0
        assert abs(windows[1] - windows[0]) <= 1


W = np.float32([0.5, -2.0, 1.0, -0.25, 3.0])
# One step from W: gradients, and the direction that each weight must take.
ONE_STEP = {
    "zeros": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    "negative zeros": ([-0.0, 0.0, -0.0, 1, -1], [0, 0, 0, -1, 1]),
    "square overflows": ([1e20, -1e30, 3e38, 1, -1], [0, 0, 0, -1, 1]),
    "square just fits": ([1e19, -1.8e19, 1, 1, 1], [-1, 1, -1, -1, -1]),
    "second moment underflows": ([1e-30, -1e-25, 1e-23, 1, -1], [0, 0, 0, -1, 1]),
    "second moment just fits": ([1e-17, -1e-16, 1, 1, 1], [-1, 1, -1, -1, -1]),
    "subnormal": ([1e-40, -1e-44, 1e-45, 1, -1], [0, 0, 0, -1, 1]),
    "mixed scales": ([1e-16, 1e18, -1e-5, 1e5, -1], [-1, -1, 1, -1, 1]),
}


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_from_edge_gradients(name, b1):
    grads, direction = ONE_STEP[name]
    tx = edge_madam(b1)
    w, state = jitted_step(tx, jnp.float32(grads), tx.init(W), W)
    want = W * np.exp(np.sign(W) * LR * np.float64(direction))
    np.testing.assert_allclose(w, want, rtol=1.5e-7)
    still = np.float64(direction) == 0
    np.testing.assert_array_equal(np.asarray(w)[still], W[still])
    assert all_finite(state)


@functools.cache
def edge_madam(b1):
    return madax.madam(LR, b1=b1, p_scale=10.0)


# --- learning rates -------------------------------------------------------------------


@every_madam
def test_a_rate_that_is_out_of_range_is_seen(name):
    """It can be traced, or of a schedule: floats become NaN, and codes stay."""
    step, params = step_of(name), mixed()
    state = init(name, params)
    params, state = step(LR, gradients(0), state, params)
    _, clean_state = step(LR, gradients(1), state, params)
    for lr in (np.nan, np.inf, -np.inf, -1e-3):
        after, after_state = step(lr, gradients(1), state, params)
        assert_seen(after, params)
        same(after_state, clean_state)


def assert_seen(after, before):
    """Codes are what they were, and all floats are NaN."""
    for k, w in after.items():
        if is_quantized(w):
            same(w, before[k])
        else:
            assert np.all(np.isnan(np.asarray(w, np.float32))), k


@pytest.mark.parametrize("name", [*MADAMS, "wrapped_sgd"])
def test_a_huge_rate_leaves_weights_at_the_ends_of_their_range(name, lr=1e30):
    step, params = step_of(name), mixed()
    if name == "wrapped_sgd":  # the float leaves are SGD's own affair
        params = {k: w for k, w in params.items() if is_quantized(w)}
    state = init(name, params)
    g = jax.tree.map(lambda x: 1 + jnp.abs(x), gradients(1, params))
    for seed in range(6):
        # The sign changes: from one end to the other.
        sign = (-1) ** seed
        grads = jax.tree.map(lambda x: sign * x, g)  # noqa: B023
        params, state = step(lr, grads, state, params)
        check_valid(params)
        assert all_finite(state)
        if seed > 0 or name == "wrapped_sgd":
            codes = arrays(params)
            for k in ("symlog8", "uniform8"):
                if k == "symlog8" or name == "wrapped_sgd":
                    end = -sign * SOME[k].levels
                    # A first moment, stored by chance, decides on a sign by chance.
                    ends = {end, -end} if name == "moments8" else {end}
                    assert set(codes[k].ravel()) <= ends
            if name in MADAMS:  # a multiplication moves no sign: far out or close to 0
                assert set(np.abs(codes["log8"]).ravel()) == {1, SOME["log8"].levels}
    # Back to sensible rates: the right direction, whatever came before.
    before = params
    for _ in range(3):
        params, state = step(0.2, g, state, params)
        check_valid(params)
    for k, new in arrays(params).items():
        new, old = (np.asarray(x, np.float64) for x in (new, arrays(before)[k]))
        assert np.all(new <= old + 1e-6 * np.abs(old)), k
    assert any(np.any(arrays(params)[k] < w) for k, w in arrays(before).items())


UNAFFECTED = {"p_scale": ("log8", "uniform8"), "floor": ("log8", "uniform8", "zeros")}


@pytest.mark.parametrize("moments", [None, MomentFormat(8)])
def test_an_injected_hyperparameter_that_is_out_of_range_is_seen(moments):
    params = {k: mixed()[k] for k in ("log8", "uniform8", "float32", "zeros")}
    given = {"b1": 0.9, "b2": 0.99, "floor": 0.1, "p_scale": 3.0, "g_bound": 10.0}
    given |= {"learning_rate": LR, "weight_decay": 0.1}
    tx = optax.inject_hyperparams(madax.madam)(**given, moment_format=moments)
    start, step = tx.init(params), partial(jitted_step, tx)
    params, start = step(gradients(0, params), start, params)
    for name in given:
        for bad in (np.nan, -1.0, {"b1": 1.0, "b2": 1.0}.get(name, -np.inf)):
            hyperparams = start.hyperparams | {name: jnp.float32(bad)}
            state = start._replace(hyperparams=hyperparams)
            after, state = step(gradients(1, params), state, params)
            other = UNAFFECTED.get(name, ())
            assert_seen({k: w for k, w in after.items() if k not in other}, params)


def test_log_steps_of_another_direction_that_are_not_finite_are_skipped():
    tx, w = madax.scale_by_sign_log(floor=0.5), jnp.array([1.0, -1.0, 0.1, 2.0])
    steps = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.1])
    updates, _ = tx.update(steps, tx.init(w), w)
    np.testing.assert_allclose(updates, [0, 0, 0, 2 * np.expm1(0.1)], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_decay_rate_in_16_bits_is_refused(dtype):
    """In bfloat16, .999 is 1, and nothing would move."""
    params = {"w": jnp.ones((4, 4), dtype)}
    words = f"has dtype {dtype}", "hyperparam_dtype=jnp.float32"
    for make, name in (
        (madax.madam, "b2"),
        (madax.muon_madam, "b1"),
        (madax.muon, "b1"),
    ):
        tx = optax.inject_hyperparams(make)(LR)
        for init in (tx.init, jax.jit(tx.init)):
            with raises(TypeError, name, *words):
                init(params)
    for make in (madax.papers.bbit_madam, madax.papers.lns_madam):
        with raises(TypeError, "b2", *words):
            make(b2=jnp.asarray(0.5, dtype))
    with raises(TypeError, "b1", *words):
        madax.madam(b1=jnp.dtype(dtype).type(0.5))
    wide = optax.inject_hyperparams(madax.madam, hyperparam_dtype=jnp.float32)(LR)
    after, _ = jitted_step(wide, params, jax.jit(wide.init)(params), params)
    assert np.all(after["w"] != 1)


@pytest.mark.parametrize("fmt", SOME.values(), ids=SOME)
def test_updates_that_are_not_finite_move_no_code(fmt):
    tx = madax.lns_quantize(rounding="nearest")
    params = madax.quantize_params(jnp.ones((4, 4)), fmt)
    steps = jnp.zeros((4, 4)).at[0, 0].set(jnp.nan)
    updates, _ = tx.update(steps, tx.init(params), params)
    same(optax.apply_updates(params, updates), params)


@pytest.mark.parametrize("fmt", SOME.values(), ids=SOME)
def test_huge_steps_of_codes_end_where_they_lead(fmt):
    """Also those beyond all integers, signs of logarithmic codes kept; not infinity."""
    tx = madax.lns_quantize()
    params = madax.quantize_params(jnp.linspace(-1, 1, 16).reshape(4, 4), fmt)
    state, keeps_sign = tx.init(params), isinstance(fmt, madax.LogFormat)
    for step in (3e9, 1e30, -1e30, -3e38):
        updates, _ = tx.update(jnp.full((4, 4), step), state, params)
        codes = np.asarray(optax.apply_updates(params, updates).codes)
        end = fmt.levels * np.sign(step)
        stays = keeps_sign & (np.sign(params.codes) != np.sign(step))
        np.testing.assert_array_equal(codes, np.where(stays, -np.sign(step), end))
    for step in (np.inf, -np.inf, np.nan):
        updates, _ = tx.update(jnp.full((4, 4), step), state, params)
        assert not np.any(updates.codes)


def test_a_leaf_of_zeros_with_no_scale_passes_its_updates_on():
    tx, params = (
        madax.papers.quantize_to_grid(madax.LogFormat(8), zero_init_scale=0.0),
        W * 0,
    )
    updates, _ = tx.update(jnp.full_like(params, 0.1), tx.init(params), params)
    np.testing.assert_array_equal(updates, jnp.full_like(params, 0.1))


# --- scales at the ends of float32 ----------------------------------------------------


def normal(shape=(4, 4)):
    w = np.float32(np.random.default_rng(3).standard_normal(shape))
    return w / np.sqrt(np.mean(w**2))


@pytest.mark.parametrize("name", ["madam", *WRAPPED])
def test_codes_do_not_depend_on_the_scale(name):
    """Native codes take the same steps; wrapped optimizers valid ones."""
    step = step_of(name)
    start = {
        k: madax.quantize_params(jnp.asarray(normal()), f) for k, f in SOME.items()
    }
    for size in np.float32([1e-38, 1.1e38]):
        one, other = (
            start,
            {
                k: QuantizedArray(w.codes, jnp.float32(3 * size), w.format)
                for k, w in start.items()
            },
        )
        state, other_state = init(name, one), init(name, other)
        for seed in range(3):
            g = gradients(seed, one)
            if name in WRAPPED:
                g = jax.tree.map(lambda x: x * size, g)  # noqa: B023
            one, state = step(LR, g, state, one)
            other, other_state = step(LR, g, other_state, other)
            if name in MADAMS:
                same(arrays(other), arrays(one))
            check_valid(other)


@pytest.mark.parametrize("channel_axis", [None, -1])
@pytest.mark.parametrize("fmt", SOME.values(), ids=SOME)
def test_weights_of_any_size_become_the_same_codes(fmt, channel_axis):
    """Above 2**124 the reciprocal of the scale is subnormal."""
    quantize = partial(madax.quantize_params, format=fmt, channel_axis=channel_axis)
    one = quantize(normal())
    for exponent in (-120, 110, 125):
        size = np.float32(2.0**exponent)
        other = quantize(normal() * size)
        same(other.codes, one.codes)
        same(other.scale, one.scale * size)


def next_to_largest(dtype):
    """Where weights end: a rounding of ``w + u`` may add half a unit to it."""
    return float(jnp.nextafter(jnp.finfo(dtype).max, jnp.zeros((), dtype)))


every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@every_dtype
@pytest.mark.parametrize("name", ["madam", "b1_floor", "bbit_madam"])
def test_no_weight_is_rounded_beyond_its_dtype(name, dtype):
    """An update that leads to the largest number may, rounded, lead past it."""
    rng = np.random.default_rng(0)
    w = rng.choice([-1, 1], 3000) * rng.uniform(0.01, 1, 3000)
    params = jnp.asarray(w * float(jnp.finfo(dtype).max), dtype)
    # A grid has a largest value.
    tx = MADAMS[name](1.0, p_scale=1e38 if name in GRIDS else np.inf)
    state = tx.init(params)
    for i in range(5):
        grads = jnp.asarray(rng.standard_normal(3000), jnp.float32)
        grads = jnp.where(rng.random(3000) < 0.1, [jnp.nan, jnp.inf, 0][i % 3], grads)
        params, state = jitted_step(tx, grads, state, params)
        assert all_finite((params, state))


@every_dtype
@pytest.mark.parametrize("p_scale", [3.0, np.inf])
def test_weights_cross_the_whole_dtype(dtype, p_scale):
    """With a floor a weight may go from one end to the other, which is twice max."""
    largest = next_to_largest(dtype)
    w = jnp.asarray([largest, -largest], dtype)
    tx = madax.madam(1e30, floor=1.0, p_scale=p_scale)
    g, state = jnp.asarray([1.0, -1.0], dtype), tx.init(w)
    seen = [w]
    for _ in range(3):
        w, state = jitted_step(tx, g, state, w)
        assert all_finite(w)
        seen.append(w)
    got = np.asarray(jnp.stack(seen), np.float64) / largest
    np.testing.assert_array_equal(got[3], [-1, 1])
    if dtype == "float16":  # A floor can be as large as its weights.
        np.testing.assert_array_equal(got[1:3], [[0, 0], [-1, 1]])


@every_dtype
@pytest.mark.parametrize("make", [madax.papers.bbit_madam, madax.papers.lns_madam])
def test_a_grid_that_reaches_beyond_the_dtype_ends_with_it(make, dtype):
    largest = next_to_largest(dtype)
    w = jnp.asarray([largest, -largest, largest / 4], dtype)
    tx = make(0.1)
    state = tx.init(w)
    assert all_finite(state)
    outwards = -jnp.sign(w)
    for _ in range(20):
        w, state = jitted_step(tx, outwards, state, w)
        assert all_finite(w)
    np.testing.assert_array_equal(
        np.asarray(w[:2], np.float64), np.array([largest, -largest])
    )
    before = w
    w, state = jitted_step(tx, -outwards, state, w)
    assert np.all(np.abs(np.asarray(w, np.float64)) < np.abs(np.float64(before)))


@pytest.mark.parametrize("floor", [1e10, 3e38])
def test_a_floor_beyond_all_floats_is_the_largest(floor):
    w = jnp.float32([1e30, -1e30, 0.0])
    tx = madax.madam(LR, floor=floor)
    state = tx.init(w)
    for g in ([0.0, 0.0, 0.0], [1.0, 0.0, np.nan], [0.0, -1.0, 1.0]):
        w, state = jitted_step(tx, jnp.float32(g), state, w)
        assert all_finite((w, state))


# --- an optimizer inside that is not robust itself ------------------------------------


def wrapped_steps(tx, params, state, gs):
    for g in gs:
        params, state = jitted_step(tx, g, state, params)
    return params, state


def test_moments_of_adam_that_are_lost_freeze_their_codes_and_no_others():
    """What the wrapper promises: codes are valid. It cannot mend Adam's moments."""
    params = {k: w for k, w in mixed().items() if is_quantized(w)}
    masks = masks_of("element", params)
    tx = madax.with_quantized_params(optax.adam(LR))
    params, state = wrapped_steps(tx, params, tx.init(params), [gradients(0, params)])
    clean = bad = params
    clean_state = bad_state = state
    for seed in range(1, 6):
        g = gradients(seed, params)
        fault = poisoned(g, masks) if seed < 3 else g
        clean, clean_state = wrapped_steps(tx, clean, clean_state, [g])
        bad, bad_state = wrapped_steps(tx, bad, bad_state, [fault])
        check_valid(bad)
        for k, mask in masks.items():
            now = arrays(bad)[k]
            np.testing.assert_array_equal(now[mask], arrays(params)[k][mask])
            np.testing.assert_array_equal(now[~mask], arrays(clean)[k][~mask])
    assert not all_finite(bad_state.inner_state)


def test_adam_recovers_with_apply_if_finite_inside_the_wrapper():
    """Not around it: updates of codes have another structure than gradients."""
    params = mixed()
    masks = masks_of("element", params)
    inner = optax.apply_if_finite(optax.adam(LR), max_consecutive_errors=10)
    tx = madax.with_quantized_params(inner)
    state = tx.init(params)
    params, state = wrapped_steps(tx, params, state, [gradients(0), gradients(1)])
    faults = [poisoned(gradients(s), masks) for s in (2, 3, 4)]
    after, after_state = wrapped_steps(tx, params, state, faults)
    same(after, params)
    assert int(after_state.inner_state.total_notfinite) == 3
    same(after_state.inner_state.inner_state, state.inner_state.inner_state)
    # The clean steps are those of an optimizer that has not seen the faults, but for
    # the count, which is what the rounding draws its bits from.
    clean = [gradients(s) for s in (5, 6)]
    as_if = state._replace(count=state.count + 3)
    one, _ = wrapped_steps(tx, after, after_state, clean)
    other, _ = wrapped_steps(tx, params, as_if, clean)
    same(one, other)
    check_valid(one)
    for k, w in arrays(one).items():
        assert np.any(w != arrays(params)[k])
