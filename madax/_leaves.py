"""Walking over parameter trees, leaf by leaf, and their per-leaf scalars.

A leaf is one parameter: a floating-point array, or a :class:`QuantizedArray`.
Scalars that belong to float leaves are kept in one vector in flatten order, float32
or as wide as the widest leaf, rather than in a tree of scalars: wrappers that copy a
parameter's sharding onto everything shaped like the parameter tree
(``flax.nnx.Optimizer``) cannot shard a scalar.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._checks import check_float_leaf, leaf_name
from madax._quantized_array import is_quantized


def compute_dtype(leaf: Any) -> Any:
    """The dtype that arithmetic on a leaf is done in: float32 or wider."""
    if is_quantized(leaf):
        return jnp.dtype(jnp.float32)
    # Not promote_types, which refuses float8.
    wide = jnp.result_type(leaf) == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts to the dtype of the arithmetic."""
    return jnp.asarray(x).astype(compute_dtype(x))


def largest_weight(dtype: Any) -> float:
    """The bound on any weight of a dtype: the number next to the largest.

    So that ``w + u`` is finite when ``u`` has been rounded to the dtype, too.
    """
    info = jnp.finfo(dtype)
    largest = float(info.max)
    _, exponent = math.frexp(largest)
    return largest - float(info.eps) * 2.0 ** (exponent - 1)


def zeros_like(leaf: Any, dtype: Any = None) -> jax.Array:
    """Zeros of a leaf's shape and sharding, by default to do arithmetic in."""
    array = leaf.codes if is_quantized(leaf) else leaf
    return jnp.zeros_like(array, compute_dtype(leaf) if dtype is None else dtype)


def path_names(paths: Sequence[jax.tree_util.KeyPath]) -> list[str]:
    """The paths of all leaves of a tree as people write them: ``Dense_0/kernel``.

    The boxes that Flax puts arrays in, variables of nnx and partitioned ones of linen,
    are no part of a path: each is a node of its own with a single child, ``value``.
    """
    below = Counter(path[:i] for path in paths for i in range(len(path)))
    value = jax.tree_util.GetAttrKey("value")
    return [
        jax.tree_util.keystr(
            path[:-1] if path[-1:] == (value,) and below[path[:-1]] == 1 else path,
            simple=True,
            separator="/",
        )
        for path in paths
    ]


def flatten(params: Any, name: str = "params") -> tuple[list[str], list[Any], Any]:
    """Flattens a tree of parameters into paths, leaves and treedef.

    Raises:
      TypeError: if a leaf is neither real floating nor quantised.
    """
    with_path, treedef = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=is_quantized
    )
    paths = path_names([path for path, _ in with_path])
    leaves = [leaf for _, leaf in with_path]
    for path, leaf in zip(paths, leaves, strict=True):
        if is_quantized(leaf):
            leaf.check_has_codes()
        else:
            check_float_leaf(name, path, leaf)
    return paths, leaves, treedef


def flatten_like(
    updates: Any, treedef: Any, like: str, paths: Sequence[str], leaves: Sequence[Any]
) -> list[Any]:
    """Flattens float ``updates``, which must match the tree called ``like``."""
    try:
        us = treedef.flatten_up_to(updates)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"updates and {like} must have the same tree structure, got updates "
            f"{jax.tree.structure(updates)} and {like} {treedef}; take the "
            "gradients with respect to these params."
        ) from error
    for path, u, leaf in zip(paths, us, leaves, strict=True):
        if isinstance(u, optax.MaskedNode):
            raise ValueError(
                f"{leaf_name('updates', path)} is masked, but {leaf_name(like, path)} "
                "is not; mask by path, or with a tree of booleans or labels: gradients "
                "are arrays even where params are a QuantizedArray."
            )
        check_float_leaf("updates", path, u)
        if np.shape(u) != np.shape(leaf):
            raise ValueError(
                f"{leaf_name('updates', path)} has shape {np.shape(u)}, but "
                f"{leaf_name(like, path)} has shape {np.shape(leaf)}; take the "
                "gradients with respect to these params."
            )
    return us


def flatten_both(
    params: Any, updates: Any
) -> tuple[list[str], list[Any], list[Any], Any]:
    """Paths and leaves of ``params``, leaves of matching ``updates``, and the treedef.

    Raises:
      ValueError: if ``params`` is None or the trees do not match.
    """
    if params is None:
        raise ValueError(
            "params is None, but a multiplicative update is relative to the "
            "weights; call update(grads, state, params)."
        )
    paths, ws, treedef = flatten(params)
    return paths, ws, flatten_like(updates, treedef, "params", paths, ws), treedef


