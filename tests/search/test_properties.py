"""Properties of every weight and gradient, searched for counter-examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import madax

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond p_scale")

SIZE, STEPS = 8, 5


def float32s(low, high):
    """Arrays of zeros and numbers of either sign, log-uniform in magnitude."""

    def rows(*shape):
        logs = st.floats(np.log(low), np.log(high))
        signs = hnp.arrays(np.float32, shape, elements=st.sampled_from([-1, 0, 1]))
        sizes = hnp.arrays(np.float64, shape, elements=logs)
        return st.builds(lambda s, x: s * np.float32(np.exp(x)), signs, sizes)

    return rows


weights = float32s(1e-4, 1e4)(SIZE)
non_zero_weights = weights.filter(np.any)
gradients = float32s(1e-6, 1e6)(STEPS, SIZE)
rates = st.floats(1e-4, 0.5)
powers_of_two = st.integers(-20, 20).map(lambda k: 2.0**k)


# One compilation for all examples: the hyperparameters are arguments.
@functools.partial(jax.jit, static_argnames=("zero_init_scale", "dtype"))
def run(
    w, grads, lr=0.01, p_scale=3.0, floor=0.0, zero_init_scale=0.1, dtype=jnp.float32
):
    """The weights before the first step and after each."""
    tx = madax.madam(lr, p_scale=p_scale, floor=floor, zero_init_scale=zero_init_scale)

    def step(carry, g):
        w, state = carry
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    w = w.astype(dtype)
    _, after = jax.lax.scan(step, (w, tx.init(w)), grads)
    return jnp.concatenate([w[None], after])


def values(x):
    return np.asarray(x, np.float64)


@given(w=non_zero_weights, grads=gradients, lr=rates)
def test_without_a_floor_signs_and_zeros_never_change(w, grads, lr):
    signs = np.sign(values(run(w, grads, lr)))
    np.testing.assert_array_equal(signs, np.broadcast_to(np.sign(w), signs.shape))


@given(
    w=non_zero_weights,
    grads=gradients,
    lr=rates,
    c=powers_of_two,
    floor=st.sampled_from([0.0, 0.5]),
)
@example(  # the largest is a power of two
    w=np.float32([-0.22139375, -0.02351775, -1, 0, 0, 0, 0, 0]),
    grads=np.ones((STEPS, SIZE), np.float32),
    lr=0.5,
    c=2.0,
    floor=0.0,
)
def test_scaled_weights_take_the_scaled_trajectory(w, grads, lr, c, floor):
    c = np.float32(c)
    one, other = run(w, grads, lr, floor=floor), run(w * c, grads, lr, floor=floor)
    np.testing.assert_array_equal(other, one * c)


@given(w=weights, grads=gradients, lr=rates, c=powers_of_two)
def test_scaled_gradients_take_the_same_trajectory(w, grads, lr, c):
    c = np.float32(c)
    np.testing.assert_array_equal(run(w, grads * c, lr), run(w, grads, lr))


@given(
    w=weights,
    grads=gradients,
    lr=rates,
    p_scale=st.floats(0.01, 4),
    floor=st.sampled_from([0.0, 1.0]),
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_stay_within_the_bound(dtype, w, grads, lr, p_scale, floor):
    w = np.clip(w, -1e3, 1e3)  # the range of float16
    steps = values(run(w, grads, lr, p_scale, floor, dtype=dtype))
    bound = p_scale * oracle.first_rms(steps[0])[0]
    # u and w + u are rounded, each relative to the larger of weight and bound, and
    # subnormal numbers as the least normal one.
    info = jnp.finfo(dtype)
    eps, least = 2 * float(info.eps), max(bound, float(info.tiny))
    rounding = eps * np.maximum(np.abs(steps[:-1]), least)
    assert np.all(np.abs(steps[1:]) <= bound + rounding)
    assert np.all(np.abs(steps[-1]) <= bound + eps * least)


@given(w=non_zero_weights, u=weights, p_scale=st.floats(0.1, 10))
@example(w=np.float32([1] * 8), u=np.float32([1e-9] * 8), p_scale=3.0)
def test_updates_within_the_bound_pass_bit_for_bit(w, u, p_scale):
    tx = madax.clip_log_weights(p_scale)
    got, _ = tx.update(u, tx.init(w), w)
    bound = p_scale * oracle.first_rms(w)[0]
    inside = np.abs(values(w) + values(u)) < bound * (1 - 1e-6)
    np.testing.assert_array_equal(np.asarray(got)[inside], u[inside])


@given(grads=gradients, lr=rates)
def test_leaves_of_zeros_move_by_default_and_in_the_paper_never(grads, lr):
    zeros = np.zeros(SIZE, np.float32)
    after = values(run(zeros, grads, lr))
    first = np.clip(-0.1 * lr * np.sign(grads[0]), -0.3, 0.3)
    np.testing.assert_allclose(after[1], first, rtol=1e-6)
    assert not np.any(run(zeros, grads, lr, zero_init_scale=0.0))
