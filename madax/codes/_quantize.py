"""From trees of floats to trees of codes, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.checks import (
    CLIPPED,
    check_float_leaf,
    check_instance,
    check_positive,
    leaf_name,
    listed,
    shares,
    warn_of_leaves,
)
from madax._core.leaf_kinds import read_leaves
from madax._core.names import flatten_named
from madax._core.numerics import relative_to
from madax._core.vectors import awaited
from madax.codes._array import QuantizedArray, is_quantized
from madax.codes._leaves import widen
from madax.codes._scales import bound_on_weights, root_mean_square, share_beyond
from madax.formats._base import Format

# The warnings about leaves.
_ALL_ZEROS = (
    "all zeros, which have no scale, so these leaves stay floats; initialise them with "
    "values that are not all zero, or leave them out with where."
)
_LOSSY = (
    "this share of the norm was lost in rounding; pass channel_axis=-1 for a scale a "
    "channel, or a format of more bits, or another range."
)


def quantize_params(
    params: Any,
    format: Format,
    *,
    where: Callable[[str, Any], bool] | None = None,
    p_scale: jax.typing.ArrayLike | None = None,
    channel_axis: int | tuple[int, ...] | None = None,
) -> Any:
    r"""Replaces leaves of a parameter tree by codes of a number format.

    .. math:: \text{scale} = \max(3\, \mathrm{rms}(w), \max |w|), \qquad
      c = \mathrm{round}(\mathrm{encode}(w / \text{scale}))

    with nearest rounding. The scale stays the bound on the weights, like the bound of
    :func:`madam` on floats: it clips no present weight, and small ones have room to
    grow. With a number for ``p_scale`` it is :math:`p_\text{scale}\,
    \mathrm{rms}(w)`, the bound of the paper, and a warning tells what is clipped.

    In a module of ``flax.nnx`` only ``nnx.Param`` variables become codes; the result is
    a new module. Arrays that do not become codes are copied, so that the result may be
    donated. Leaves that are no arrays, like functions in a module of Equinox, stay.

    A whole leaf has one scale. Where magnitudes differ much from channel to channel, or
    weights have heavy tails, ``channel_axis`` gives closer codes. Another warning names
    leaves that lose a quarter of their norm or more.

    Leaves that are codes already are converted: codes of this format are left alone,
    those of another are decoded and encoded again. They keep their scale unless
    ``p_scale`` or ``channel_axis`` asks for another. To keep two formats in one tree,
    choose the leaves of each by ``where``.

    A leaf that is all zeros has no scale, and stays a float array; a warning lists
    them. A channel of zeros in another leaf has the largest of the scales of that leaf.
    Under ``jit`` and ``vmap`` values are unknown, so there are no warnings. There the
    codes of a leaf that is all zeros or not finite have the scale NaN, and ``init`` of
    an optimizer raises an error that names it.

    Args:
      params: tree of floating-point arrays, any shapes, or a module of ``flax.nnx``.
      format: the number format of the codes.
      where: ``where(path, leaf)`` tells which leaves become codes, given paths like
        ``"Dense_0/kernel"``; by default leaves of rank 2 or more and 16 elements or
        more, except biases, scales, norms and rates of state-space models, which are
        told by name and shape.
      p_scale: the scale, relative to the root mean square of the leaf; None for one
        that clips no weight.
      channel_axis: for one scale a channel, the axis of the channels, or several; -1
        is the output of a Flax kernel, 0 gives one scale per layer in a stack
        of layers. None, the default, for one scale per leaf.

    Returns:
      The tree, with a :class:`QuantizedArray` in the place of every chosen leaf; its
      scale has the rank of its codes.

    Raises:
      ValueError: if no leaf is chosen, a chosen leaf is not finite or has no such
        axis, or an argument is out of range.
      TypeError: if an argument is of the wrong type, or a chosen leaf is not real
        floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> quantized = madax.quantize_params(params, madax.LogFormat(bits=8))
      >>> print(quantized["kernel"].codes.dtype, quantized["bias"].dtype)
      int8 float32
    """
    check_instance("format", format, Format, or_none=False)
    if where is not None and not callable(where):
        raise TypeError(
            f"where must be a function of (path, leaf), got {where!r} of type "
            f"{type(where).__name__}."
        )
    if p_scale is not None:
        check_positive("p_scale", p_scale, None, finite=True)
    axes = _channel_axes(channel_axis)
    tree, merge = _split_module(params)
    return merge(
        _quantize_tree(tree, format, where or _weights_of(tree), p_scale, axes)
    )


def dequantize_params(params: Any, dtype: Any = None) -> Any:
    """The parameters as floating-point arrays, for the model to use.

    Args:
      params: tree of floating-point arrays and :class:`QuantizedArray`, or a module of
        ``flax.nnx``.
      dtype: floating dtype of all leaves; None for float32 in the place of codes,
        and other leaves as they are.

    Returns:
      The tree with an array in the place of every :class:`QuantizedArray`.

    Raises:
      TypeError: if ``dtype`` is not floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> params = madax.quantize_params({"w": jnp.ones((4, 4))}, madax.LogFormat(8))
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

    tree, merge = _split_module(params)
    return merge(jax.tree.map(dequantize, tree, is_leaf=is_quantized))


