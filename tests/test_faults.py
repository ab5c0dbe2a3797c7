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
from helpers import enable_x64

import madax
from madax import LogFormat, MomentFormat, QuantizedArray, SymlogFormat, UniformFormat

LR = 0.05
MADAMS = {
    "madam": madax.madam,
    "b1_floor": partial(madax.madam, b1=0.9, floor=1.0),
    "nearest": partial(madax.madam, rounding="nearest"),
    "moments8": partial(madax.madam, b1=0.9, moment_format=MomentFormat(8)),
    "bbit_madam": madax.bbit_madam,
    "lns_madam": madax.lns_madam,
}
WRAPPED = {
    "wrapped_sgd": lambda lr: madax.with_quantized_params(optax.sgd(lr)),
    "wrapped_adam": lambda lr: madax.with_quantized_params(optax.adam(lr)),
}
FORMATS = {
    "log8": LogFormat.from_dynamic_range(8, 100),
    "log16": LogFormat.from_dynamic_range(16, 10_000),
    "symlog8": SymlogFormat(8, 0.3),
    "uniform8": UniformFormat(8),
}
GRIDS = ("bbit_madam", "lns_madam")  # float leaves, too, are on a grid
every_madam = pytest.mark.parametrize("name", MADAMS)
every_poison = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])


def is_quantized(x):
    return isinstance(x, QuantizedArray)


