"""What several test files need: steps, equality, float64, errors in full."""

import contextlib
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import madax


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


def without_keys(tree):
    """The tree with the numbers that its random keys are made of."""
    is_key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def same(a, b):
    """Asserts that trees have the same values, of the same dtypes."""

    def check(x, y):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_array_equal(x, y)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(check, without_keys(a), without_keys(b))


def different(a, b):
    """The paths of leaves whose bits differ; NaN and the sign of zero count, too."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    )
    return [
        jax.tree_util.keystr(path)
        for (path, x), y in leaves
        if x.dtype != y.dtype
        or x.shape != y.shape
        or np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]


def step(tx, grads, state, params):
    """One step: the parameters and the state after it."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def trajectory(tx, params, grads):
    """The parameters after every step of a scan over stacked gradients, stacked."""

    def one(carry, g):
        carry = step(tx, g, carry[1], carry[0])
        return carry, carry[0]

    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    return jax.jit(lambda p, g: jax.lax.scan(one, (p, tx.init(p)), g)[1])(params, grads)


def moment_values(state):
    """The trees v and m of a state of ``scale_by_second_moment``, as floats."""
    if state.window is None:
        return state.nu, state.mu
    ((name, window),) = state.window.items()
    mantissa = int(re.search(r"bits=(\d+)", name)[1]) - 6

    def decode(tree, octave_of, unit):
        leaves, treedef = jax.tree.flatten(tree)
        octaves = [int(x) - 127 for x in window.octave.reshape(-1)]
        values = [
            unit * np.sign(c) * oracle.decode_moment(np.abs(c), octave_of(o), mantissa)
            for c, o in zip(map(np.int64, leaves), octaves, strict=True)
        ]
        return treedef.unflatten(values)

    m = None if state.mu is None else decode(state.mu, oracle.octave_of_m, 1)
    return decode(state.nu, lambda octave: octave, float(window.scale)), m


@contextlib.contextmanager
def long_run():
    """Compiles well what runs for long, also where the rest is compiled quickly."""
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", quick)


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


FLAX = tuple(int(n) for n in re.findall(r"\d+", flax.__version__)[:2])
# Since then there are nnx.List, parameters that are sharded as they are made, and
# updates of a model by its optimizer.
needs_flax_0_12 = pytest.mark.skipif(FLAX < (0, 12), reason="Flax is older than 0.12")

needs_hijax = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="hijax types were not whole yet"
)


def run_examples(page):
    """Runs a page's blocks of Python one after the other, as if pasted; the names."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    return names
