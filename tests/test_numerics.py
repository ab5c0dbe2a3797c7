"""The fast elementary functions against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from madax._numerics import expm1, round_to_int


def test_expm1_is_exact_to_float32():
    x = np.concatenate(
        [
            np.linspace(-87, 88, 1_000_001),
            np.linspace(-1, 1, 1_000_001),
            np.logspace(-37, 1, 100_001),
            -np.logspace(-37, 1, 100_001),
        ]
    ).astype(np.float32)
    expected = np.expm1(x.astype(np.float64))
    np.testing.assert_allclose(jax.jit(expm1)(x), expected, rtol=3e-7)


def test_expm1_saturates():
    x = jnp.array([-1e30, -100.0, 0.0, 100.0, 1e30], jnp.float32)
    y = np.asarray(expm1(x))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[:3], [-1, -1, 0])
    assert (y[3:] > 1e38).all()


def test_round_to_int_is_exact_compiled_or_not():
    x = np.concatenate(
        [
            np.arange(-5000, 5000) / 4,
            np.random.default_rng(0).uniform(-(2**21), 2**21, 100_000),
            [2**22 - 1, -(2**22) + 1],
        ]
    ).astype(np.float32)
    expected = np.round(x).astype(np.int32)  # halves to even, too
    np.testing.assert_array_equal(round_to_int(x), expected)
    np.testing.assert_array_equal(jax.jit(round_to_int)(x), expected)