@partial(jax.jit, static_argnums=0)
def jitted_step(tx, grads, params, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def jitted(make):
    """A step with the rate as an argument, compiled once for all tests of a shape."""

    def step(lr, grads, state, params):
        updates, state = make(lr).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def step_of(name):
    return jitted((MADAMS | WRAPPED)[name])


def init(name, params):
    return (MADAMS | WRAPPED)[name](LR).init(params)


@functools.cache
def mixed():
    """A leaf of every kind: floats, zeros, codes of every format, channels."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    codes = {k: madax.quantize_params(w, fmt) for k, fmt in FORMATS.items()}
    return codes | {
        "channels": madax.quantize_params(w, FORMATS["log8"], channel_axis=-1),
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


def where_bad(where, params):
    """For each leaf, which elements: one of them all, one leaf, or all."""
    masks = {}
    for i, (name, w) in enumerate(params.items()):
        mask = np.zeros(w.shape, bool)
        if where == "all" or (where == "leaf" and name in ("log8", "float32")):
            mask[...] = True
        elif where == "element":  # one a leaf
            mask.reshape(-1)[i % mask.size] = True
        masks[name] = mask
    return masks


def poisoned(grads, masks, poison=None):
    """The gradients with that value in the masks, or with all that is not finite."""

    def fault(g, mask):
        values = np.resize(
            [np.nan, np.inf, -np.inf] if poison is None else poison, g.shape
        )
        return jnp.asarray(np.where(mask, values, np.asarray(g)), g.dtype)

    return {k: fault(g, masks[k]) for k, g in grads.items()}


def arrays(tree):
    """Leaf by leaf, what an element is stored as: codes or floats."""
    return {k: np.asarray(w.codes if is_quantized(w) else w) for k, w in tree.items()}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


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


@every_poison
@every_madam
def test_faulty_steps_everywhere_are_steps_that_have_not_been(name, poison):
    """All leaves, several steps: the same bits as before, but for the count."""
    step, params = step_of(name), mixed()
    state = init(name, params)
    for seed in range(3):
        params, state = step(LR, gradients(seed), state, params)
    masks = where_bad("all", params)
    after, after_state = params, state
    for seed in range(4):
        bad = poisoned(gradients(seed), masks, poison)
        after, after_state = step(LR, bad, after_state, after)
    same_on_grid(name, after, params)
    same(after_state, counted(state, 4))


@pytest.mark.parametrize("where", ["element", "leaf"])
@every_madam
def test_an_element_misses_its_faulty_steps_and_no_other_notices(name, where):
    """Bit for bit, during the faults and in the clean steps after them."""
    step, params = step_of(name), mixed()
    masks = where_bad(where, params)
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
            for moment in ("v", "m"):
                now, old, other = (
                    getattr(s[0], moment)
                    for s in (faulty_state, before_state, clean_state)
                )
                if now is None:
                    continue
                now, old, other = (np.asarray(x[k]) for x in (now, old, other))
                np.testing.assert_array_equal(now[mask], old[mask])
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
            same_on_grid(name, now[mask], arrays(as_if)[k][mask])
            np.testing.assert_array_equal(now[~mask], arrays(clean)[k][~mask])
    for k, mask in masks.items():
        assert (
            np.any(arrays(faulty)[k][~mask] != arrays(params)[k][~mask]) or mask.all()
        )


@every_madam
def test_an_element_that_is_faulty_for_ever_stays_for_ever(name):
    step, start = step_of(name), mixed()
    masks = where_bad("element", start)
    state = init(name, start)
    if name in GRIDS:  # the first step brings floats there
        start, state = step(LR, gradients(0), state, start)
    params = start
    for seed in range(40):
        bad = poisoned(gradients(seed), masks)
        params, state = step(LR, bad, state, params)
    check_valid(params)
    assert all_finite(state)
    for k, mask in masks.items():
        old, new = arrays(start)[k], arrays(params)[k]
        same_on_grid(name, new[mask], old[mask])
        if not mask.all():
            assert np.mean(new[~mask] != old[~mask]) > 0.8


@pytest.mark.parametrize("options", [{}, {"b1": 0.9}], ids=str)
@pytest.mark.parametrize("faults", [1, 5, 200, 5000])
def test_the_first_clean_step_after_a_faulty_start(faults, options):
    """The count has gone on while v has not: a longer step, and known how long.

    With v = (1 - b2) g**2 and the bias corrected for n steps, g_hat is the root of
    (1 - b2**n) / (1 - b2), times (1 - b1) / (1 - b1**n) with a first moment; no more
    than g_bound.
    """
    w = jnp.float32([0.5, -2.0])
    tx = madax.madam(0.01, p_scale=100.0, **options)
    state = tx.init(w)
    bad = jnp.full(2, jnp.nan)
    run = jax.jit(
        lambda w, state: jax.lax.scan(
            lambda c, _: (jitted_step(tx, bad, *c), None), (w, state), length=faults
        )[0]
    )
    after, state = run(w, state)
    np.testing.assert_array_equal(after, w)
    g = jnp.float32([3.0, 0.1])
    after, state = jitted_step(tx, g, after, state)
    n = faults + 1
    g_hat = np.sqrt((1 - 0.999**n) / (1 - 0.999))
    if options:
        g_hat *= (1 - 0.9) / (1 - 0.9**n)
    want = -0.01 * min(g_hat, 10.0) * np.sign(w)
    np.testing.assert_allclose(np.log(after / w), want, rtol=2e-4)
    assert all_finite(state)


@pytest.mark.parametrize("bits", [8, 16])
def test_stored_moments_are_placed_by_the_first_clean_gradients(bits):
    """Their window is for good: neither a fault nor its neighbours may misplace it."""
    w = jnp.ones((4, 4))
    tx = madax.madam(0.01, moment_format=MomentFormat(bits))
    clean = jnp.full((4, 4), 1e-6)

    def window_after(*grads):
        state = tx.init(w)
        for g in grads:
            _, state = jitted_step(tx, g, w, state)
        (window,) = jax.tree.leaves(state[0].window)
        return int(window[0])

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
            _, state = jitted_step(tx, first, w, tx.init(w))
            _, state = jitted_step(tx, clean, w, state)
            windows.append(int(jax.tree.leaves(state[0].window)[0][0]))
        assert windows[0] > 0
        assert abs(windows[1] - windows[0]) <= 1


# --- learning rates -------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MADAMS, *WRAPPED])
def test_rate_zero_moves_nothing(name):
    step, params = step_of(name), mixed()
    state = init(name, params)
    if name in GRIDS:  # the first step brings floats there, whatever the rate
        params, state = step(0.0, gradients(0), state, params)
    after = params
    for seed in range(1, 5):
        after, state = step(0.0, gradients(seed), state, after)
    same_on_grid(name, after, params)
    assert all_finite(state)


@pytest.mark.parametrize("lr", [np.nan, np.inf, -np.inf])
@every_madam
def test_a_rate_that_is_not_finite_moves_no_weight(name, lr):
    """A rate can be such only from a schedule, or traced; moments go on as ever."""
    step, params = step_of(name), mixed()
    state = init(name, params)
    params, state = step(LR, gradients(0), state, params)
    after, after_state = step(lr, gradients(1), state, params)
    _, clean_state = step(LR, gradients(1), state, params)
    same_on_grid(name, after, params)
    same(after_state, clean_state)
    after, _ = step(LR, gradients(2), after_state, after)
    check_valid(after)
    for k, w in arrays(after).items():
        assert np.any(w != arrays(params)[k])


@pytest.mark.parametrize("lr", [1.0, 1e6, 1e30])
@pytest.mark.parametrize("name", [*MADAMS, "wrapped_sgd"])
def test_a_huge_rate_leaves_weights_at_the_ends_of_their_range(name, lr):
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
        if lr >= 1e6 and (seed > 0 or name == "wrapped_sgd"):
            codes = arrays(params)
            for k in ("symlog8", "uniform8"):
                if k == "symlog8" or name == "wrapped_sgd":
                    end = -sign * FORMATS[k].levels
                    # A first moment, stored by chance, decides on a sign by chance.
                    ends = {end, -end} if name == "moments8" else {end}
                    assert set(codes[k].ravel()) <= ends
            if name in MADAMS:  # a multiplication moves no sign: far out or close to 0
                assert set(np.abs(codes["log8"]).ravel()) == {1, FORMATS["log8"].levels}
    # Back to sensible rates: the right direction, whatever came before.
    before = params
    for _ in range(3):
        params, state = step(0.2, g, state, params)
        check_valid(params)
    for k, new in arrays(params).items():
        new, old = (np.asarray(x, np.float64) for x in (new, arrays(before)[k]))
        assert np.all(new <= old + 1e-6 * np.abs(old)), k
    assert any(np.any(arrays(params)[k] < w) for k, w in arrays(before).items())


@pytest.mark.parametrize("source", ["schedule", "injected"])
@every_madam
def test_one_bad_rate_of_a_schedule_or_injected(name, source):
    """Two ways for a rate to go bad on one step and to be fine on the next."""
    make, params = MADAMS[name], {k: mixed()[k] for k in ("log8", "float32", "zeros")}
    if source == "schedule":
        tx = make(lambda count: jnp.where(count == 1, jnp.nan, LR))
    else:
        keep = {"format", "moment_format", "bits", "base_precision", "rounding"}
        function, fixed = make, {}
        if isinstance(make, partial):
            function, fixed = make.func, make.keywords
        names = function.__kwdefaults__.keys() | set(
            function.__code__.co_varnames[: function.__code__.co_argcount]
        )
        tx = optax.inject_hyperparams(function, static_args=keep & names)(LR, **fixed)
    state = tx.init(params)
    update = jax.jit(tx.update)
    moved = []
    for count in range(3):
        if source == "injected":
            rate = jnp.float32(np.nan if count == 1 else LR)
            state.hyperparams["learning_rate"] = rate
        updates, state = update(gradients(count, params), state, params)
        before, params = params, optax.apply_updates(params, updates)
        moved.append([np.any(arrays(before)[k] != arrays(params)[k]) for k in params])
        check_valid(params)
    assert moved == [[True] * 3, [False] * 3, [True] * 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["b1", "b2", "floor", "p_scale", "g_bound"])
def test_one_bad_value_of_another_hyperparameter(name, bad):
    params = {k: mixed()[k] for k in ("log8", "uniform8", "float32", "zeros")}
    injected = optax.inject_hyperparams(madax.madam)
    tx = injected(LR, b1=0.9, b2=0.99, floor=0.1, p_scale=3.0, g_bound=10.0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for count in range(3):
        value = state.hyperparams[name]
        if count == 1:
            state.hyperparams[name] = jnp.float32(bad)
        updates, state = update(gradients(count, params), state, params)
        state.hyperparams[name] = value
        before, params = params, optax.apply_updates(params, updates)
        check_valid(params)
        assert all_finite(state)
    for k, w in arrays(params).items():
        assert np.any(w != arrays(before)[k]), k


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_updates_that_are_not_finite_move_no_code(fmt):
    tx = madax.lns_quantize(rounding="nearest")
    params = madax.quantize_params(jnp.ones((4, 4)), fmt)
    steps = jnp.zeros((4, 4)).at[0, 0].set(jnp.nan)
    updates, _ = tx.update(steps, tx.init(params), params)
    same(optax.apply_updates(params, updates), params)


# --- scales at the ends of float32 ----------------------------------------------------


def normal(shape=(4, 4)):
    w = np.float32(np.random.default_rng(3).standard_normal(shape))
    return w / np.sqrt(np.mean(w**2))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1.1e38])
@pytest.mark.parametrize("name", [*MADAMS, *WRAPPED])
def test_codes_do_not_feel_the_scale(name, scale):
    """Native codes take the same steps; wrapped optimizers valid ones."""
    size, step = np.float32(scale), step_of(name)
    one = {
        k: madax.quantize_params(jnp.asarray(normal()), f) for k, f in FORMATS.items()
    }
    other = {
        k: QuantizedArray(w.codes, jnp.float32(3 * size), w.format)
        for k, w in one.items()
    }
    state, other_state = init(name, one), init(name, other)
    for seed in range(3):
        g = gradients(seed, one)
        if name in WRAPPED:
            g = jax.tree.map(lambda x: x * size, g)
        one, state = step(LR, g, state, one)
        other, other_state = step(LR, g, other_state, other)
        if name in MADAMS:
            same(arrays(other), arrays(one))
        check_valid(other)


@pytest.mark.parametrize("channel_axis", [None, -1])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("exponent", [-120, 110, 125])
def test_weights_of_any_size_become_the_same_codes(exponent, fmt, channel_axis):
    """Above 2**124 the reciprocal of the scale is subnormal."""
    w, size = jnp.asarray(normal()), np.float32(2.0**exponent)
    one, other = (
        madax.quantize_params(x, fmt, channel_axis=channel_axis) for x in (w, w * size)
    )
    same(other.codes, one.codes)
    same(other.scale, one.scale * size)


EXTREMES = {
    "largest": lambda info: [float(info.max), -float(info.max), float(info.max) / 2],
    # Not the very smallest, whose mean square is subnormal: all zeros, as XLA sees it.
    "small": lambda info: [float(info.tiny) * 4, -float(info.tiny) * 4, 0.0],
    "both": lambda info: [float(info.max), -float(info.tiny), 1.0],
    "subnormal": lambda info: [float(info.tiny) / 4, -float(info.tiny) / 8, 1.0],
}


@pytest.mark.parametrize("lr", [LR, 1.0, 1e30])
@every_madam
def test_floats_at_the_ends_of_their_dtype(name, lr):
    """Weights and gradients of the largest and the smallest numbers there are.

    At huge rates too, whose steps lead from one end of the dtype to the other.
    """
    dtypes = ["float32", "bfloat16", "float16"]
    params = {
        f"{k}_{dtype}": jnp.asarray(f(jnp.finfo(dtype)), dtype)
        for k, f in EXTREMES.items()
        for dtype in dtypes
    }
    step = step_of(name)
    for kind in EXTREMES.values():
        now, state = params, init(name, params)
        g = {
            k: jnp.asarray(kind(jnp.finfo(w.dtype)), w.dtype) for k, w in params.items()
        }
        for sign in (1, -1, -1, 1, 1):
            grads = {k: sign * x for k, x in g.items()}
            now, state = step(lr, grads, state, now)
            check_valid(now)
            assert all_finite(state)
        for k, w in now.items():
            old, new = (np.asarray(x, np.float64) for x in (params[k], w))
            if name != "b1_floor":  # without a floor no sign changes
                assert np.all((np.sign(new) == np.sign(old)) | (new == 0)), k


def next_to_largest(dtype):
    """Where weights end: a rounding of ``w + u`` may add half a unit to it."""
    return float(jnp.nextafter(jnp.finfo(dtype).max, jnp.zeros((), dtype)))


@pytest.mark.parametrize("p_scale", [3.0, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_madam
def test_no_weight_is_rounded_beyond_its_dtype(name, dtype, p_scale):
    """An update that leads to the largest number may, rounded, lead past it."""
    rng = np.random.default_rng(0)
    w = rng.choice([-1, 1], 3000) * rng.uniform(0.01, 1, 3000)
    params = jnp.asarray(w * float(jnp.finfo(dtype).max), dtype)
    if name in GRIDS:  # which have a largest value
        p_scale = min(p_scale, 1e38)
    make = partial(MADAMS[name], p_scale=p_scale)
    step, tx = jitted(make), make(1.0)
    state = tx.init(params)
    for i in range(5):
        grads = jnp.asarray(rng.standard_normal(3000), jnp.float32)
        grads = jnp.where(rng.random(3000) < 0.1, [jnp.nan, jnp.inf, 0][i % 3], grads)
        params, state = step(1.0, grads, state, params)
        assert all_finite((params, state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("p_scale", [3.0, np.inf])
def test_weights_cross_the_whole_dtype_in_two_steps(dtype, p_scale):
    """With a floor a weight may go from one end to the other, which is twice max."""
    largest = next_to_largest(dtype)
    w = jnp.asarray([largest, -largest], dtype)
    tx = madax.madam(1e30, floor=1.0, p_scale=p_scale)
    g, state = jnp.asarray([1.0, -1.0], dtype), tx.init(w)
    seen = [w]
    for _ in range(2):
        w, state = jitted_step(tx, g, w, state)
        seen.append(w)
    got = np.asarray(jnp.stack(seen), np.float64)
    np.testing.assert_array_equal(got, np.array([[1, -1], [0, 0], [-1, 1]]) * largest)


@pytest.mark.parametrize("make", [madax.bbit_madam, madax.lns_madam])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_grid_that_reaches_beyond_the_dtype_ends_with_it(make, dtype):
    largest = next_to_largest(dtype)
    w = jnp.asarray([largest, -largest, largest / 4], dtype)
    tx = make(0.1)
    state = tx.init(w)
    assert all_finite(state)
    outwards = -jnp.sign(w)
    for _ in range(20):
        w, state = jitted_step(tx, outwards, w, state)
        assert all_finite(w)
    np.testing.assert_array_equal(
        np.asarray(w[:2], np.float64), np.array([largest, -largest])
    )
    before = w
    w, state = jitted_step(tx, -outwards, w, state)
    assert np.all(np.abs(np.asarray(w, np.float64)) < np.abs(np.float64(before)))


@pytest.mark.parametrize("floor", [1e10, 1e30, 3e38])
def test_a_floor_beyond_all_floats_is_the_largest(floor):
    w = jnp.float32([1e30, -1e30, 0.0])
    tx = madax.madam(LR, floor=floor)
    state = tx.init(w)
    for g in ([0.0, 0.0, 0.0], [1.0, 0.0, np.nan], [0.0, -1.0, 1.0]):
        w, state = jitted_step(tx, jnp.float32(g), w, state)
        assert all_finite((w, state))


# --- an optimizer inside that is not robust itself ------------------------------------


def wrapped_steps(tx, params, state, gs):
    for g in gs:
        params, state = jitted_step(tx, g, params, state)
    return params, state


@every_poison
def test_moments_of_adam_that_are_lost_freeze_their_codes_and_no_others(poison):
    """What the wrapper promises: codes are valid. It cannot mend Adam's moments."""
    params = {k: w for k, w in mixed().items() if is_quantized(w)}
    masks = where_bad("element", params)
    tx = adam()
    params, state = wrapped_steps(tx, params, tx.init(params), [gradients(0, params)])
    clean = bad = params
    clean_state = bad_state = state
    for seed in range(1, 6):
        g = gradients(seed, params)
        fault = poisoned(g, masks, poison) if seed < 3 else g
        clean, clean_state = wrapped_steps(tx, clean, clean_state, [g])
        bad, bad_state = wrapped_steps(tx, bad, bad_state, [fault])
        check_valid(bad)
        for k, mask in masks.items():
            now = arrays(bad)[k]
            np.testing.assert_array_equal(now[mask], arrays(params)[k][mask])
            np.testing.assert_array_equal(now[~mask], arrays(clean)[k][~mask])
    assert not all_finite(bad_state.inner_state)


@functools.cache
def adam():
    return madax.with_quantized_params(optax.adam(0.05))


@functools.cache
def guarded_adam():
    inner = optax.apply_if_finite(optax.adam(0.05), max_consecutive_errors=10)
    return madax.with_quantized_params(inner)


@pytest.mark.parametrize("where", ["element", "leaf", "all"])
def test_adam_recovers_with_apply_if_finite_inside_the_wrapper(where):
    """Not around it: updates of codes have another structure than gradients."""
    params = mixed()
    masks = where_bad(where, params)
    tx = guarded_adam()
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
