"""Decoupled weight decay: AdamW's, in log-steps, on floats and on codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import formats
from helpers import is_quantized, mostly_nightly, normal, same, trajectory

import madax
from madax import LogFormat, SymlogFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

NARROW = list(formats("log8", "symlog8", "uniform8").values())
WIDE = list(formats("log16", "symlog16", "uniform16").values())
STEPS = 30


def zeros(params, steps=STEPS):
    shape = lambda w: jnp.zeros((steps, *w.shape))
    return jax.tree.map(shape, params, is_leaf=is_quantized)


# --- floats ---------------------------------------------------------------------------

OPTIONS = [{}, {"floor": 0.5}, {"floor": 1.0, "b1": 0.9, "p_scale": 2.0}]


@pytest.mark.parametrize("weight_decay", mostly_nightly([0.01, 4.0], 4.0))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_floats_follow_the_oracle(options, weight_decay):
    params = {
        "w": normal(40),
        "b": jnp.zeros(10),
        "dead": normal(10, seed=1).at[3].set(0),
    }
    grads = {k: normal(STEPS, *w.shape, seed=7) for k, w in params.items()}
    schedule = optax.cosine_decay_schedule(0.1, STEPS)
    tx = madax.madam(schedule, weight_decay=weight_decay, **options)
    got = trajectory(tx, params, grads)
    for name, w0 in params.items():
        model = oracle.Madam(w0, schedule, weight_decay=weight_decay, **options)
        want = np.stack([model.step(g) for g in grads[name]])
        size = np.maximum(np.abs(want), oracle.first_rms(w0)[0])
        assert np.max(np.abs(got[name] - want) / size) < 1e-5, name
        without = oracle.Madam(w0, schedule, **options)
        want_without = np.stack([without.step(g) for g in grads[name]])
        assert np.max(np.abs(want_without - want) / size) > 1e-3  # it is there


@pytest.mark.parametrize("floor", [0.0, 1e9])
def test_the_decay_matches_adamw(floor):
    """Decay is exact where steps add, and equals many small steps elsewhere."""
    w, rate, weight_decay = normal(100), 0.01, 0.2
    tx = madax.madam(rate, floor=floor, weight_decay=weight_decay)
    got = trajectory(tx, w, zeros(w))[-1] / w
    adamw = (1 - rate * weight_decay) ** STEPS
    want = adamw if floor else np.exp(-rate * weight_decay * STEPS)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got, adamw, rtol=1e-4)


# --- codes ----------------------------------------------------------------------------


def relative_steps(fmt, codes):
    """w / (dw/dd) by differences of decoded values in float64."""
    n = 2 ** (fmt.bits - 1) - 1
    c = np.asarray(codes, np.float64)
    if isinstance(fmt, SymlogFormat):
        theta = c * np.arcsinh(1 / fmt.linear_range) / n
        value = lambda d: fmt.linear_range * np.sinh(theta + d)
    else:  # a log-step multiplies
        size = (
            np.exp(fmt.base_step * (np.abs(c) - n)) if isinstance(fmt, LogFormat) else 1
        )
        value = lambda d: np.sign(c) * size * np.exp(np.sign(c) * d)
    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    return np.divide(value(0), slope, where=slope != 0, out=np.zeros_like(c))


@pytest.mark.parametrize("fmt", NARROW + WIDE, ids=repr)
def test_the_relative_step_of_a_format(fmt):
    codes = np.unique(np.linspace(-fmt.levels, fmt.levels, 255).astype(int))
    got = fmt.relative_step(jnp.asarray(codes, fmt.storage_dtype))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, relative_steps(fmt, codes), atol=2e-7, rtol=2e-6)


@pytest.mark.parametrize("fmt", WIDE, ids=repr)
def test_a_step_of_codes_follows_the_formula(fmt):
    q, g = madax.quantize_params(normal(20, 20), fmt), normal(20, 20, seed=1)
    rate, weight_decay = 0.05, 0.7
    tx = madax.madam(rate, weight_decay=weight_decay, rounding="nearest")
    updates, _ = tx.update(g, tx.init(q), q)
    codes = np.asarray(q.codes, np.float64)
    d = -rate * (np.sign(g) + weight_decay * relative_steps(fmt, codes))
    if isinstance(fmt, LogFormat | SymlogFormat):
        steps = d / fmt.base_step
    else:
        steps = np.where(codes == 0, d, codes * np.expm1(np.sign(codes) * d))
    room = np.abs(codes + steps) < fmt.levels - 1
    if isinstance(fmt, LogFormat):
        room &= np.sign(codes) * (codes + steps) > 1
    assert np.mean(room) > 0.9
    error = np.abs(np.asarray(updates.codes) - steps)[room]
    assert np.max(error) < 0.51


@pytest.mark.parametrize("channel_axis", [None, -1])
@pytest.mark.parametrize("fmt", NARROW[:2], ids=repr)
def test_codes_decay_by_the_same_share(fmt, channel_axis):
    """They decay on average, though a step is a fraction of a code."""
    w = normal(64, 64)
    w = jnp.sign(w) * jnp.clip(jnp.abs(w), 0.5, 2)  # no code near the smallest
    q = madax.quantize_params(w, fmt, channel_axis=channel_axis)
    tx = madax.madam(0.01, weight_decay=0.5)
    after = jax.tree.map(lambda x: x[-1], trajectory(tx, q, zeros(q, 100)))
    share = jnp.sum(after.dequantize() * w) / jnp.sum(q.dequantize() * w)
    np.testing.assert_allclose(share, np.exp(-0.5), rtol=0.01)


def test_zero_codes_stay_and_nothing_crosses_zero():
    for fmt in NARROW:
        q = madax.quantize_params(normal(30, 30).at[0].set(0), fmt)
        tx = madax.madam(1.0, weight_decay=0.1, rounding="nearest")
        after = jax.tree.map(lambda x: x[-1], trajectory(tx, q, zeros(q)))
        assert np.all(np.asarray(after.codes) * np.asarray(q.codes, int) >= 0)
        assert not np.any(after.codes[0])


# --- where it is, and where it is not -------------------------------------------------


def mixed():
    params = {"w": normal(8, 6), "b": normal(6, seed=1), "codes": normal(8, 6, seed=2)}
    where = lambda path, leaf: path == "codes"
    params = madax.quantize_params(params, SymlogFormat(16), where=where)
    grads = {"w": normal(3, 8, 6, seed=3), "b": normal(3, 6), "codes": normal(3, 8, 6)}
    return params, grads


def test_no_decay_costs_nothing():
    """Without decay, the program has nothing of it."""
    params, grads = mixed()
    g = jax.tree.map(lambda g: g[0], grads)
    programs = []
    for options in ({}, {"weight_decay": 0.0}, {"weight_decay": 0.1}):
        tx = madax.madam(0.01, **options)
        lowered = jax.jit(tx.update).lower(g, tx.init(params), params)
        programs.append(lowered.as_text())
    assert programs[0] == programs[1] != programs[2]


MASKS = {
    "tree": {"w": True, "b": False, "codes": True},
    "rank": lambda params: jax.tree.map(
        lambda w: w.ndim > 1, params, is_leaf=is_quantized
    ),
}


def test_a_mask_says_which_leaves_decay():
    params, grads = mixed()
    last = lambda tx: jax.tree.map(lambda x: x[-1], trajectory(tx, params, grads))
    none, all_ = (last(madax.madam(0.1, weight_decay=x)) for x in (0, 0.5))
    for name in params:
        first = [jax.tree.leaves(after[name])[0] for after in (none, all_)]
        assert np.any(np.asarray(first[0] != first[1]))
    for mask in MASKS.values():
        some = last(madax.madam(0.1, weight_decay=0.5, mask=mask))
        same(some, all_ | {"b": none["b"]})


OF_CODES = {
    "codes": lambda t: jax.tree.map(is_quantized, t, is_leaf=is_quantized),
    "path": lambda t: jax.tree_util.tree_map_with_path(
        lambda k, _: k[-1].key != "b", t
    ),
    "map": lambda t: jax.tree.map(lambda w: w.ndim > 1, t),
}


@pytest.mark.parametrize("make", [madax.madam, madax.muon, madax.muon_madam])
@pytest.mark.parametrize("name", OF_CODES)
def test_a_mask_of_codes_is_the_same_in_init_and_in_steps(name, make):
    """A function may ask for the type of a leaf, go by path, or look into codes."""
    codes = madax.quantize_params(normal(4, 4), madax.SymlogFormat(16))
    params = {"codes": codes, "b": jnp.ones(4)}
    grads = jax.tree.map(jnp.ones_like, madax.dequantize_params(params))
    expected = {"codes": True, "b": False}

    def moved(mask):
        tx = make(0.02, weight_decay=0.5, mask=mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        return {"codes": updates["codes"].codes, "b": updates["b"]}

    masks = [OF_CODES[name]]
    if name == "map":
        masks.append(masks[0](params))
    for mask in masks:
        same(moved(mask), moved(expected))
    for other, k in ((None, "b"), ({"codes": False, "b": False}, "codes")):
        assert np.any(moved(other)[k] != moved(expected)[k])


@pytest.mark.parametrize("make", [madax.madam, madax.muon, madax.muon_madam])
def test_a_mask_that_does_not_fit_is_named(make):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    for mask in ({"w": True}, {"w": True, "b": [True, False]}, lambda t: {"a": True}):
        with pytest.raises(ValueError, match="mask must be a tree of booleans like"):
            make(0.02, weight_decay=0.1, mask=mask).init(params)


def test_decay_can_be_injected_and_changed_by_hand():
    params, grads = mixed()
    g = jax.tree.map(lambda g: g[0], grads)
    tx = optax.inject_hyperparams(madax.madam, static_args="mask")(
        optax.linear_schedule(0.1, 0.0, 5), weight_decay=0.1, mask=MASKS["rank"]
    )
    state = tx.init(params)
    for weight_decay in (0.0, 0.5):
        state.hyperparams["weight_decay"] = jnp.float32(weight_decay)
        updates, _ = jax.jit(tx.update)(g, state, params)
        plain = madax.madam(0.1, weight_decay=weight_decay, mask=MASKS["rank"])
        expected, _ = jax.jit(plain.update)(g, plain.init(params), params)
        np.testing.assert_array_equal(updates["codes"].codes, expected["codes"].codes)
        for k in ("w", "b"):
            np.testing.assert_allclose(updates[k], expected[k], rtol=1e-6)


def test_decay_of_the_gradient_is_normalised_away():
    """The mistake to avoid: 1e-6 and 0.1 do the same where there is no gradient."""
    w = normal(50)
    before = [
        trajectory(
            optax.chain(optax.add_decayed_weights(x), madax.madam(0.01)), w, zeros(w)
        )
        for x in (1e-6, 0.1)
    ]
    np.testing.assert_allclose(before[0], before[1], rtol=1e-5)
    np.testing.assert_allclose(before[0][-1] / w, np.exp(-0.01 * STEPS), rtol=0.03)
    decoupled = [
        trajectory(madax.madam(0.01, weight_decay=x), w, zeros(w))[-1]
        for x in (1e-6, 0.1)
    ]
    np.testing.assert_allclose(decoupled[0], w, rtol=1e-6)
    np.testing.assert_allclose(decoupled[1] / w, np.exp(-0.001 * STEPS), rtol=1e-5)


@pytest.mark.parametrize(
    "make", [madax.madam, madax.transforms.add_decayed_log_weights]
)
@pytest.mark.parametrize(
    ("value", "kind"), [(-0.1, ValueError), (np.nan, ValueError), ("0.1", TypeError)]
)
def test_a_wrong_weight_decay_is_refused(make, value, kind):
    with pytest.raises(kind, match=f"weight_decay .*got {value!r}.*pass a number"):
        make(weight_decay=value)
