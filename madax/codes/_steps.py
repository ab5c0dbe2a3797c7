"""Steps of codes: real-valued steps, integer steps, and updates of leaves."""

from functools import partial

import jax
import jax.numpy as jnp

from madax._core.numerics import divided, minus_product, within
from madax._core.rounding import Rounding, round_steps, rounding_bits
from madax.codes._array import Leaf, QuantizedArray, is_quantized
from madax.codes._leaves import widen
from madax.formats._base import Format


def step_codes(
    w: QuantizedArray, steps: jax.Array, sign: jax.Array, bits: jax.Array | None
) -> jax.Array:
    """Rounds real-valued steps to the steps, int32, that ``w`` will take.

    ``sign`` has the sign of the weights after the step; the rest is documented for
    :func:`madax._core.rounding.round_steps`.
    """
    new = moved_codes(w.codes, w.format, steps, sign, bits)
    return new - w.codes.astype(jnp.int32)


def moved_codes(
    codes: jax.Array,
    format: Format,
    steps: jax.Array,
    sign: jax.Array,
    bits: jax.Array | None,
) -> jax.Array:
    """Returns the codes, int32, after real-valued ``steps``, rounded and saturated."""
    far = 2 * format.levels + 1  # further than any two codes are apart
    steps = jnp.where(jnp.isfinite(steps), within(steps, -far, far), 0)
    whole = round_steps(steps, bits)
    return format.saturate(codes.astype(jnp.int32) + whole, sign)


def real_steps(w: QuantizedArray, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the real-valued steps that add ``u`` to a leaf, and its new values.

    Both are float32, and the values relative to the scale. Elements of ``u`` that are
    not finite count as 0.
    """
    u = divided(jnp.where(jnp.isfinite(u), widen(u), 0), w.scale)
    return w.format.add_step(w.codes, u), w.format.decode(w.codes) + u


def as_steps(w: Leaf, step: jax.Array) -> Leaf:
    """Returns a step as an update; for a quantised leaf, as a QuantizedArray.

    A compiled function cannot return it, because False in place of the scale, which
    marks an update, is a Python value.
    """
    return QuantizedArray.steps(step, *w.kind) if is_quantized(w) else step


@partial(jax.jit, static_argnums=3)
def rounded_sum(
    w: QuantizedArray, u: jax.Array, key: jax.Array, rounding: Rounding
) -> jax.Array:
    """Returns code steps that add ``u`` to values, rounded; zero where not finite."""
    steps, value = real_steps(w, u)
    bits = rounding_bits(rounding, key, w.shape)
    if bits is not None:
        # A code that is further away is taken less often, so that rounding keeps the
        # mean of the value, not of the code.
        whole = jnp.floor(steps)
        part = steps - whole
        if w.format.is_coarse:
            levels = w.format.levels
            low = jnp.clip(w.codes + whole, -levels, levels - 1).astype(jnp.int32)
            below, above = w.format.decode(low), w.format.decode(low + 1)
            steps = whole + jnp.clip((value - below) / (above - below), 0, 1)
        else:  # to the second order
            bend = 0.5 * w.format.curvature(w.codes)
            steps = minus_product(steps, bend, part * (1 - part))
    return step_codes(w, steps, jnp.sign(value), bits)
