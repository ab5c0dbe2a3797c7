"""B-bit Madam and LNS-Madam, code for code against integers in plain NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import trajectory

import madax
from madax import LogFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS, SIZE = 1000, 60


class IntegerMadam:
    """Weights are sign * bound * exp(-n * spacing), with whole n in 0 .. magnitudes-1.

    v = 0.999 v + 0.001 g^2,  g_hat = clip(g / sqrt(v / (1 - 0.999^t)), -10, 10)
    n = clip(n + round(k g_hat) sign, 0, magnitudes - 1)

    Codes start at the nearest n. Floats start where they are, so that their first step
    ends at the grid point that is nearest to where it leads.
    """

    def __init__(self, w0, magnitudes, spacing, storage):
        rms = np.sqrt(np.mean(np.square(w0)))
        self.bound = max(3 * rms, np.max(np.abs(w0)))
        self.sign = np.sign(w0)
        self.n = list(-np.log(np.abs(w0) / self.bound) / spacing)
        if storage == "codes":
            self.n = [min(max(round(n), 0), magnitudes - 1) for n in self.n]
        self.magnitudes, self.v, self.t = magnitudes, np.zeros(len(w0)), 0

    def steps(self, g, k):
        """Where v would be, and the steps in codes before rounding."""
        v = 0.999 * self.v + 0.001 * np.square(g)
        v_hat = v / (1 - 0.999 ** (self.t + 1))
        g_hat = np.divide(g, np.sqrt(v_hat), where=v > 0, out=np.zeros_like(g))
        return v, k * np.clip(g_hat, -10, 10)

    def draw(self, rng, k):
        """A gradient of which no step is within 1e-3 of a tie, and its step."""
        g = rng.standard_normal(len(self.n)) * rng.choice([0, 1, 30], len(self.n))
        g = (g * 10.0 ** rng.uniform(-1, 1)).astype(np.float32).astype(np.float64)
        while True:
            v, steps = self.steps(g, k)
            tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-3
            if not np.any(tie):
                break
            g = np.where(tie, g * 1.01, g).astype(np.float32).astype(np.float64)
        self.v, self.t = v, self.t + 1
        moved = np.array(self.n) + steps * self.sign
        self.n = [min(max(round(n), 0), self.magnitudes - 1) for n in moved]
        return g, np.abs(moved % 1 - 0.5).min()


def model_run(magnitudes, spacing, k, storage):
    """First weights, gradients, and the model's n after every step."""
    for attempt in itertools.count():  # until no first weight, or step, is near a tie
        rng = np.random.default_rng(attempt)
        w0 = np.float32(rng.standard_normal(SIZE) * 0.1)
        model = IntegerMadam(w0.astype(np.float64), magnitudes, spacing, "floats")
        clear = np.abs(np.array(model.n) % 1 - 0.5).min()
        model = IntegerMadam(w0.astype(np.float64), magnitudes, spacing, storage)
        g, clear_after = model.draw(rng, k(0))
        if min(clear, clear_after if storage == "floats" else 1) > 0.02:
            break
    grads, codes = [g], [list(model.n)]
    for t in range(1, STEPS):
        grads.append(model.draw(rng, k(t))[0])
        codes.append(list(model.n))
    return w0, np.float32(grads), np.array(codes), model


def check(tx, fmt, magnitudes, spacing, k, storage):
    w0, grads, expected, model = model_run(magnitudes, spacing, k, storage)
    params = jnp.asarray(w0)
    if storage == "codes":
        params = madax.quantize_params(params, fmt, where=lambda path, w: True)
        codes = np.asarray(trajectory(tx, params, grads).codes, int)
        n = magnitudes - np.abs(codes)
        sign = np.sign(codes)
    else:
        w = np.asarray(trajectory(tx, params, grads), np.float64)
        exact = np.log(model.bound / np.abs(w)) / spacing
        n, sign = np.rint(exact), np.sign(w)
        assert np.abs(exact - n).max() < 1e-6 / spacing + 1e-3
    np.testing.assert_array_equal(sign, np.broadcast_to(model.sign, sign.shape))
    np.testing.assert_array_equal(n, expected)
    assert len(np.unique(expected)) > 50  # it did move


