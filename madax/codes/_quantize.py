"""Conversion of trees of floats to trees of codes, and back."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from madax._core.checks import (
    CLIPPED,
    check_float_dtype,
    check_float_leaf,
    check_format,
    check_positive,
    check_where,
    in_percent,
    is_float,
    is_lifted,
    leaf_name,
    listed,
    type_error,
    warn_of_leaves,
)
from madax._core.leaf_kinds import read_leaves
from madax._core.leaf_names import Leaf as Reading
from madax._core.names import Tree, flatten_named
from madax._core.numerics import divided_or_same
from madax._core.vectors import awaited
from madax.codes._array import Leaf, QuantizedArray, is_quantized, lowered
from madax.codes._leaves import widen
from madax.codes._scales import bound_on_weights, fraction_above, root_mean_square
from madax.formats._base import Format

# Warnings about leaves.
_LOSSY = (
    "this fraction of the norm was lost in rounding; pass channel_axis=-1 for a scale "
    "per channel, or a format of more bits, or another range."
)


def quantize_params(
    params: Tree,
    format: Format,
    *,
    where: Callable[[str, Any], bool] | None = None,
    p_scale: ArrayLike | None = None,
    channel_axis: int | tuple[int, ...] | None = None,
    zero_init_scale: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Tree:
    r"""Replaces leaves of a parameter tree by codes of a number format.

    .. math:: \text{scale} = \max(3\, \mathrm{rms}(w), \max |w|), \qquad
      c = \mathrm{round}(\mathrm{encode}(w / \text{scale}))

    with nearest rounding. The scale stays the bound on the weights, like the bound of
    :func:`madam` on floats. It clips no weight of ``params``, and small weights have
    room to grow. With a number for ``p_scale`` it is :math:`p_\text{scale}\,
    \mathrm{rms}(w)`, the bound of the paper, and a warning names the clipped leaves.

    In a module of ``flax.nnx`` only ``nnx.Param`` variables become codes; the result is
    a new module. Other arrays are copied, so that the result may be donated. Leaves
    that are not arrays, such as functions in a module of Equinox, stay.

    By default a leaf has one scale. With ``channel_axis``, codes are more accurate
    where magnitudes differ between channels or weights have heavy tails. A warning
    names leaves whose relative error is 25 % or more.

    Leaves that are codes of this format stay; codes of another format are decoded and
    encoded again. They keep their scale unless ``p_scale`` or ``channel_axis`` asks for
    another. To keep two formats in one tree, choose the leaves of each by ``where``.

    A leaf that is all zeros, such as the last kernel of a branch or B of LoRA, becomes
    codes of zero, so the structure of the result never depends on values. Its scale is
    three times ``zero_init_scale``, by default :math:`1 / \sqrt{\text{fan-in}}`, which
    stands in for its root mean square. In a :class:`LogFormat` multiplicative steps
    never move a code of zero, so such a leaf is an error, unless ``zero_init_scale`` is
    given, for optimizers within :func:`with_quantized_params`. A channel of zeros in
    another leaf has the max of the scales of that leaf.

    Under ``jit`` and ``vmap`` values are unknown, so there are no warnings and no
    errors about values. A leaf that would be such an error has the scale NaN, and
    ``init`` of an optimizer raises an error that names it.

    Args:
      params: tree of floating-point arrays, any shapes, or a module of ``flax.nnx``.
      format: the number format of the codes.
      where: ``where(path, leaf)`` tells which leaves become codes, given paths like
        ``"Dense_0/kernel"``. The default chooses leaves of rank 2 or more and 16
        elements or more, except biases, scales, norms and rates of state-space models,
        which it knows by name and shape.
      p_scale: the scale, relative to the root mean square of the leaf; None for a scale
        that clips no weight.
      channel_axis: the axis, or several, with a scale for each index along it: -1 gives
        a scale for each output of a Flax kernel, 0 for each layer in a stack of layers.
        None, the default, for one scale per leaf.
      zero_init_scale: the root mean square assumed for a leaf that is all zeros, in
        units of the weights; None for one over the square root of its fan-in.
      dtype: floating dtype of decoded codes and of their gradients; None for the dtype
        of a leaf of 16 bits or of codes, and float32 for other leaves.

    Returns:
      The tree, with a :class:`QuantizedArray` in place of each chosen leaf; its
      scale has the rank of its codes.

    Raises:
      ValueError: if no leaf is chosen, a chosen leaf is not finite, is all zeros in a
        ``LogFormat`` or has no such axis, or an argument is out of range.
      TypeError: if an argument is of the wrong type, or a chosen leaf is not real
        floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> quantized = madax.quantize_params(params, madax.LogFormat(bits=8))
      >>> print(quantized["kernel"].codes.dtype, quantized["bias"].dtype)
      int8 float32
    """
    check_format("format", format, Format, or_none=False)
    check_where(where)
    check_float_dtype(dtype)
    if p_scale is not None:
        check_positive("p_scale", p_scale, None, finite=True)
    if zero_init_scale is not None:
        check_positive("zero_init_scale", zero_init_scale, None, finite=True)
    axes: tuple = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    axes = () if channel_axis is None else axes
    if not all(type(axis) is int for axis in axes):
        wanted = "None, an int or a tuple of ints"
        remedy = "pass None for one scale per leaf"
        raise type_error("channel_axis", wanted, channel_axis, remedy)
    tree, merge = split_module(params)
    paths, leaves, treedef = flatten_named(tree, is_leaf=is_quantized)
    # Codes that madax.hijax lifted are codes, and not the floats that they act as.
    leaves = [lowered(leaf) for leaf in leaves]
    readings = read_leaves(paths, map(np.shape, leaves))
    chosen = map(where, paths, leaves) if where else map(_is_weight, leaves, readings)
    chosen = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    if not chosen:
        raise ValueError(
            "where selected no leaf of params, whose paths are "
            f"{listed(map(repr, paths))}; pass a where(path, leaf) that selects some. "
            "The default selects weights of rank 2 or more and 16 elements or more."
        )
    zero_rms = {i: _zero_rms(readings[i], format, zero_init_scale) for i in chosen}
    coded = {
        i: _code_leaf(paths[i], leaves[i], format, p_scale, axes, zero_rms[i])
        for i in chosen
    }
    _check_codes(paths, leaves, coded)
    new = {
        i: dataclasses.replace(codes, value_dtype=_value_dtype(leaves[i], dtype))
        for i, (codes, _) in coded.items()
    }
    return merge(
        treedef.unflatten(
            [new[i] if i in new else _copied(leaf) for i, leaf in enumerate(leaves)]
        )
    )


def dequantize_params(params: Tree, dtype: DTypeLike | None = None) -> Tree:
    """Decodes the codes in a parameter tree to floating-point arrays.

    Args:
      params: tree of floating-point arrays and :class:`QuantizedArray`, or a module of
        ``flax.nnx``; codes may be lifted by :mod:`madax.hijax`.
      dtype: floating dtype of all floating leaves; None decodes codes to the dtype of
        each leaf, and does not cast other leaves.

    Returns:
      The tree with an array in place of each :class:`QuantizedArray`.

    Raises:
      TypeError: if ``dtype`` is not floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> params = madax.quantize_params({"w": jnp.ones((4, 4))}, madax.LogFormat(8))
      >>> print(madax.dequantize_params(params, jnp.bfloat16)["w"].dtype)
      bfloat16
    """
    check_float_dtype(dtype)

    def dequantize(leaf):
        if is_quantized(leaf):
            return leaf.dequantize(dtype)
        if is_lifted(leaf):
            leaf = leaf.astype(leaf.dtype)  # Methods decode them.
        keeps = dtype is None or not is_float(leaf)
        return leaf if keeps else jnp.asarray(leaf).astype(dtype)

    tree, merge = split_module(params)
    return merge(jax.tree.map(dequantize, tree, is_leaf=is_quantized))


class _Facts(NamedTuple):
    """Scalars that tell whether a format suits a leaf."""

    max: jax.Array  # max magnitude of the weights
    min_scale: jax.Array
    max_scale: jax.Array
    max_relative: jax.Array  # max magnitude of the weights, relative to their scale
    max_ratio: jax.Array  # max ratio of a scale to the root mean square of its weights


def _copied(tree: Tree) -> Tree:
    """Copies the arrays of a tree, so that the result may be donated."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)