class _Facts(NamedTuple):
    """The scalars by which the codes of a leaf are judged.

    Attributes:
      peak: the largest magnitude of the weights.
      lowest: the least of the scales.
      highest: the greatest of them.
      beyond: the most that a weight is, relative to its scale.
      coarse: the most that a scale is, relative to the root mean square.
    """

    peak: Any
    lowest: Any
    highest: Any
    beyond: Any
    coarse: Any


class _Coded(NamedTuple):
    """A leaf, and its codes; without facts where it was such codes before."""

    name: str
    leaf: Any
    codes: QuantizedArray
    facts: _Facts | None


def _quantize_tree(
    params: Any,
    format: Format,
    where: Callable[[str, Any], bool],
    p_scale: jax.typing.ArrayLike | None,
    channel_axes: Sequence[int],
) -> Any:
    """What :func:`quantize_params` does to a tree, with checked arguments."""
    paths, leaves, treedef = flatten_named(params, is_leaf=is_quantized)
    chosen = [i for i, leaf in enumerate(leaves) if where(paths[i], leaf)]
    if not chosen:
        raise ValueError(
            "where, or the default in its place, chooses no leaf of params, whose "
            f"paths are {listed(map(repr, paths))}; pass a where(path, leaf) that "
            "is true of some."
        )
    coded = [
        _code_leaf(paths[i], leaves[i], format, p_scale, channel_axes) for i in chosen
    ]
    judged = zip(chosen, coded, _judge(coded), strict=True)
    new = {i: each.codes for i, each, fine in judged if fine and each.facts}
    return treedef.unflatten(
        [new[i] if i in new else _copied(leaf) for i, leaf in enumerate(leaves)]
    )


