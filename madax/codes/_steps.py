"""Steps of codes: real-valued, rounded to integers, and as an update of a leaf."""

from functools import partial

import jax
import jax.numpy as jnp

from madax._core.numerics import minus_product, relative_to, within
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
    """The codes, int32, after real-valued ``steps`` are rounded and saturated."""
    far = 2 * format.levels + 1  # further than any two codes are apart
    steps = jnp.where(jnp.isfinite(steps), within(steps, -far, far), 0)
    whole = round_steps(steps, bits)
    return format.saturate(codes.astype(jnp.int32) + whole, sign)


def real_steps(w: QuantizedArray, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The real-valued steps that add ``u`` to a leaf, and its values after them.

    Both are float32, and the values relative to the scale. Elements of ``u`` that are
    not finite count as 0.
    """
    u = relative_to(w.scale, jnp.where(jnp.isfinite(u), widen(u), 0))
    return w.format.add_step(w.codes, u), w.format.decode(w.codes) + u


def as_steps(w: Leaf, step: jax.Array) -> Leaf:
    """The step as an update: for a quantised leaf, a QuantizedArray.

    A compiled function cannot return it, because the mark of an update is a Python
    value.
    """
    return QuantizedArray.steps(step, *w.kind) if is_quantized(w) else step


@partial(jax.jit, static_argnums=3)
def rounded_sum(
    w: QuantizedArray, u: jax.Array, key: jax.Array, rounding: Rounding
) -> jax.Array:
    """The step of codes that adds about ``u`` to their values; none if not finite."""
    steps, value = real_steps(w, u)
    bits = rounding_bits(rounding, key, w.shape)
    if bits is not None:
        # Where the next code is further away than the last, it is taken less often, so
        # that rounding keeps the mean of the value, not of the code.
        part = steps - jnp.floor(steps)
        bend = 0.5 * w.format.curvature(w.codes)
        steps = minus_product(steps, bend, part * (1 - part))
    return step_codes(w, steps, jnp.sign(value), bits)
