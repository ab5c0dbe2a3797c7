"""Walking over parameter trees, leaf by leaf, and their per-leaf scalars.

A leaf is one parameter: a floating-point array, or a :class:`QuantizedArray`.
Scalars that belong to float leaves are kept in one vector in flatten order, float32
or as wide as the widest leaf, rather than in a tree of scalars: wrappers that copy a
parameter's sharding onto everything shaped like the parameter tree
(``flax.nnx.Optimizer``) cannot shard a scalar.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

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
    # promote_types would refuse float8.
    wide = jnp.result_type(leaf) == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts to the dtype of the arithmetic."""
    return jnp.asarray(x).astype(compute_dtype(x))


def largest_weight(dtype: Any) -> float:
    """The bound on any weight of a dtype: the number next to the largest.

    With it, ``w + u`` is finite even when ``u`` has been rounded to the dtype.
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
    """The paths of all leaves of a tree, with slashes: ``Dense_0/kernel``.

    Flax puts arrays in boxes: variables of nnx, and partitioned ones of linen. Each is
    a node with a single child, ``value``, which is left out of the path.
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


def flatten_named(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], Any]:
    """Flattens any tree into the names of its paths, leaves and treedef."""
    with_path, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = path_names([path for path, _ in with_path])
    return paths, [leaf for _, leaf in with_path], treedef


def flatten(params: Any, name: str = "params") -> tuple[list[str], list[Any], Any]:
    """Flattens a tree of parameters into paths, leaves and treedef.

    Raises:
      TypeError: if a leaf is neither real floating nor quantised.
    """
    paths, leaves, treedef = flatten_named(params, is_leaf=is_quantized)
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


def nodes_of(state: Any, kinds: Any) -> list[Any]:
    """The states of one kind, or of several, that an optimizer's state holds."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


def entries(leaves: int) -> tuple[int, ...]:
    """The shape of a vector with one entry per leaf, or of a scalar for no leaves.

    The scalar stands in for an empty vector, which Orbax refuses to save.
    """
    return (leaves,) if leaves else ()


def per_leaf(vector: jax.Array, leaves: Sequence[Any]) -> list[Any]:
    """Spreads one scalar per float leaf over all leaves; None for quantised ones.

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


def one_a_leaf(tree: Any, leaves: int, *, apart: bool = False) -> list[Any]:
    """Splits a tree of vectors, with one entry per leaf, into one tree per leaf.

    Args:
      tree: vectors of shape (leaves,); of 32 bits or bool if ``apart``.
      leaves: how many.
      apart: whether GPUs shall step each leaf in kernels of its own. Their compilers
        make one kernel of what has parts of the same vector as arguments. For cheap
        steps that is as good, but an expensive one then takes longer to run and to
        compile, and more memory.

    Returns:
      The trees, of scalars.
    """
    if not leaves:
        return []
    vectors, treedef = jax.tree.flatten(tree)
    if apart:
        parts = jax.lax.platform_dependent(
            vectors, cpu=_scalars, tpu=_scalars, default=_scalars_apart
        )
    else:
        parts = _scalars(vectors)
    return [treedef.unflatten(leaf) for leaf in parts]


def _scalars(vectors: list[jax.Array]) -> list[list[jax.Array]]:
    """For each leaf, its entries of vectors, as scalars."""
    # One operation splits a vector into all its parts, as this code is traced most
    # often.
    parts = [jax.lax.split(x, (1,) * len(x)) for x in vectors]
    parts = [[jax.lax.squeeze(x, (0,)) for x in part] for part in parts]
    return [list(leaf) for leaf in zip(*parts, strict=True)]


def _scalars_apart(vectors: list[jax.Array]) -> list[list[jax.Array]]:
    """As :func:`_scalars`, from an array of each leaf, with the bits of all entries."""
    # The first barrier keeps vectors from being computed part by part, and the second
    # keeps rows from being read where they are used.
    columns = [
        x.astype(jnp.uint32)
        if x.dtype == bool
        else jax.lax.bitcast_convert_type(x, jnp.uint32)
        for x in jax.lax.optimization_barrier(vectors)
    ]
    # Rows of two columns at least are put together, many in a kernel. A part of a
    # single vector would be a kernel of its own.
    table = jnp.stack(columns if len(columns) > 1 else columns * 2, axis=1)
    rows = jax.lax.optimization_barrier(jax.lax.split(table, (1,) * len(table)))
    return [
        [
            bits > 0 if x.dtype == bool else jax.lax.bitcast_convert_type(bits, x.dtype)
            for x, bits in zip(vectors, row[0], strict=False)
        ]
        for row in rows
    ]


def awaited(tree: Any) -> Any:
    """Returns a tree of arrays, once those on several CPU devices are computed.

    CPU devices share threads, in which two programs at once would wait for each other's
    collectives.
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
