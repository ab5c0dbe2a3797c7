"""Steps of codes: real-valued, rounded to integers, and as an update of a leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from madax._core.numerics import relative_to, within
from madax._core.rounding import round_steps
from madax.codes._array import QuantizedArray, is_quantized
from madax.codes._leaves import widen
from madax.formats._base import Format


def step_codes(
    w: QuantizedArray,
    steps: jax.Array,
    sign: jax.Array,
    bits: jax.Array | None,
) -> jax.Array:
    """Rounds a real-valued number of codes to the step that ``w`` will take.

    Args:
      w: the quantised leaf.
      steps: real-valued steps, in codes.
      sign: numbers of the sign that the weights will have.
      bits: random bits of the leaf's shape; None to round to nearest.

    Returns:
      The step, int32, which :func:`as_steps` makes an update of.
    """
    new = moved_codes(w.codes, w.format, steps, sign, bits)
    return new - w.codes.astype(jnp.int32)


def real_steps(w: QuantizedArray, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The real-valued number of codes that adds ``u`` to the values of a leaf.

    Args:
      w: the quantised leaf.
      u: what to add; 0 counts for what is not finite.

    Returns:
      The steps, and the values after them, relative to the scale; float32.
    """
    u = relative_to(w.scale, jnp.where(jnp.isfinite(u), widen(u), 0))
    return w.format.add_step(w.codes, u), w.format.decode(w.codes) + u


def as_steps(w: Any, step: Any) -> Any:
    """The step as an update; that of a quantised leaf becomes a QuantizedArray."""
    # This cannot be in a compiled function: what marks an update there is a Python
    # value.
    return QuantizedArray.steps(step, w.format) if is_quantized(w) else step


def moved_codes(
    codes: jax.Array,
    format: Format,
    steps: jax.Array,
    sign: jax.Array,
    bits: jax.Array | None,
) -> jax.Array:
    """The codes, int32, after real-valued ``steps`` are rounded and saturated."""
    beyond = 2 * format.levels + 1  # further than any two codes are apart
    steps = jnp.where(jnp.isfinite(steps), within(steps, -beyond, beyond), 0)
    whole = round_steps(steps, bits)
    return format.saturate(codes.astype(jnp.int32) + whole, sign)
