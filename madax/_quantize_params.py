"""From trees of floats to trees of codes, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madax._checks import check_float_leaf, check_instance, check_scale, leaf_name
from madax._formats import Format
from madax._leaves import known_values, path_name, root_mean_square, widen
from madax._numerics import relative_to
from madax._quantized_array import QuantizedArray, is_quantized


def quantize_params(
    params: Any,
    format: Format,
    *,
    where: Callable[[str, Any], bool] | None = None,
    p_scale: float = 3.0,
    channel_axis: int | None = None,
) -> Any:
    r"""Replaces leaves of a parameter tree by codes of a number format.

    .. math:: \text{scale} = p_\text{scale} \cdot \mathrm{rms}(w), \qquad
      c = \mathrm{round}(\mathrm{encode}(w / \text{scale}))

    with nearest rounding. The scale is the bound on the weights for good: it is
    to codes what ``p_scale`` of :func:`madam` is to floats.

    Args:
      params: tree of floating-point arrays, any shapes.
      format: the number format of the codes.
      where: ``where(path, leaf)`` tells which leaves become codes, given paths like
        ``"Dense_0/kernel"``; by default those of rank 2 or more and 16 elements or
        more, which leaves biases, norms and what is too small to gain in floats.
      p_scale: the scale, relative to the root mean square of the leaf.
      channel_axis: for one scale a channel, the axis of the channels; -1 is the
        output of a Flax kernel. None, the default, for one scale a leaf.

    Returns:
      The tree, with a :class:`QuantizedArray` in the place of every chosen leaf.

    Raises:
      ValueError: if a chosen leaf is all zeros or not finite, has no such axis, or
        an argument is out of range.
      TypeError: if ``format`` is not a format, or a chosen leaf is not real
        floating or is quantised already.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> fmt = madax.LogFormat.from_dynamic_range(bits=8, ratio=1000)
      >>> quantized = madax.quantize_params(params, fmt)
      >>> print(quantized["kernel"].codes.dtype, quantized["bias"].dtype)
      int8 float32
    """
    check_instance("format", format, Format, or_none=False)
    if where is not None and not callable(where):
        raise TypeError(
            f"where must be a function of (path, leaf), got {where!r} of type "
            f"{type(where).__name__}."
        )
    if not (channel_axis is None or type(channel_axis) is int):
        raise TypeError(f"channel_axis must be None or an int, got {channel_axis!r}.")
    check_scale("p_scale", p_scale, 3.0)

    def quantize(path, leaf):
        name = path_name(path)
        called = leaf_name("params", name)
        if not (_worth_quantizing if where is None else where)(name, leaf):
            return leaf
        if is_quantized(leaf):
            raise TypeError(
                f"{called} is a QuantizedArray already, {leaf!r}; call "
                "dequantize_params first to change its format."
            )
        check_float_leaf("params", name, leaf)
        w = widen(leaf)
        axes = tuple(range(w.ndim))
        if channel_axis is not None:
            if not -w.ndim <= channel_axis < w.ndim:
                raise ValueError(
                    f"channel_axis is {channel_axis}, but {called} has shape "
                    f"{w.shape}; leave that leaf out with where."
                )
            axes = tuple(a for a in axes if a != channel_axis % w.ndim)
        rms = root_mean_square(w, axes, keepdims=channel_axis is not None)
        scale = (p_scale * rms).astype(jnp.float32)
        _check_scales(called, scale)
        x = relative_to(jnp.where(scale > 0, scale, 1), w)
        code = format.saturate(
            jnp.round(format.encode(x)).astype(jnp.int32), jnp.sign(w)
        )
        return QuantizedArray(code.astype(format.storage_dtype), scale, format)

    return jax.tree_util.tree_map_with_path(quantize, params, is_leaf=is_quantized)


def dequantize_params(params: Any, dtype: Any = None) -> Any:
    """The parameters as floating-point arrays, for the model to use.

    Args:
      params: tree of floating-point arrays and :class:`QuantizedArray`.
      dtype: floating dtype of all leaves; None for float32 in the place of codes,
        and other leaves as they are.

    Returns:
      The tree with an array in the place of every :class:`QuantizedArray`.

    Raises:
      TypeError: if ``dtype`` is not floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> fmt = madax.LogFormat.from_dynamic_range(bits=8, ratio=1000)
      >>> params = madax.quantize_params({"w": jnp.ones((4, 4))}, fmt)
      >>> print(madax.dequantize_params(params, jnp.bfloat16)["w"].dtype)
      bfloat16
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be a floating dtype, got {dtype!r}; pass jnp.float32 or "
            "jnp.bfloat16."
        )

    def dequantize(leaf):
        if is_quantized(leaf):
            return leaf.dequantize(dtype)
        if dtype is not None and jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return jnp.asarray(leaf).astype(dtype)
        return leaf

    return jax.tree.map(dequantize, params, is_leaf=is_quantized)


def _worth_quantizing(path: str, leaf: Any) -> bool:
    del path
    # Below 16 elements, codes save hardly more bytes than the scale takes.
    return (
        not is_quantized(leaf)
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and np.ndim(leaf) >= 2
        and np.size(leaf) >= 16
    )


def _check_scales(called: str, scale: jax.Array) -> None:
    # By their extremes: no process need hold all channels of an array that is sharded.
    extremes = jnp.stack([jnp.min(scale, initial=1), jnp.max(scale, initial=1)])
    for value in known_values(extremes):
        if not 0 < value < np.inf:
            raise ValueError(
                f"{called} (or one of its channels) is all zeros, not finite, or out "
                f"of float32's range: the scale of its codes would be {value}; "
                "initialise it with finite values that are not all zero, or leave it "
                "out with where."
            )