def falling(*rates):
    """A schedule of rates, each for a part of the steps; for JAX and for the model."""
    part = STEPS // len(rates)
    schedule = lambda t: jnp.array(rates)[jnp.minimum(t // part, len(rates) - 1)]
    return schedule, lambda t: rates[min(t // part, len(rates) - 1)]


BBIT = {
    # name: bits, base precision, learning rate in codes
    "8bit": (8, 1e-2, 1),
    "9bit_coarse": (9, 0.05, 2),
    "11bit_falling_below_one_code": (11, 1e-3, (16, 4, 0.3)),
}


@pytest.mark.parametrize("storage", ["floats", "codes"])
@pytest.mark.parametrize(("bits", "spacing", "rate"), BBIT.values(), ids=BBIT)
def test_bbit_madam_is_the_integer_model(bits, spacing, rate, storage):
    if isinstance(rate, tuple):
        schedule, model_rate = falling(*rate)
        learning_rate = lambda t: spacing * schedule(t)
        k = lambda t: max(1, round(model_rate(t)))
    else:
        learning_rate, k = rate * spacing, lambda t: rate
    tx = madax.papers.bbit_madam(learning_rate, bits=bits, base_step=spacing)
    fmt = LogFormat(bits + 1, spacing)
    assert fmt.levels == 2**bits - 1
    check(tx, fmt, 2**bits - 1, spacing, k, storage)


LNS = {
    "default": (16, 2048, 2**-7),
    "falling": (12, 100, (0.16, 0.037, 0.01)),
}


@pytest.mark.parametrize("storage", ["floats", "codes"])
@pytest.mark.parametrize(("bits", "gamma", "rate"), LNS.values(), ids=LNS)
def test_lns_madam_is_the_base_2_model(bits, gamma, rate, storage):
    """log2|w| in units of 1 / gamma octaves; a rate is in octaves."""
    fmt = LogFormat.from_gamma(bits, gamma)
    schedule, model_rate = falling(*rate) if isinstance(rate, tuple) else (rate, None)
    tx = madax.papers.lns_madam(schedule, format=fmt)
    magnitudes = 2 ** (bits - 1) - 1
    k = lambda t: gamma * (model_rate(t) if model_rate else rate)
    check(tx, fmt, magnitudes, np.log(2) / gamma, k, storage)


def test_defaults_are_the_papers():
    """12 bits of 0.001 nats and ten codes per step; base 2, 2**-7 octaves per step."""
    w = jnp.array([[1.0, -2.0, 0.5]])
    g = jnp.array([[3.0, 3.0, 0.0]])
    for tx, step in (
        (madax.papers.bbit_madam(), 0.01),
        (madax.papers.lns_madam(), 2**-7 * np.log(2)),
    ):
        updates, state = tx.update(g, tx.init(w), w)
        moved = np.log(np.abs(optax.apply_updates(w, updates) / w))
        grid = 0.001 if step == 0.01 else np.log(2) / 2048
        np.testing.assert_allclose(moved, [[-step, step, 0]], atol=0.51 * grid)
        again = optax.apply_updates(w, updates)
        updates, _ = tx.update(jnp.zeros_like(g), state, again)
        assert not np.any(updates)


@pytest.mark.parametrize("make", [madax.papers.bbit_madam, madax.papers.lns_madam])
def test_schedules_and_injected_rates(make):
    w, g = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([[3.0, -3.0, 1.0]])
    fixed = make(0.02)
    expected, _ = fixed.update(g, fixed.init(w), w)
    static = ("bits", "base_step") if make is madax.papers.bbit_madam else ()
    injected = optax.inject_hyperparams(make, static_args=static)(0.02)
    for tx in (make(lambda count: 0.02 / (1 + count)), injected):
        updates, _ = jax.jit(tx.update)(g, tx.init(w), w)
        np.testing.assert_allclose(updates, expected, rtol=1e-5)
    still = make(0.0)
    start = optax.apply_updates(w, expected)
    updates, _ = still.update(g, still.init(w), start)
    assert np.abs(updates).max() < 1e-6


@pytest.mark.parametrize("make", [madax.papers.bbit_madam, madax.papers.lns_madam])
def test_a_leaf_of_zeros_comes_onto_the_grid_and_moves(make):
    params = {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}
    tx = make(0.02)
    state = tx.init(params)
    for _ in range(20):
        updates, state = jax.jit(tx.update)(
            jax.tree.map(jnp.ones_like, params), state, params
        )
        params = optax.apply_updates(params, updates)
    assert np.all(np.asarray(params["b"]) < -1e-3)
    assert np.all(np.abs(params["b"]) <= 0.3)


@pytest.mark.parametrize("bits", [1, 15])
def test_the_widths_at_both_ends_are_taken(bits):
    w = jnp.ones((2, 2))
    state = madax.papers.bbit_madam(bits=bits, base_step=1e-3).init(w)
    assert state.count == 0
