"""Training on a million weights, which shows one wrong rounding in a million.

On eight devices they are what they are on one, to the last bit; and 16-bit floats, too,
move by steps far smaller than their spacing.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import OPTIMIZERS
from helpers import mostly_nightly, step
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import madax

N = 2**20
rng = np.random.default_rng(0)
W = np.float32(rng.normal(size=N))
GRADS = [np.float32(rng.normal(size=N) * np.exp(rng.normal(size=N))) for _ in range(3)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_nightly(
        itertools.product(
            ["madam", "bbit_madam", "lns_madam"], ["float32", "bfloat16"]
        ),
        ("madam", "bfloat16"),
        ("bbit_madam", "float32"),
    ),
)
def test_eight_devices_make_the_weights_of_one(name, dtype):
    if (name, dtype) == ("madam", "float32"):
        return  # in test_meshes, with all its layouts
    tx = OPTIMIZERS[name]
    moved = jax.jit(lambda g, state, w: step(tx, g, state, w))
    mesh = jax.make_mesh((8,), ("x",))

    def train(put):
        w = put(jnp.asarray(W, dtype))
        state = tx.init(w)
        for g in GRADS:
            w, state = moved(put(g), state, w)
        return np.asarray(w), np.asarray(state.direction.nu)

    one = train(jnp.asarray)
    eight = train(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))))
    for a, b in zip(one, eight, strict=True):
        assert np.sum(a != b) == 0
    assert np.mean(one[0] != np.asarray(W, one[0].dtype)) > 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_16_bit_floats_move_by_small_steps_if_rounded_stochastically(dtype, rounding):
    """On average they move as far as float32, by a tenth of their spacing and less."""
    tx, steps = madax.madam(1e-4, rounding=rounding), 20
    w = jnp.abs(jnp.asarray(W, dtype)) + 1
    scan = lambda w, state: jax.lax.scan(
        lambda carry, _: (step(tx, jnp.ones(N), carry[1], carry[0]), None),
        (w, state),
        length=steps,
    )
    (after, _), _ = jax.jit(scan)(w, tx.init(w))
    assert after.dtype == w.dtype
    ratio = np.float64(after.astype(jnp.float32)) / np.float64(w.astype(jnp.float32))
    wanted = np.expm1(-1e-4 * steps) if rounding == "stochastic" else 0
    spread = ratio.std() / np.sqrt(N)
    assert abs(ratio.mean() - 1 - wanted) <= 5 * spread
    assert spread < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_floats_are_rounded_to_a_neighbour(dtype):
    """Also among subnormals and next to the largest, and by steps of any size."""
    ends = jnp.finfo(dtype)
    logs = rng.uniform(
        np.log(float(ends.smallest_subnormal)), np.log(float(ends.max)), N
    )
    w = jnp.asarray(np.exp(logs) * rng.choice([-1, 1], N), dtype)
    x = np.float64(w.astype(jnp.float32))
    u = np.float32(x * rng.normal(size=N) * 0.2)
    u = np.where(np.abs(x + u) <= 0.99 * float(ends.max), u, 0)
    for rounding in ("stochastic", "nearest"):
        tx = madax.lns_quantize(rounding=rounding)
        updates, _ = jax.jit(tx.update)(jnp.asarray(u), tx.init(w), w)
        after = np.float64((w + updates).astype(jnp.float32))
        # float32 flushes what is subnormal in bfloat16.
        spacing = np.abs(x + u) * float(ends.eps) + max(
            float(ends.smallest_subnormal), 2.0**-124
        )
        # Beyond a factor of two the update is rounded, too.
        close = (np.abs(u) <= 0.5 * np.abs(x)) | ((u > 0) == (x > 0))
        room = np.where(close, 0, np.abs(u) * float(ends.eps))
        far = 0.51 if rounding == "nearest" else 1.01
        assert np.mean(close) > 0.95
        assert np.all(np.abs(after - (x + u)) <= far * spacing + room)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_in_one_program_match_one_program_each(dtype):
    """XLA may keep float32 in between, which leaves rounded weights as they are."""
    tx = madax.madam(0.02, b1=0.9)
    w = jnp.asarray(W[: N // 8], dtype)
    grads = [jnp.asarray(g[: N // 8], dtype) for g in GRADS]

    def unrolled(w, state, steps):
        for g in grads[:steps]:
            updates, state = tx.update(g, state, w)
            w = optax.apply_updates(w, updates)
        return w, state.direction.nu

    one = jax.jit(lambda w, state, g: step(tx, g, state, w))
    after, state = w, tx.init(w)
    for g in grads:
        after, state = one(after, state, g)
    together, v = jax.jit(unrolled, static_argnums=2)(w, tx.init(w), 3)
    np.testing.assert_array_equal(together, after)
    np.testing.assert_array_equal(v, state.direction.nu)