def entries(leaves: int) -> tuple[int, ...]:
    """The shape of a vector with an entry a leaf, or of a scalar where there is none.

    Not of an empty vector: Orbax refuses to save one.
    """
    return (leaves,) if leaves else ()


def per_leaf(vector: jax.Array, leaves: Sequence[Any]) -> list[Any]:
    """Spreads one scalar a float leaf over all leaves; None for quantised ones.

    Raises:
      ValueError: if ``vector`` was made for other leaves.
    """
    floats = [i for i, leaf in enumerate(leaves) if not is_quantized(leaf)]
    if vector.shape != entries(len(floats)):
        raise ValueError(
            f"the optimizer state was made for {sum(vector.shape)} float leaves, but "
            f"params has {len(floats)}; call init again with these params."
        )
    scalars: list[Any] = [None] * len(leaves)
    for i, scalar in zip(floats, one_a_leaf(vector, len(floats)), strict=True):
        scalars[i] = scalar
    return scalars


def one_a_leaf(tree: Any, leaves: int) -> list[Any]:
    """A tree of arrays whose first axis is that of the leaves, as one tree a leaf."""
    arrays, treedef = jax.tree.flatten(tree)
    # All parts of an array by one operation: it is what is traced most often.
    parts = [jax.lax.split(x, (1,) * leaves) if leaves else () for x in arrays]
    parts = [[jax.lax.squeeze(x, (0,)) for x in part] for part in parts]
    return [treedef.unflatten(leaf) for leaf in zip(*parts, strict=True)]


def float_leaf_sizes(params: Any) -> tuple[list[str], jax.Array, jax.Array]:
    """The paths of the float leaves, their root mean squares, and largest magnitudes.

    Raises:
      TypeError: if ``params`` holds shapes (``jax.ShapeDtypeStruct``), or floats of
        less than 16 bits.
      ValueError: if a leaf is known to hold a NaN or an infinity.
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
    for path, leaf in floats:
        if jnp.result_type(leaf).itemsize < 2:
            raise TypeError(
                f"{leaf_name('params', path)} has dtype {jnp.result_type(leaf)}, in "
                "which updates of a few per cent are lost; use bfloat16 or wider, or "
                "codes, made by quantize_params."
            )
    paths = [path for path, _ in floats]
    rms, peaks = _leaf_sizes([jnp.asarray(leaf) for _, leaf in floats])
    for path, value in zip(paths, known_values(rms), strict=False):
        if not np.isfinite(value):
            raise ValueError(
                f"{leaf_name('params', path)} holds a NaN or an infinity (root "
                f"mean square {value}); initialise it with finite values."
            )
    return paths, rms, peaks


class InitialScales(NamedTuple):
    """What is kept of the float leaves at init, in vectors with an entry a leaf.

    Attributes:
      paths: the leaves' paths.
      rms0: their scales: root mean squares, or what stands in for that of a leaf that
        is all zeros.
      zero_init: which are all zeros.
      peak0: their largest magnitudes.
    """

    paths: list[str]
    rms0: jax.Array
    zero_init: jax.Array
    peak0: jax.Array


def initial_scales(params: Any, zero_init_scale: jax.typing.ArrayLike) -> InitialScales:
    """The scales of the float leaves; raises what :func:`float_leaf_sizes` does."""
    paths, rms, peaks = float_leaf_sizes(params)
    zero_init = rms == 0
    scales = jnp.where(zero_init, jnp.asarray(zero_init_scale, rms.dtype), rms)
    return InitialScales(paths, scales, zero_init, peaks)


def check_code_scales(params: Any) -> None:
    """Raises if a scale of codes is known not to be a positive, finite number.

    ``quantize_params`` under ``jit``, where it knows no values, makes it NaN.
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
                f"{leaf_name('params', path)} holds codes without a scale, or one of "
                "its channels does: the weights were all zeros or not finite. "
                "Initialise them with finite values that are not all zero, or leave "
                "them out with where; quantize_params says so outside of jax.jit."
            )


@jax.jit
def _usable(scale: jax.Array) -> jax.Array:
    return jnp.all((scale > 0) & (scale < jnp.inf))


