"""The fast elementary functions against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import enable_x64

from madax._core import numerics
from madax._core.numerics import (
    arcsinh,
    exp,
    expm1,
    log,
    log1p,
    minus_product,
    plus_product,
    round_to_int,
    sinh,
    within,
)

POSITIVE = np.concatenate([np.logspace(-37, 38, 1_000_001), np.linspace(0.5, 2, 10**6)])
SMALL = np.concatenate([np.linspace(-1, 1, 1_000_001), np.logspace(-37, 0, 100_001)])
WIDE = np.concatenate([np.linspace(-86, 86, 1_000_001), SMALL, -np.logspace(-37, 1)])
POINTS = {
    "exp": WIDE,
    "expm1": np.concatenate([WIDE, [-87, 88]]),
    "fast_expm1": WIDE[np.abs(WIDE) <= 80],
    "sinh": WIDE,
    "log": POSITIVE,
    "log1p": np.concatenate([POSITIVE, SMALL[SMALL > -1]]),
    "arcsinh": np.concatenate([SMALL, np.logspace(-1, 18, 100_001)]),
}


@pytest.mark.parametrize("name", POINTS)
def test_functions_are_exact_to_float32(name):
    x = POINTS[name].astype(np.float32)
    expected = getattr(np, name.removeprefix("fast_"))(x.astype(np.float64))
    np.testing.assert_allclose(jax.jit(getattr(numerics, name))(x), expected, rtol=3e-7)


@pytest.mark.parametrize("name", POINTS)
def test_float64_uses_the_functions_of_jax(name):
    with enable_x64():
        x = jnp.linspace(0.1, 2, 101, dtype=jnp.float64)
        y = getattr(numerics, name)(x)
    assert y.dtype == np.float64
    expected = getattr(np, name.removeprefix("fast_"))(np.asarray(x))
    np.testing.assert_allclose(y, expected, rtol=1e-14)


def test_products_are_rounded_before_they_are_added():
    a, b, c = np.random.default_rng(0).normal(size=(3, 10_007)).astype(np.float32)
    for door, expected in ((plus_product, c + a * b), (minus_product, c - a * b)):
        np.testing.assert_array_equal(jax.jit(door)(c, a, b), expected)
    assert plus_product(1, 2.0, 3.0) == minus_product(13, 3.0, 2.0) == 7


def test_within_is_a_clip():
    x = jnp.array([-np.inf, -3.0, -1.0, 0.5, 2.0, 7.0, np.inf])
    for low, high in ((-1, 2), (x - 1, x + 1), (3.0, 2.0)):
        np.testing.assert_array_equal(
            jax.jit(within)(x, low, high), jnp.clip(x, low, high)
        )


def test_functions_saturate_where_others_overflow():
    x = jnp.array([-3e38, -100.0, 0.0, 100.0, 3e38], jnp.float32)
    y = np.asarray(expm1(x))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[:3], [-1, -1, 0])
    assert (y[3:] > 1e38).all()
    assert np.isfinite(np.asarray(exp(x))).all() and exp(x)[2] == 1
    assert np.isfinite(np.asarray(sinh(x))).all() and sinh(x)[2] == 0
    assert np.asarray(arcsinh(x))[[0, 2, 4]].tolist() == [
        -arcsinh(x)[4],
        0,
        arcsinh(x)[4],
    ]
    assert 42 < arcsinh(x)[4] < 90


def test_logarithms_of_nothing_are_finite():
    assert -89 < log(jnp.float32(0)) < -88
    assert -89 < log1p(jnp.float32(-1)) < -88
    assert log(jnp.float32(1)) == log1p(jnp.float32(0)) == 0


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
