"""What several test files need: formats, steps, float64, errors in full."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import madax
from madax import LogFormat, MomentFormat, SymlogFormat, UniformFormat
from madax.formats._second_moment_codec import SecondMomentCodec

FORMATS = {
    "log8": LogFormat.from_dynamic_range(8, 100),
    "log16": LogFormat.from_dynamic_range(16, 10_000),
    "symlog8": SymlogFormat(8, 1 / 3),
    "symlog16": SymlogFormat(16, 1e-3),
    "uniform8": UniformFormat(8),
    "uniform16": UniformFormat(16),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def formats(*names):
    """Some of them, by name."""
    return {name: FORMATS[name] for name in names}


def mostly_nightly(cases, *now):
    """The cases of a parametrized test, of which all but ``now`` wait for the night."""
    nightly = pytest.mark.nightly
    each = [case if isinstance(case, tuple) else (case,) for case in cases]
    now = [case if isinstance(case, tuple) else (case,) for case in now]
    return [pytest.param(*c, marks=() if c in now else nightly) for c in each]


def is_quantized(x):
    return isinstance(x, madax.QuantizedArray)


def normal(*shape, seed=0, scale=1.0):
    """Normal random numbers, float32."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def same(a, b):
    """Asserts that trees have the same values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_identical(a, b):
    """Asserts that trees have the same bits, NaN and signs of zero included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def step(tx, grads, state, params):
    """One step: the parameters and the state after it."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def moment_values(state):
    """The trees v and m of a state of ``scale_by_second_moment``, as floats."""
    if state.window is None:
        return state.nu, state.mu
    ((name, window),) = state.window.items()
    codec = SecondMomentCodec(MomentFormat(int(re.search(r"bits=(\d+)", name)[1])))
    octaves = list(window.octave.reshape(-1))

    def decode(tree, grid, unit):
        leaves, treedef = jax.tree.flatten(tree)
        codes = [np.asarray(x, np.int32) for x in leaves]
        values = [
            unit * np.sign(c) * np.asarray(grid(octave).value(jnp.abs(c)))
            for c, octave in zip(codes, octaves, strict=True)
        ]
        return treedef.unflatten(values)

    m = None if state.mu is None else decode(state.mu, codec.mu_grid, 1)
    return decode(state.nu, codec.nu_grid, np.float32(window.scale)), m


# It is compiled once for each optimizer and tree of shapes.
jitted_step = jax.jit(step, static_argnums=0)


def enable_x64(on: bool = True):
    """A context in which JAX has float64, or one that changes nothing."""
    if not on:
        return contextlib.nullcontext()
    # The name moved; in each half of jax 0.6 to 0.10, one of the two warns or is
    # missing.
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


REMEDY = r"\b(pass|use|call|take|train|split|leave|initialise|must be|must satisfy)\b"


def raises(kind, *parts):
    """An error of that kind which holds each part, in order, and says what to do."""
    pattern = ".*".join(map(re.escape, parts))
    return pytest.raises(kind, match=f"(?s)(?=.*{pattern}).*{REMEDY}")


# Since 0.12 there are nnx.List and updates of a model by its optimizer.
examples_of_flax = pytest.mark.skipif(
    not hasattr(nnx, "List"), reason="the examples are for Flax 0.12 or newer"
)


def run_examples(page):
    """Runs a page's blocks of Python one after the other, as if pasted; the names."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    return names