def awaited(tree: Any) -> Any:
    """A tree of arrays, once they are there if they lie on several CPU devices.

    Those share threads, in which programs that are under way at once would wait for
    each other's collectives.
    """
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            devices = x.sharding.device_set
            if len(devices) > 1 and next(iter(devices)).platform == "cpu":
                jax.block_until_ready(x)
    return tree


def known_values(x: jax.Array) -> np.ndarray:
    """The values of ``x``, or an empty array under a JAX transformation."""
    return np.zeros(0) if isinstance(x, jax.core.Tracer) else np.asarray(x).ravel()


@jax.jit
def _leaf_sizes(leaves: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The root mean square and the peak of each array, float32 or wider, as vectors."""
    if not leaves:
        return jnp.ones(entries(0), jnp.float32), jnp.zeros(entries(0), jnp.float32)
    peaks = [jnp.max(jnp.abs(widen(w)), initial=0) for w in leaves]
    return jnp.stack([root_mean_square(w) for w in leaves]), jnp.stack(peaks)


@jax.jit
def share_beyond(w: jax.Array, bound: jax.Array) -> jax.Array:
    """The share of weights that are beyond a bound, by more than a rounding."""
    return jnp.sum(jnp.abs(widen(w)) > bound * (1 + 1e-5)) / max(np.size(w), 1)


def root_mean_square(
    w: jax.Array, axes: Sequence[int] | None = None, *, keepdims: bool = False
) -> jax.Array:
    """The root mean square over ``axes``, float32 or wider, at any scale of ``w``.

    That of nothing is 1: there is nothing to scale, but it is not "all zeros". That of
    anything not finite is NaN.
    """
    axes = tuple(range(w.ndim)) if axes is None else tuple(axes)
    rms = _root_mean_square(axes, widen(w))
    return rms if keepdims else jnp.squeeze(rms, axes)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _root_mean_square(axes: tuple[int, ...], w: jax.Array) -> jax.Array:
    peak, relative = split_peak(jnp.abs(w), axes)
    mean = (relative / 2) ** 2
    for axis in axes:
        mean = _orderless_mean(mean, axis) if w.size else jnp.full_like(peak, 0.25)
    return jnp.where(jnp.isfinite(peak), peak * (2 * jnp.sqrt(mean)), jnp.nan)


@_root_mean_square.defjvp
def _root_mean_square_jvp(axes, primals, tangents):
    # Sums of integers have no derivative.
    (w,), (t,) = primals, tangents
    rms = _root_mean_square(axes, w)
    relative = w / jnp.where(rms > 0, rms, 1)
    return rms, jnp.mean(relative * t, axes, keepdims=True, where=rms > 0)


def _orderless_mean(x: jax.Array, axis: int) -> jax.Array:
    """The mean of numbers in [0, 1], the same bits in whatever order they are added.

    So a leaf has the same scale on one device and on a mesh, where partial sums of
    floats would round differently. Each number is cut into digits, and the digits are
    added up as integers. They are narrow enough for the sum to fit 32 bits.
    """
    count = x.shape[axis]
    width = min(24, 32 - count.bit_length())
    digits = -(-(jnp.finfo(x.dtype).nmant + 7) // width)
    total = jnp.zeros((), x.dtype)
    for i in range(1, digits + 1):
        x *= 2.0**width
        digit = jnp.floor(x)
        x -= digit
        summed = jnp.sum(digit.astype(jnp.uint32), axis=axis, keepdims=True)
        total += summed.astype(x.dtype) * 2.0 ** (-width * i)
    return total / count


def split_peak(
    x: jax.Array, axes: Sequence[int] | None = None
) -> tuple[jax.Array, jax.Array]:
    """A magnitude and ``x`` relative to it, so that squares of ``x`` do not overflow.

    The magnitude is that of the largest over ``axes``, kept as axes of size 1, or 1 if
    that is zero; a power of two, so that the quotient is exact, however it is computed.
    The relative values are in [-2, 2].
    """
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    info = jnp.finfo(x.dtype)
    power = jax.lax.reduce_precision(0.75 * largest, info.nexp, 0)
    # Of a power of two, that was a tie: to either side, by its exponent.
    power = jnp.where(2 * power <= largest, 2 * power, power)
    peak = jnp.where(largest == 0, 1, jnp.maximum(power, info.tiny))
    # The reciprocal of the largest floats would underflow.
    shrink = jnp.where(peak > 1, 0.125, 1.0).astype(x.dtype)
    return peak, (x * shrink) / (peak * shrink)
