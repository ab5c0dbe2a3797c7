"""The root mean square and the max of a leaf, which determine its scale.

All results have the same bits on one device and on a mesh, at any scale of weights.
"""

import operator
from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._core.checks import leaf_name
from madax._core.derivatives import with_derivative
from madax._core.numerics import normal_reciprocal, plus_product, rounded
from madax._core.sums import fraction
from madax._core.vectors import awaited, known_values, shape_per_leaf
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten, widen


def check_float_widths(params: optax.Params) -> None:
    """Raises if a float leaf has less than 16 bits."""
    for path, leaf in zip(*flatten(params)[:2], strict=True):
        if not is_quantized(leaf) and jnp.result_type(leaf).itemsize < 2:
            raise TypeError(
                f"{leaf_name('params', path)} has dtype {jnp.result_type(leaf)}, in "
                "which updates of a few per cent are lost; use bfloat16 or wider, or "
                "codes, made by quantize_params."
            )


def float_leaf_sizes(params: optax.Params) -> tuple[list[str], jax.Array, jax.Array]:
    """Returns paths of float leaves, and vectors of their root mean squares and maxima.

    Raises if a leaf is a shape, has less than 16 bits, or is known not to be finite.
    """
    floats = [
        (path, leaf)
        for path, leaf in zip(*flatten(params)[:2], strict=True)
        if not is_quantized(leaf)
    ]
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in floats):
        raise TypeError(
            "init reads the values of params, got jax.ShapeDtypeStruct leaves; "
            "use jax.eval_shape(tx.init, params) for the shapes of the state."
        )
    check_float_widths(params)
    paths = [path for path, _ in floats]
    sizes = [awaited(_leaf_size(leaf)) for _, leaf in floats]
    if sizes:
        rms, maxima = map(jnp.stack, zip(*sizes, strict=True))
    else:
        rms, maxima = (
            jnp.ones(shape_per_leaf(0), np.float32),
            jnp.zeros(shape_per_leaf(0), np.float32),
        )
    for path, value in zip(paths, known_values(rms), strict=False):
        if not np.isfinite(value):
            raise ValueError(
                f"{leaf_name('params', path)} holds a NaN or an infinity (root "
                f"mean square {value}); initialise it with finite values."
            )
    return paths, rms, maxima


def bound_on_weights(
    p_scale: jax.typing.ArrayLike | None, rms: jax.Array, max: jax.Array
) -> jax.Array:
    """Returns the bound on weights, given their root mean square and max.

    By default it clips no weight. With ``p_scale`` it is the paper's bound, which may.
    """
    if p_scale is None:
        return jnp.maximum(3 * rms, max)
    return jnp.where(rms == 0, 0, p_scale * rms).astype(rms.dtype)  # not inf * 0


def check_code_scales(params: optax.Params) -> None:
    """Raises if a scale of codes is known not to be positive and finite.

    ``quantize_params`` under ``jit`` cannot raise, and returns NaN for such a scale.
    """
    paths, leaves, _ = flatten(params)
    usable = {
        path: awaited(_usable(leaf.scale))
        for path, leaf in zip(paths, leaves, strict=True)
        if is_quantized(leaf) and not isinstance(leaf.scale, jax.ShapeDtypeStruct)
    }
    known = {k: ok for k, ok in usable.items() if not isinstance(ok, jax.core.Tracer)}
    for path, ok in jax.device_get(known).items():  # all at once
        if not ok:
            raise ValueError(
                f"{leaf_name('params', path)} holds codes without a scale, as a "
                "whole or in a channel: the weights were not finite, or all zeros in "
                "a LogFormat. Initialise them with finite values that are not all "
                "zero, or leave them out with where; quantize_params says so outside "
                "of jax.jit."
            )


@jax.jit
def _usable(scale: jax.Array) -> jax.Array:
    return jnp.all((scale > 0) & (scale < jnp.inf))


# Leaves of one shape share a program, and the host waits for none of them.
@jax.jit
def _leaf_size(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the root mean square of an array, and its max magnitude."""
    w = widen(w)
    return root_mean_square(w), jnp.max(jnp.abs(w), initial=0)


@jax.jit
def fraction_above(w: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns the fraction of weights above a bound by more than a rounding error."""
    return fraction(jnp.abs(widen(w)) > bound * (1 + 1e-5))


def root_mean_square(
    w: jax.Array, axes: Sequence[int] | None = None, *, keepdims: bool = False
) -> jax.Array:
    """Returns the root mean square over ``axes``, float32 or wider, without overflow.

    It is 1 for an empty array, which is not "all zeros", and NaN for an array with a
    value that is not finite.
    """
    axes = tuple(range(w.ndim)) if axes is None else tuple(axes)
    rms = _root_mean_square_over(axes)(widen(w))
    return rms if keepdims else jnp.squeeze(rms, axes)


@cache
def _root_mean_square_over(axes: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function of an array that keeps the axes, with size 1."""

    # Sums of integers have no derivative, so the rule is written out.
    def rule(tangents, rms, w):
        (t,) = tangents
        mean = jnp.mean(w / jnp.where(rms > 0, rms, 1) * t, axes, keepdims=True)
        return jnp.where(rms > 0, mean, jnp.nan)

    @with_derivative(rule)
    def root_mean_square(w):
        unit, relative = split_max(jnp.abs(w), axes)
        mean = (relative / 2) ** 2
        for axis in axes:
            mean = _orderless_mean(mean, axis) if w.size else jnp.full_like(unit, 0.25)
        return jnp.where(jnp.isfinite(unit), unit * (2 * jnp.sqrt(mean)), jnp.nan)

    return root_mean_square


def _orderless_mean(x: jax.Array, axis: int) -> jax.Array:
    """Returns the mean of numbers in [0, 1], with bits that no order of sums changes.

    So a leaf has the same scale on one device and on a mesh, where partial sums of
    floats would round differently. The numbers are cut into digits, narrow enough for
    the sums of digits to fit 32-bit integers.
    """
    count = x.shape[axis]
    if count >= 2**31:  # for which no digit is narrow enough
        halves = jax.lax.split(x, (count // 2, count - count // 2), axis)
        weights = [half.shape[axis] / count for half in halves]
        first, second = (_orderless_mean(half, axis) for half in halves)
        return plus_product(rounded(first * weights[0]), second, weights[1])
    width = min(24, 32 - count.bit_length())
    digits = -(-(jnp.finfo(x.dtype).nmant + 7) // width)
    total = jnp.zeros((), x.dtype)
    for i in range(1, digits + 1):
        x *= 2.0**width
        digit = jnp.floor(x)
        x -= digit
        summed = jnp.sum(digit.astype(jnp.uint32), axis=axis, keepdims=True)
        total += summed.astype(x.dtype) * 2.0 ** (-width * i)
    return total / float(count)  # JAX takes no int of more than 32 bits


def split_max(
    x: jax.Array, axes: Sequence[int] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns a magnitude, and ``x`` relative to it, whose squares do not overflow.

    The magnitude is a power of two near the max over ``axes``, which are kept with size
    1, or 1 if the max is zero. So the quotient, in [-2, 2], is exact in every program.
    """
    max = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    info = jnp.finfo(x.dtype)
    power = jax.lax.reduce_precision(0.75 * max, info.nexp, 0)
    # A power of two is a tie here, and rounds up or down depending on its exponent.
    power = jnp.where(2 * power <= max, 2 * power, power)
    unit = jnp.where(max == 0, 1, jnp.maximum(power, info.tiny))
    return unit, operator.truediv(*normal_reciprocal(x, unit))
