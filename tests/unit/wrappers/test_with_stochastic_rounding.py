"""Any optimizer on weights in bfloat16: the mean of rounding, bytes, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import jitted_step, long_run, normal, raises, same

import madax
from madax import MomentFormat
from madax.wrappers import with_stochastic_rounding

EIGHT = MomentFormat(bits=8)


def halves(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def neighbours(x):
    """The numbers of bfloat16 next to float32 values, by their bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    low = (bits & 0xFFFF0000).view(np.float32)
    high = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
    return np.minimum(low, high), np.maximum(low, high)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 0.02])
def test_a_weight_is_rounded_to_a_neighbour_with_the_right_mean(size):
    w, g = halves(normal(64, 512)), normal(64, 512, seed=1)
    tx = with_stochastic_rounding(optax.sgd(size))
    after, _ = jitted_step(tx, g, tx.init(w), w)
    assert after.dtype == jnp.bfloat16
    exact = np.float64(np.asarray(w, np.float32)) - np.float64(np.float32(size)) * g
    after = np.asarray(after, np.float64)
    low, high = neighbours(exact)
    near = np.abs(exact) > 2 * np.abs(size * np.asarray(g))  # less than a factor of 2
    assert np.mean(near) > 0.9
    assert np.all((after == low) | (after == high) | ~near)
    # Rounding adds (high - exact) (exact - low) to the variance of an element.
    spacing = np.float64(high) - low
    sd = np.sqrt(np.sum((spacing**2 / 4)[near]))
    assert abs(np.sum((after - exact)[near])) < 4 * sd
    assert np.any(after != np.asarray(w, np.float64))


@pytest.mark.parametrize(
    ("make", "bytes_each"),
    [(optax.adam, 4), (lambda rate: optax.sgd(rate, 0.9), 3), (optax.lion, 3)],
    ids=["adam", "sgd", "lion"],
)
def test_bytes_of_a_parameter(make, bytes_each):
    params = {"w": jnp.ones((256, 256), jnp.bfloat16)}
    tx = with_stochastic_rounding(make(0.1), moment_format=EIGHT)
    arrays = jax.tree.leaves(jax.eval_shape(lambda p: (p, tx.init(p)), params))
    total = sum(x.size * x.dtype.itemsize for x in arrays)
    assert bytes_each <= total / 256**2 < bytes_each + 0.01


def test_float32_and_codes_take_the_steps_of_the_optimizer():
    codes = madax.quantize_params(normal(16, 16), madax.SymlogFormat(bits=8))
    params = {"half": halves(normal(8, 8)), "single": normal(8, 8), "codes": codes}
    inner = madax.with_quantized_params(optax.adam(0.1))
    grads = {k: normal(*x.shape, seed=2) for k, x in params.items()}
    wide = params | {"half": params["half"].astype(jnp.float32)}
    expected, state = jitted_step(inner, grads, inner.init(wide), wide)
    tx = with_stochastic_rounding(inner)
    after, mine = jitted_step(tx, grads, tx.init(params), params)
    for name in ("single", "codes"):
        same(after[name], expected[name])
    same(mine.inner_state, state)


def test_bad_use_is_named():
    tx = with_stochastic_rounding(optax.sgd(0.1))
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    with raises(ValueError, "params is None", "call update(grads, state, params)"):
        tx.update(params, tx.init(params))
    with raises(TypeError, "params['w'] has dtype float8", "use bfloat16 or wider"):
        tx.init({"w": jnp.ones((4, 4), jnp.float8_e4m3fn)})
    with raises(TypeError, "inner must be an optax.GradientTransformation"):
        with_stochastic_rounding("adam")
    with raises(TypeError, "moment_format must be None or a MomentFormat"):
        with_stochastic_rounding(optax.sgd(0.1), moment_format=8)
    with raises(TypeError, "state must be a WithStochasticRoundingState"):
        tx.update(params, optax.sgd(0.1).init(params), params)


# --- hundreds of steps ----------------------------------------------------------------

X = normal(256, 64)
Y = jnp.tanh(X @ normal(64, 64, seed=1, scale=0.2)) @ normal(64, 64, seed=2, scale=0.2)
START = {
    "in": normal(64, 64, seed=3, scale=0.1),
    "out": normal(64, 64, seed=4, scale=0.1),
    "bias": jnp.zeros(64),
}


def loss(params, x, y):
    return jnp.mean(
        (jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"] - y) ** 2
    )


def trained(tx, params, steps=400):
    """The loss, in float32, after steps on parts of the data."""

    @jax.jit
    def run(params):
        def one(carry, i):
            params, state = carry
            part = jax.lax.dynamic_slice_in_dim
            x, y = (part(a, 32 * (i % 8), 32) for a in (X, Y))
            grads = jax.grad(loss)(params, x, y)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(steps))[0][0]

    with long_run():
        params = run(params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return float(loss(wide, X, Y))


TRAINED = {
    "adamw": lambda rate: optax.adamw(rate(3e-3)),
    "sgd": lambda rate: optax.sgd(rate(1.0), momentum=0.9),
    "lion": lambda rate: optax.lion(rate(3e-4)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_as_in_float32(name):
    tx = TRAINED[name](lambda rate: optax.cosine_decay_schedule(rate, 400))
    in_float32, plain = trained(tx, START), trained(tx, halves(START))
    rounded = trained(with_stochastic_rounding(tx), halves(START))
    in_bytes = trained(with_stochastic_rounding(tx, moment_format=EIGHT), halves(START))
    assert max(rounded, in_bytes) < 1.02 * in_float32 < 1.05 * in_float32 < plain
