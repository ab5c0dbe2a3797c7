"""Codes have the same bits however a step is compiled, and floats all but the last.

XLA fuses a product and a sum into one operation that rounds once, or does not, by the
shape of an array; that is how a shard could come to train otherwise than the whole. So
steps are compiled with fusions and without, with optimisations and without, and for
pieces of all shapes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS, OPTIMIZERS
from helpers import different, enable_x64, jitted_step, mostly_nightly, step

import madax
from madax import SymlogFormat, UniformFormat
from madax._core import numerics

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond p_scale")

OTHERWISE = {
    "no_fusions": {"xla_disable_hlo_passes": "fusion"},
    "no_optimisations": {"xla_backend_optimization_level": 0},
}
compiled_otherwise = pytest.mark.parametrize(
    "how", mostly_nightly(OTHERWISE, "no_fusions")
)


def on_grid(fmt):
    """Madam on float leaves that are kept on a grid."""
    return optax.chain(
        madax.scale_by_second_moment(),
        optax.scale(-0.03),
        madax.scale_by_sign_log(),
        madax.clip_log_weights(),
        madax.papers.quantize_to_grid(fmt, rounding="nearest"),
    )


GRIDS = {
    "symlog_grid": on_grid(SymlogFormat(12, 0.1)),
    "uniform_grid": on_grid(UniformFormat(12)),
}


def compiled(f, *args, how=None):
    return jax.jit(f).lower(*args).compile(compiler_options=OTHERWISE.get(how, {}))


def random_numbers(*shape, seed=0):
    """Normal numbers times a size of their own each, over six decades."""
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=shape) * 10 ** rng.uniform(-3, 3, shape))


@compiled_otherwise
def test_other_compilers_round_a_product_before_a_sum_and_ours_does_not(how):
    a, b, c = random_numbers(3, 10_000)
    f, g = lambda a, b, c: a * b + c, lambda a, b, c: numerics.plus_product(c, a, b)
    twice_rounded = a * b + c
    assert not different(compiled(f, a, b, c, how=how)(a, b, c), twice_rounded)
    assert different(compiled(f, a, b, c)(a, b, c), twice_rounded)
    for compiler in (how, None):
        got = compiled(g, a, b, c, how=compiler)(a, b, c)
        assert not different(got, twice_rounded)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounded_is_the_identity(dtype):
    info = np.finfo(dtype)
    x = np.array([0.0, -0.0, 1.5, -2.5, info.tiny, info.max, info.min, np.inf, -np.inf])
    with enable_x64(dtype == np.float64):
        got = jax.jit(numerics.rounded)(jnp.asarray(x, dtype))
    assert got.dtype == dtype
    assert np.asarray(got).tobytes() == x.astype(dtype).tobytes()


FUNCTIONS = ("exp", "expm1", "log", "log1p", "sinh", "arcsinh")


@compiled_otherwise
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_same_bits_however_compiled(name, how):
    f, x = getattr(numerics, name), random_numbers(100_000)
    x = np.abs(x) if name.startswith("log") else np.clip(x, -80, 80)
    # What goes in may be a product, and what comes out a term of a sum.
    g, k = lambda x, k: f(x * k) + k, np.float32(0.7)
    got, expected = (compiled(g, x, k, how=h)(x, k) for h in (how, None))
    assert different(got, expected) == []


@compiled_otherwise
@pytest.mark.parametrize("name", mostly_nightly(FORMATS, "log16", "symlog16"))
def test_formats_have_the_same_bits_however_compiled(name, how):
    fmt = FORMATS[name]
    rng = np.random.default_rng(1)
    code = rng.integers(-fmt.levels, fmt.levels + 1, 100_000).astype(np.int32)
    x = np.float32(rng.uniform(-1, 1, 100_000))
    u = random_numbers(100_000) / 100

    def f(code, x, u):
        steps = fmt.log_step(code, u), fmt.add_step(code, u)
        steps = [jnp.clip(step, -fmt.levels, fmt.levels) for step in steps]
        return fmt.encode(x), fmt.decode(code), steps

    got, expected = (compiled(f, code, x, u, how=h)(code, x, u) for h in (how, None))
    assert different(got, expected) == []


def test_a_decoded_weight_is_not_fused_with_what_is_added_to_it():
    rng = np.random.default_rng(2)
    w = madax.quantize_params(jnp.float32(rng.normal(size=(100, 100))), FORMATS["log8"])
    b = jnp.float32(rng.normal(size=(100, 100)))
    fused = jax.jit(lambda w, b: w + b)(w, b)
    assert different(fused, madax.dequantize_params(w) + b) == []


FLOATS = ("float32", "bias")
LEAVES = dict.fromkeys(OPTIMIZERS, (*FLOATS, "log16", "symlog8", "uniform8"))
LEAVES |= dict.fromkeys(GRIDS, FLOATS) | {
    "madam": (*FLOATS, "log8", "uniform16", "bfloat16", "float16"),
    "moments8": ("float32", "log16", "uniform16", "bfloat16"),
}


def weights_and_grads(leaves):
    w = np.random.default_rng(2).normal(size=(512, 20)).astype(np.float32) / 8
    params = {k: madax.quantize_params(w, fmt) for k, fmt in FORMATS.items()}
    params |= {"float32": w, "bias": np.zeros(999, np.float32)}
    params |= {k: jnp.asarray(w, k) for k in ("bfloat16", "float16")}
    params = {k: params[k] for k in leaves}
    grads = [
        {k: random_numbers(*np.shape(w), seed=i) for k, w in params.items()}
        for i in range(3)
    ]
    return params, grads


def train(step, carry, grads):
    for g in grads:
        carry = step(g, *carry[::-1])
    return carry


@compiled_otherwise
@pytest.mark.parametrize("name", mostly_nightly(LEAVES, "moments8"))
def test_optimizers_have_the_same_bits_however_compiled(name, how):
    params, grads = weights_and_grads(LEAVES[name])
    tx = (OPTIMIZERS | GRIDS)[name]
    start = params, tx.init(params)
    got, expected = (
        train(compiled(partial(step, tx), grads[0], *start[::-1], how=h), start, grads)
        for h in (how, None)
    )
    (got, got_state), (expected, expected_state) = got, expected
    assert different(got_state, expected_state) == []
    for key, w in expected.items():
        if isinstance(w, madax.QuantizedArray):
            assert different(got[key], w) == []
        else:
            rtol = 4 * float(jnp.finfo(w.dtype).eps)
            x, y = (np.asarray(z, np.float64) for z in (got[key], w))
            np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7)


# An axis of an array, and into how many pieces it is cut.
PIECES = [
    ((3, 3, 8, 4), 2, 8),
    ((16, 4), 0, 4),
    ((256, 4), 1, 2),
    ((24, 20), 1, 4),
    ((1024, 16), 1, 8),
    ((3, 3, 16, 32), 3, 8),
    ((1000,), 0, 5),
]


@pytest.mark.parametrize(
    ("shape", "axis", "count"), mostly_nightly(PIECES, PIECES[0], PIECES[3])
)
@pytest.mark.parametrize("name", mostly_nightly(["floor_b1", "bbit_madam"], "floor_b1"))
def test_pieces_of_a_leaf_train_as_the_whole(name, shape, axis, count):
    w, tx = random_numbers(*shape), OPTIMIZERS[name]
    step, state = partial(jitted_step, tx), tx.init(w)
    grads = [random_numbers(*shape, seed=i) for i in range(1, 4)]

    def piece(i, tree):
        cut = lambda x: np.split(np.asarray(x), count, axis)[i]
        return jax.tree.map(lambda x: cut(x) if np.shape(x) == shape else x, tree)

    whole = train(step, (w, state), grads)
    for i in (0, count - 1):
        got = train(step, *(piece(i, x) for x in ((w, state), grads)))
        assert different(got, piece(i, whole)) == []
