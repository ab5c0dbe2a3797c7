"""Sums over leaves that would overflow at once, against NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madax._core import sums
from madax.formats import _moment_codec

SHAPES = st.lists(st.integers(0, 2**20), max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 2**40))
def test_a_part_is_as_large_as_it_may_be(shape, most):
    axes = sums.part_axes(shape, most)
    assert axes == tuple(range(len(shape)))[len(shape) - len(axes) :]
    assert len(axes) <= 1 or math.prod(shape[i] for i in axes) <= most
    if len(axes) < len(shape):
        assert math.prod(shape[-len(axes) - 1 :]) > most


@given(SHAPES)
def test_sums_of_exponents_fit_and_keep_octaves(shape):
    parts = sums.part_axes(shape, _moment_codec._AT_ONCE)
    dropped = _moment_codec._dropped(shape)
    assert dropped <= 3
    assert math.prod(shape[i] for i in parts) * (255 >> dropped) < 2**31


@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 0, 3), (4, 5, 6)])
def test_a_fraction_in_parts_is_the_fraction_of_the_whole(shape, monkeypatch):
    condition = np.random.default_rng(0).integers(0, 2, shape) > 0
    expected = condition.mean() if condition.size else 0.0
    whole = sums.fraction(jnp.asarray(condition))
    monkeypatch.setattr(sums, "part_axes", lambda shape, most: (len(shape) - 1,))
    several = len(shape) > 1 and condition.size
    cut = sums.fraction(jnp.asarray(condition)) if several else whole
    assert whole.dtype == cut.dtype == jnp.float32
    np.testing.assert_allclose([whole, cut], expected, rtol=1e-6)
