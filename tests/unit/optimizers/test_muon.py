"""Muon in float64, on floats and on codes: additive steps along four directions."""

import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import is_quantized, mostly_nightly, normal, raises, trajectory
from oracle import newton_schulz

import madax
from madax import MomentFormat, SymlogFormat, muon

pytestmark = pytest.mark.usefixtures("quick_compiles")


def params():
    return {
        "Embed_0": {"embedding": normal(20, 8, seed=3)},
        "Dense_0": {"kernel": normal(8, 12), "bias": jnp.zeros(12)},
        "Dense_1": {"kernel": normal(12, 4, seed=1)},
    }


close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def repeated(g, count):
    return jax.tree.map(lambda x: np.broadcast_to(x, (count, *x.shape)), g)


def kernel_after(tx, tree, g, count):
    """The kernel after steps along one gradient, as floats."""
    moved = trajectory(tx, tree, repeated(g, count))
    w = jax.tree.map(lambda x: x[-1], moved)["up"]["kernel"]
    return np.float64(w.dequantize() if is_quantized(w) else w)


class Oracle:
    """Steps in float64, which know by name what a leaf is, and what decays."""

    def __init__(self, tree, weight_decay, b1=0.95, b2=0.99, other_b1=0.9):
        self.ws = jax.tree.map(np.float64, tree)
        self.mu, self.nu = (jax.tree.map(np.zeros_like, self.ws) for _ in range(2))
        self.b1, self.b2, self.other_b1, self.count = b1, b2, other_b1, 0
        self.weight_decay = weight_decay

    def look_ahead(self, mu, g, b1):
        mu += (1 - b1) * (g - mu)
        return b1 * mu + (1 - b1) * g

    def normalised(self, nu, g):
        nu += (1 - self.b2) * (g**2 - nu)
        return g / np.sqrt(nu / (1 - self.b2**self.count))

    def direction(self, name, mu, nu, g):
        if name == ("Dense_0", "kernel"):
            d = newton_schulz(self.look_ahead(mu, g, self.b1))
            return d * 0.2 / np.sqrt(np.mean(d**2))
        if name == ("Embed_0", "embedding") or self.other_b1 is None:
            return self.normalised(nu, g)
        if name == ("Dense_0", "bias"):
            self.normalised(nu, g)
            mu += (1 - self.other_b1) * (g - mu)
            unbiased = mu / (1 - self.other_b1**self.count)
            return unbiased / np.sqrt(nu / (1 - self.b2**self.count))
        # Of the last layer: rows and columns of the mean square, which is rank one.
        nu += (1 - self.b2) * (g**2 - nu)
        known = nu / (1 - self.b2**self.count)
        rows, columns = (known.mean(axis, keepdims=True) for axis in (1, 0))
        g = g / np.sqrt(rows * columns / known.mean())
        return self.look_ahead(mu, g, self.other_b1)

    def step(self, grads, rate, other_rate):
        self.count += 1

        def next_weight(path, w, mu, nu, g):
            name = tuple(key.key for key in path)
            d = self.direction(name, mu, nu, np.float64(g))
            if w.ndim > 1:
                d = d + self.weight_decay * w
            return w - (rate if name == ("Dense_0", "kernel") else other_rate) * d

        self.ws = jax.tree_util.tree_map_with_path(
            next_weight, self.ws, self.mu, self.nu, grads
        )
        return self.ws


@pytest.mark.parametrize("other_b1", [0.9, None])
@pytest.mark.parametrize("has_second", [False, True])
def test_floats_take_the_steps_of_float64(has_second, other_b1):
    start, rate = params(), optax.linear_schedule(0.1, 0.02, 4)
    second = optax.linear_schedule(0.3, 0.0, 6) if has_second else None
    mask = lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree)
    options = {"other_b1": other_b1, "weight_decay": 0.5}
    tx = muon(rate, other_learning_rate=second, mask=mask, **options)
    oracle = Oracle(start, **options)
    grads = jax.tree.map(lambda w: normal(5, *w.shape, seed=2), start)
    found = trajectory(tx, start, grads)
    for i in range(5):
        g, now = (jax.tree.map(operator.itemgetter(i), x) for x in (grads, found))
        jax.tree.map(close, now, oracle.step(g, rate(i), (second or rate)(i)))