def _is_weight(leaf: Tree, reading: Reading) -> bool:
    """The default of ``where``."""
    # Below 16 elements, codes hardly save more bytes than the scale takes. A leaf that
    # is not an array has rank 0, so its dtype is never read.
    return is_quantized(leaf) or (
        np.ndim(leaf) >= 2
        and np.size(leaf) >= 16
        and is_float(leaf)
        and reading.kind != "vector"
    )


def _value_dtype(leaf: Leaf, dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype that the codes of a leaf decode to."""
    own = jnp.result_type(leaf.value_dtype if is_quantized(leaf) else leaf)
    return jnp.dtype(dtype or (own if own.itemsize == 2 else jnp.float32))


def _zero_rms(
    reading: Reading, format: Format, zero_init_scale: ArrayLike | None
) -> ArrayLike:
    """Returns the root mean square assumed for a leaf of zeros; 0 if it is an error."""
    if zero_init_scale is not None:
        return zero_init_scale
    return reading.fan_in**-0.5 if format.moves_zeros else 0.0


def _code_leaf(
    path: str,
    leaf: Leaf,
    format: Format,
    p_scale: ArrayLike | None,
    channel_axes: Sequence[int],
    zero_rms: ArrayLike,
) -> tuple[QuantizedArray, _Facts | None]:
    """Returns the codes of a leaf, and facts; None if it has codes of the format."""
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
        return _copied(leaf), None
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
        _encode(_values(leaf), p_scale, scale, zero_rms, format=format, axes=axes)
    )
    if isinstance(scale, jax.core.Tracer):
        scale = jnp.where((scale > 0) & (scale < jnp.inf), scale, jnp.nan)
    return QuantizedArray(codes, scale, format), facts


def _values(leaf: Tree) -> jax.Array:
    return leaf.dequantize(jnp.float32) if is_quantized(leaf) else leaf


# Leaves of one shape share a program, and the host waits for none of them.
@partial(jax.jit, static_argnames=("format", "axes"))
def _encode(
    w: jax.Array,
    p_scale: ArrayLike | None,
    scale: jax.Array | None,
    zero_rms: ArrayLike,
    *,
    format: Format,
    axes: Sequence[int],
) -> tuple[jax.Array, jax.Array, _Facts]:
    """Returns the codes of a leaf, their scale (unless it is given), and the facts."""
    w = widen(w)
    rms = root_mean_square(w, axes, keepdims=True)
    max = jnp.max(jnp.abs(w), axis=axes, keepdims=True, initial=0)
    if scale is None:
        bound = bound_on_weights(p_scale, rms, max)
        # A channel of zeros takes the max of the scales of the others.
        others = jnp.max(bound, initial=0)
        of_zeros = bound_on_weights(p_scale, jnp.asarray(zero_rms, w.dtype), others)
        others = jnp.where(others == 0, of_zeros, others)
        scale = jnp.where(rms == 0, others, bound)
    scale = jnp.reshape(scale, jnp.shape(scale) or (1,) * w.ndim).astype(jnp.float32)
    x = divided_or_same(w, scale)
    code = format.nearest(x).astype(jnp.int32)
    facts = _Facts(
        jnp.max(max, initial=0),
        jnp.min(scale, initial=jnp.inf),
        jnp.max(scale, initial=0),
        jnp.max(max / jnp.where(scale > 0, scale, 1), initial=0),
        jnp.max(scale / jnp.where(rms > 0, rms, jnp.inf), initial=0),
    )
    return code.astype(format.storage_dtype), scale, facts


def _check_codes(
    paths: Sequence[str],
    leaves: Sequence[Leaf],
    coded: dict[int, tuple[QuantizedArray, _Facts | None]],
) -> None:
    """Warns of leaves that the format does not suit; raises if one has no scale."""
    facts_of = {i: facts for i, (_, facts) in coded.items() if facts is not None}
    known = {
        i: f for i, f in facts_of.items() if not isinstance(f.max, jax.core.Tracer)
    }
    zeros, clipped, lossy = [], [], []
    for i, facts in jax.device_get(known).items():  # all at once
        name, leaf, (q, _) = leaf_name("params", paths[i]), leaves[i], coded[i]
        if facts.min_scale > 0 and facts.max_scale < np.inf:
            # A weight that exceeds the scale by a rounding error is not an outlier.
            if facts.max_relative > 1 + 1e-5:
                clipped.append((name, fraction_above(_values(leaf), q.scale)))
            # Measuring the error takes as long as the rest, so only doubtful leaves pay
            # for it.
            elif facts.max_ratio > 0.25 * q.format.dynamic_range:
                lossy.append((name, _relative_error(_values(leaf), q)))
        elif facts.max == 0:
            zeros.append(name)
        else:
            raise ValueError(
                f"{name} (or one of its channels) is not finite, or out of float32's "
                f"range: the scale of its codes would be {facts.min_scale} to "
                f"{facts.max_scale}; initialise it with finite values, or leave it out "
                "with where."
            )
    if zeros:
        raise ValueError(
            f"leaves are all zeros, which madam and muon_madam never move in a "
            f"LogFormat: {listed(zeros)}; use a SymlogFormat, leave them out with "
            "where, initialise them with other values, or pass zero_init_scale to "
            "train them within with_quantized_params."
        )
    warn_of_leaves(in_percent(clipped), CLIPPED, stacklevel=3)
    warn_of_leaves(in_percent(lossy, above=0.25), _LOSSY, stacklevel=3)


@jax.jit
def _relative_error(w: jax.Array, q: QuantizedArray) -> jax.Array:
    """Returns the norm of the error, relative to the norm of the weights."""
    unit = jnp.max(q.scale)  # a unit in which squares do not overflow
    error, values = (
        jnp.sum(jnp.square(x / unit)) for x in (_values(q) - widen(w), widen(w))
    )
    return jnp.sqrt(error / values)


def decoded(params: Tree) -> Tree:
    """Decodes parameters for an optimizer, which computes in float32.

    Args:
      params: a tree of floats, which are returned unchanged, and codes.
    """
    return jax.tree.map(_values, params, is_leaf=is_quantized)


def split_module(params: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Returns the weights of an nnx module, and a function that makes a module of them.

    Other trees are returned unchanged. A module can exist only if Flax is imported.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.Module):
        return params, lambda tree: tree
    graph, weights, rest = nnx.split(params, nnx.Param, ...)
    rest = _copied(rest)  # so that the new module shares no variables
    return weights, lambda weights: nnx.merge(graph, weights, rest)
