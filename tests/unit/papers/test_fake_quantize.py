"""Simulated low precision: values on the grid, straight-through gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import formats
from helpers import mostly_nightly
from oracle import decode, encode

import madax
from madax import LogFormat, UniformFormat
from madax.papers import fake_quantize

pytestmark = pytest.mark.usefixtures("quick_compiles")

TESTED = formats("log8", "symlog8") | {
    "log4": LogFormat(4, 0.7),
    "uniform4": UniformFormat(4),
}
every_grid = pytest.mark.parametrize(
    "fmt", mostly_nightly(TESTED.values(), TESTED["log8"], TESTED["symlog8"])
)


def oracle(x, fmt):
    """The value on the grid, and whether x is within float32's accuracy of a tie."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(initial=0)
    code = encode(fmt, x / (scale or 1))
    return scale * decode(fmt, np.rint(code)), np.abs(np.abs(code) % 1 - 0.5) < 1e-3


def assert_on_grid(got, x, fmt, rtol=3e-6):
    expected, tie = oracle(x, fmt)
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got[~tie], expected[~tie], rtol=rtol)
    assert np.mean(tie) < 0.05


def example(shape=(9, 7), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    return jnp.asarray(x * (rng.random(shape) > 0.1), jnp.float32)


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
@every_grid
def test_values_are_on_the_grid_of_the_largest(fmt, size):
    x = example() * np.float32(size)
    y = fake_quantize(x, fmt)
    assert_on_grid(y, x, fmt)
    assert np.abs(y).max() == pytest.approx(np.abs(x).max(), rel=2e-6)
    zero = np.asarray(x) == 0
    assert np.all(np.asarray(y)[zero] == 0)
    if isinstance(fmt, LogFormat):
        np.testing.assert_array_equal(np.sign(y), np.sign(x))
    np.testing.assert_allclose(fake_quantize(y, fmt), y, rtol=1e-5)


@every_grid
def test_the_gradient_goes_straight_through_onto_the_other_grid(fmt):
    x, g = example(), example(seed=1)
    for backward in (None, *TESTED.values()):
        y, vjp = jax.vjp(lambda x: fake_quantize(x, fmt, backward_format=backward), x)  # noqa: B023
        (gx,) = vjp(g)
        assert_on_grid(y, x, fmt)
        if backward is None:
            np.testing.assert_array_equal(gx, g)
        else:
            assert_on_grid(gx, g, backward)


def test_none_leaves_values_or_gradients_alone():
    x, g = example(), example(seed=1)
    y, vjp = jax.vjp(lambda x: fake_quantize(x, None), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(vjp(g)[0], g)
    y, vjp = jax.vjp(
        lambda x: fake_quantize(x, None, backward_format=UniformFormat(4)), x
    )
    np.testing.assert_array_equal(y, x)
    assert_on_grid(vjp(g)[0], g, UniformFormat(4))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)], ids=str)
@every_grid
def test_every_shape_is_kept_and_zeros_stay_zero(fmt, shape):
    both = lambda x: fake_quantize(x, fmt, backward_format=fmt)

    @jax.jit
    def run(x, g):
        y, vjp = jax.vjp(both, x)
        return y, vjp(g)[0]

    for x in (jnp.zeros(shape), jnp.full(shape, -0.3)):
        for g in (jnp.zeros(shape), jnp.ones(shape)):
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=2e-6), run(x, g), (x, g)
            )


@every_grid
def test_narrow_dtypes_are_kept_and_computed_in_float32(fmt, dtype="bfloat16"):
    x = example().astype(dtype)
    y, vjp = jax.vjp(lambda x: fake_quantize(x, fmt, backward_format=fmt), x)
    (g,) = vjp(x)
    assert y.dtype == g.dtype == x.dtype
    wide = fake_quantize(x.astype(jnp.float32), fmt)
    np.testing.assert_array_equal(y, wide.astype(dtype))
    np.testing.assert_array_equal(g, wide.astype(dtype))


@every_grid
def test_jit_vmap_and_grad_change_nothing(fmt):
    x = example((5, 4, 3))
    fake = lambda x: fake_quantize(x, fmt, backward_format=fmt)
    loss = lambda x: jnp.sum(fake(x) ** 3)
    one = jnp.stack([fake(a) for a in x])
    grad = jax.jit(jax.grad(loss))
    grads = jnp.stack([grad(a) for a in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(fake))(x), one, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(loss)))(x), grads, rtol=1e-4, atol=1e-9
    )
    assert_on_grid(grads[2], 3 * np.float64(one[2]) ** 2, fmt, rtol=1e-5)
    # Formats are static: as closures, and as static arguments.
    jitted = jax.jit(fake_quantize, static_argnums=1, static_argnames="backward_format")
    np.testing.assert_allclose(jitted(x, fmt, backward_format=fmt), fake(x), rtol=1e-5)


def test_python_numbers_and_numpy_arrays():
    assert fake_quantize(0.7, TESTED["log8"]) == pytest.approx(0.7)
    x = np.asarray(example())
    assert_on_grid(fake_quantize(x, TESTED["log8"]), x, TESTED["log8"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_value_that_is_not_finite_makes_the_array_nan(bad):
    fmt = LogFormat.from_gamma(bits=8, gamma=8)
    x, g = jnp.ones(3), jnp.array([1.0, bad, 2.0])
    assert np.all(np.isnan(madax.papers.fake_quantize(g, fmt)))
    _, vjp = jax.vjp(
        lambda x: madax.papers.fake_quantize(x, fmt, backward_format=fmt), x
    )
    assert np.all(np.isnan(vjp(g)[0]))