def test_each_matrix_has_one_moment_of_its_size():
    start = params()
    sizes = [x.size for x in jax.tree.leaves(muon().init(start)) if x.size >= 12]
    # Two of the bias, and two vectors of the last layer, of which one has 12 elements.
    assert sorted(sizes) == [12, 12, 12, 48, 96, 160]


@pytest.mark.parametrize("b1", [0.95, None])
@pytest.mark.parametrize("name", ["up", "head", "table"])
def test_a_state_of_any_part_alone_can_be_donated(name, b1):
    start = {name: {"kernel": normal(8, 8)}}
    tx = muon(0.1, b1=b1, moment_format=MomentFormat(8))
    update = jax.jit(tx.update, donate_argnums=(1, 2))
    updates, state = update(start, tx.init(start), jax.tree.map(jnp.copy, start))
    update(updates, state, jax.tree.map(jnp.copy, start))


def test_a_last_layer_of_unknown_axes_has_a_second_moment_alone():
    start = {"up": {"kernel": normal(8, 8)}, "head": {"kernel": normal(4, 5, 6)}}
    assert "head" in str(madax.diagnostics.matrices(start)).splitlines()[1]
    g = {"up": normal(8, 8, seed=1), "head": normal(4, 5, 6, seed=1)}
    g = {name: {"kernel": x} for name, x in g.items()}
    tx = muon(0.1)
    updates, _ = tx.update(g, tx.init(start), start)
    # The first step along a second moment is a sign.
    close(updates["head"]["kernel"], -0.1 * np.sign(g["head"]["kernel"]))


def quantized(tree, bits=8):
    return madax.quantize_params(tree, SymlogFormat(bits, 1 / 3))


def slope(found, expected):
    """How far steps went along the expected ones, and four deviations of it."""
    fraction = np.sum(found * expected) / np.sum(expected**2)
    noise = np.std(found - fraction * expected) / np.sqrt(np.sum(expected**2))
    return fraction, 4 * noise


@pytest.mark.parametrize(("bits", "rate"), [(8, 1e-3), (16, 4e-6)])
def test_codes_take_the_same_steps_in_the_mean(bits, rate):
    codes = quantized({"up": {"kernel": normal(64, 64, scale=0.1)}}, bits)
    g = {"up": {"kernel": normal(64, 64, seed=1)}}
    floats = madax.dequantize_params(codes)
    before = np.float64(floats["up"]["kernel"])
    expected = kernel_after(muon(rate), floats, g, 40) - before
    fraction, noise = slope(kernel_after(muon(rate), codes, g, 40) - before, expected)
    assert abs(fraction - 1) < noise < 0.2
    # Steps of a fraction of the spacing are lost where sums are rounded to nearest.
    nearest = muon(rate, rounding="nearest")
    lost, _ = slope(kernel_after(nearest, codes, g, 40) - before, expected)
    assert lost < 0.7


def test_small_steps_of_bfloat16_are_kept_in_the_mean():
    start = {"up": {"kernel": jnp.ones((64, 64), jnp.bfloat16)}}
    g = {"up": {"kernel": normal(64, 64)}}
    tx = muon(0.002)  # A tenth of the spacing below 1.
    expected = kernel_after(tx, jax.tree.map(jnp.float32, start), g, 20) - 1
    fraction, noise = slope(kernel_after(tx, start, g, 20) - 1, expected)
    assert abs(fraction - 1) < noise < 0.1


def test_bfloat16_decays_by_the_rate_times_the_decay_in_the_mean():
    start = {"up": {"kernel": jnp.ones((64, 64), jnp.bfloat16), "bias": jnp.ones(64)}}
    tx = muon(0.02, weight_decay=0.1, mask={"up": {"kernel": True, "bias": False}})
    g = jax.tree.map(jnp.zeros_like, start)
    w = kernel_after(tx, start, g, 20)  # Each step is half the spacing below 1.
    np.testing.assert_allclose(np.mean(w), (1 - 0.002) ** 20, atol=4 * np.std(w) / 64)
    assert 0 < np.std(w) < 0.02