def _copied(tree: Any) -> Any:
    """The arrays of a tree in new buffers, so that these may be donated."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)


def _weights_of(tree: Any) -> Callable[[str, Any], bool]:
    """The default of ``where``, for the leaves of a tree."""
    paths, leaves, _ = flatten_named(tree, is_leaf=is_quantized)
    readings = read_leaves(paths, map(np.shape, leaves))
    vectors = {
        path for path, x in zip(paths, readings, strict=True) if x.kind == "vector"
    }

    # Below 16 elements, codes hardly save more bytes than the scale takes. A leaf that
    # is no array has no axes, so it is not asked for a dtype.
    def is_weight(path: str, leaf: Any) -> bool:
        return is_quantized(leaf) or (
            np.ndim(leaf) >= 2
            and np.size(leaf) >= 16
            and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            and path not in vectors
        )

    return is_weight


def _code_leaf(
    path: str,
    leaf: Any,
    format: Format,
    p_scale: jax.typing.ArrayLike | None,
    channel_axes: Sequence[int],
) -> _Coded:
    name, scale = leaf_name("params", path), None
    if isinstance(leaf.codes if is_quantized(leaf) else leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"quantize_params reads the values of params, but {name} is a "
            "jax.ShapeDtypeStruct; use jax.eval_shape(lambda params: "
            "madax.quantize_params(params, format), params) for the shapes of codes."
        )
    if not is_quantized(leaf):
        check_float_leaf("params", path, leaf)
    elif leaf.format == format:
        return _Coded(name, leaf, leaf, None)
    elif p_scale is None and not channel_axes:
        scale = leaf.scale
    rank = np.ndim(leaf)
    for axis in channel_axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"channel_axis is {axis}, but {name} has shape {np.shape(leaf)}; "
                "leave that leaf out with where."
            )
    channels = {axis % rank for axis in channel_axes}
    axes = tuple(axis for axis in range(rank) if axis not in channels)
    codes, scale, facts = awaited(
        _encode(_values(leaf), p_scale, scale, format=format, axes=axes)
    )
    if isinstance(scale, jax.core.Tracer):
        scale = jnp.where((scale > 0) & (scale < jnp.inf), scale, jnp.nan)
    return _Coded(name, leaf, QuantizedArray(codes, scale, format), facts)


def _values(leaf: Any) -> jax.Array:
    return leaf.dequantize() if is_quantized(leaf) else leaf


# Leaves of one shape share a program, and the host reads nothing between leaves.
@partial(jax.jit, static_argnames=("format", "axes"))
def _encode(
    w: jax.Array,
    p_scale: jax.typing.ArrayLike | None,
    scale: jax.Array | None,
    *,
    format: Format,
    axes: Sequence[int],
) -> tuple[jax.Array, jax.Array, _Facts]:
    """The codes of a leaf, their scale, the given one if any, and the facts."""
    w = widen(w)
    rms = root_mean_square(w, axes, keepdims=True)
    peak = jnp.max(jnp.abs(w), axis=axes, keepdims=True, initial=0)
    if scale is None:
        bound = bound_on_weights(p_scale, rms, peak)
        # A channel of zeros takes the scale of the other channels.
        scale = jnp.where(rms == 0, jnp.max(bound, initial=0), bound)
    scale = jnp.reshape(scale, jnp.shape(scale) or (1,) * w.ndim).astype(jnp.float32)
    x = relative_to(jnp.where(scale > 0, scale, 1), w)
    code = format.nearest(x).astype(jnp.int32)
    facts = _Facts(
        jnp.max(peak, initial=0),
        jnp.min(scale, initial=jnp.inf),
        jnp.max(scale, initial=0),
        jnp.max(peak / jnp.where(scale > 0, scale, 1), initial=0),
        jnp.max(scale / jnp.where(rms > 0, rms, jnp.inf), initial=0),
    )
    return code.astype(format.storage_dtype), scale, facts


def _judge(coded: Sequence[_Coded]) -> list[bool]:
    """Whether each leaf has codes. Raises, and warns, of what is known to be amiss."""
    known = {
        i: each.facts
        for i, each in enumerate(coded)
        if each.facts is not None and not isinstance(each.facts.peak, jax.core.Tracer)
    }
    zeros, clipped, lossy = [], [], []
    fine = [True] * len(coded)
    for i, facts in jax.device_get(known).items():  # all at once
        name, leaf, q, _ = coded[i]
        if facts.lowest > 0 and facts.highest < np.inf:
            # A weight that is beyond the scale by a rounding is no outlier.
            if facts.beyond > 1 + 1e-5:
                clipped.append((name, share_beyond(_values(leaf), q.scale)))
            # Measuring the loss takes as long as all that came before, so it is done
            # only in doubt.
            elif facts.coarse > 0.25 * q.format.dynamic_range:
                lossy.append((name, _share_lost(_values(leaf), q)))
        elif facts.peak == 0:
            zeros.append(name)
            fine[i] = False
        else:
            raise ValueError(
                f"{name} (or one of its channels) is not finite, or out of float32's "
                f"range: the scale of its codes would be {facts.lowest} to "
                f"{facts.highest}; initialise it with finite values, or leave it out "
                "with where."
            )
    warn_of_leaves(zeros, _ALL_ZEROS, stacklevel=4)
    warn_of_leaves(shares(clipped), CLIPPED, stacklevel=4)
    warn_of_leaves(shares(lossy, least=0.25), _LOSSY, stacklevel=4)
    return fine


@jax.jit
def _share_lost(w: jax.Array, q: QuantizedArray) -> jax.Array:
    """The norm of the error, relative to that of the weights."""
    unit = jnp.max(q.scale)  # in which squares do not overflow
    error, values = (
        jnp.sum(jnp.square(x / unit)) for x in (q.dequantize() - widen(w), widen(w))
    )
    return jnp.sqrt(error / values)


def _channel_axes(channel_axis: Any) -> tuple[int, ...]:
    """The axes of the channels, checked."""
    axes = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    if channel_axis is None:
        return ()
    if not all(type(axis) is int for axis in axes):
        raise TypeError(
            "channel_axis must be None, an int or a tuple of ints, got "
            f"{channel_axis!r}."
        )
    return axes


def _split_module(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The weights of a module of Flax's nnx, and what makes a module of them again.

    Anything else is returned as it is. A module can only exist if Flax is imported.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.Module):
        return params, lambda tree: tree
    graph, weights, rest = nnx.split(params, nnx.Param, ...)
    rest = _copied(rest)  # variables of its own, too
    return weights, lambda weights: nnx.merge(graph, weights, rest)