@pytest.mark.parametrize(("b1", "most"), [(0.95, 2.05), (None, 1.15)])
def test_bytes_of_a_parameter(b1, most):
    codes = quantized({"up": {"kernel": normal(256, 128)}})
    state = jax.eval_shape(muon(b1=b1, moment_format=MomentFormat(8)).init, codes)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((codes, state)))
    assert most - 0.15 < kept / 256 / 128 < most


def test_two_bytes_follow_float32_for_a_hundred_steps():
    start = {"up": {"kernel": normal(16, 16)}, "out": {"kernel": normal(16, 4)}}
    x, y = normal(64, 16, seed=2), normal(64, 4, seed=3)

    def loss(tree):
        hidden = jnp.tanh(x @ tree["up"]["kernel"] / 4)
        return jnp.mean((hidden @ tree["out"]["kernel"] / 4 - y) ** 2)

    tx = muon(optax.linear_schedule(0.05, 0.0, 100), moment_format=MomentFormat(8))

    @jax.jit
    def run(tree):
        def body(carry, _):
            tree, state = carry
            value, grads = madax.value_and_grad(loss)(tree)
            updates, state = tx.update(grads, state, tree)
            return (optax.apply_updates(tree, updates), state), value

        return jax.lax.scan(body, (tree, tx.init(tree)), length=100)[1]

    floats, codes = run(start), run(quantized(start))
    assert floats[-1] < 0.6 * floats[0]
    assert codes[-1] < 1.1 * floats[-1]


def test_what_it_refuses():
    with raises(ValueError, "other_learning_rate", "-0.1"):
        muon(other_learning_rate=-0.1)
    with raises(ValueError, "weight_decay", "-1"):
        muon(weight_decay=-1)
    with raises(ValueError, "rounding", "'up'"):
        muon(rounding="up")
    with raises(ValueError, "direction", "'rows'"):
        muon(direction="rows")
    start = params()
    with raises(TypeError, "state must be a MuonState"):
        muon().update(start, madax.madam().init(start), start)
    with raises(ValueError, "params is None, but the update depends on the weights"):
        muon().update(start, muon().init(start))
    with raises(ValueError, "updates and params must have the same tree structure"):
        muon().update({"Dense_0": None}, muon().init(start), start)
    with raises(TypeError, "moment_format must be None or a MomentFormat", "got 8"):
        muon(moment_format=8)
    with raises(TypeError, "params['w'] has dtype float8", "use bfloat16 or wider"):
        muon().init({"w": jnp.ones((4, 4), jnp.float8_e4m3fn)})


OTHERS = {
    "b1": {"b1": None},
    "other_b1": {"other_b1": None},
    "moment_format": {"moment_format": MomentFormat(8)},
    "matrices": {"matrices": lambda path, leaf: None},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_that_was_made_with_other_arguments_is_refused(name):
    start = params()
    one, other = muon(), muon(**OTHERS[name])
    for tx, state in ((one, other.init(start)), (other, one.init(start))):
        with raises(ValueError, "the optimizer state was made", name, "call init"):
            tx.update(start, state, start)


@pytest.mark.parametrize("make", [madax.muon, madax.madam, madax.muon_madam])
@pytest.mark.parametrize("n", mostly_nightly([3, 8], 3))
def test_an_ensemble_takes_the_updates_of_its_members(make, n):
    """Also where updates leave jax.vmap before they are applied."""
    ws = normal(n, 8, 8)
    tx, quantize = make(0.02), lambda w: madax.quantize_params(w, SymlogFormat(8))
    params = jax.vmap(quantize)(ws)
    updates, _ = jax.vmap(tx.update)(ws, jax.vmap(tx.init)(params), params)
    together = optax.apply_updates(params, updates)
    assert together.scale.shape == params.scale.shape
    for i, w in enumerate(ws):
        alone = quantize(w)
        updates, _ = tx.update(w, tx.init(alone), alone)
        alone = optax.apply_updates(alone, updates)
        np.testing.assert_array_equal(together.dequantize()[i], alone.dequantize())
