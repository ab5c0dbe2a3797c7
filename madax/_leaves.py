"""Walking over parameter trees, leaf by leaf, and their per-leaf scalars.

A leaf is one array of the parameter tree. Scalars that belong to a leaf are
kept in one float32 vector in flatten order rather than in a tree of scalars:
wrappers that copy a parameter's sharding onto everything shaped like the
parameter tree (``flax.nnx.Optimizer``) cannot shard a scalar.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madax._checks import check_float_leaf


def compute_dtype(dtype: Any) -> Any:
    """The dtype that arithmetic on ``dtype`` is done in: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts to the dtype of the arithmetic."""
    x = jnp.asarray(x)
    return x.astype(compute_dtype(x.dtype))


def path_name(path: Any) -> str:
    """A leaf's path as people write it: ``Dense_0/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(params: Any, name: str = "params") -> tuple[list[str], list[Any], Any]:
    """Flattens a tree into paths, leaves and treedef; rejects non-float leaves."""
    with_path, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_name(path) for path, _ in with_path]
    leaves = [leaf for _, leaf in with_path]
    for path, leaf in zip(paths, leaves, strict=True):
        check_float_leaf(name, path, leaf)
    return paths, leaves, treedef


def map_leaves(
    fn: Callable[..., Any], params: Any, updates: Any, *vectors: jax.Array
) -> Any:
    """Maps ``fn(w, u, *scalars)`` over the leaves of ``params`` and ``updates``.

    Args:
      fn: function of a weight leaf, its update and the leaf's own scalars.
      params: tree of floating-point arrays.
      updates: tree with the structure and shapes of ``params``.
      *vectors: per-leaf scalars, shape ``(number of leaves,)``, flatten order.

    Returns:
      A tree with the structure of ``params``.

    Raises:
      ValueError: if ``params`` is None or the trees do not match.
    """
    if params is None:
        raise ValueError(
            "params is None, but a multiplicative update is relative to the "
            "weights; call update(grads, state, params)."
        )
    paths, ws, treedef = flatten(params)
    us = flatten_like(updates, treedef, "params", paths, ws)
    for vector in vectors:
        if vector.shape != (len(ws),):
            raise ValueError(
                f"the optimizer state was made for {vector.shape[0]} leaves, but "
                f"params has {len(ws)}; call init again with these params."
            )
    scalars = zip(*vectors, strict=True) if vectors else ((),) * len(ws)
    out = [fn(w, u, *s) for w, u, s in zip(ws, us, scalars, strict=True)]
    return treedef.unflatten(out)


def flatten_like(
    updates: Any, treedef: Any, like: str, paths: Sequence[str], leaves: Sequence[Any]
) -> list[Any]:
    """Flattens ``updates``, which must match the tree called ``like``."""
    try:
        us = treedef.flatten_up_to(updates)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"updates and {like} must have the same tree structure, got updates "
            f"{jax.tree.structure(updates)} and {like} {treedef}; take the "
            "gradients with respect to these params."
        ) from error
    for path, u, leaf in zip(paths, us, leaves, strict=True):
        check_float_leaf("updates", path, u)
        if np.shape(u) != np.shape(leaf):
            raise ValueError(
                f"updates[{path!r}] has shape {np.shape(u)}, but {like}[{path!r}] "
                f"has shape {np.shape(leaf)}; take the gradients with respect to "
                "these params."
            )
    return us


def leaf_rms(params: Any) -> tuple[list[str], jax.Array]:
    """The paths of all leaves, and their root mean squares as one vector.

    Raises:
      TypeError: if ``params`` holds shapes (``jax.ShapeDtypeStruct``).
      ValueError: if a leaf is known to hold a NaN or an infinity.
    """
    paths, leaves, _ = flatten(params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TypeError(
            "init reads the values of params, got jax.ShapeDtypeStruct leaves; "
            "use jax.eval_shape(tx.init, params) for the shapes of the state."
        )
    rms = _rms_vector([jnp.asarray(leaf) for leaf in leaves])
    for path, value in zip(paths, known_values(rms), strict=False):
        if not np.isfinite(value):
            raise ValueError(
                f"params[{path!r}] holds a NaN or an infinity (root mean square "
                f"{value}); initialise it with finite values."
            )
    return paths, rms


def known_values(x: jax.Array) -> np.ndarray:
    """The values of ``x``, or an empty array under a JAX transformation."""
    return np.zeros(0) if isinstance(x, jax.core.Tracer) else np.asarray(x)


@jax.jit
def _rms_vector(leaves: Sequence[jax.Array]) -> jax.Array:
    def rms(w: jax.Array) -> jax.Array:
        w = jnp.abs(widen(w))
        # Relative to the largest weight, so that squares neither over- nor underflow.
        peak = jnp.max(w, initial=0)
        unit = jnp.where(peak > 0, peak, 1)
        mean = jnp.sum((w / unit) ** 2) / max(w.size, 1)
        return (peak * jnp.sqrt(mean)).astype(jnp.float32)

    return jnp.stack([rms(w) for w in leaves]) if leaves else jnp.zeros(0, jnp.float32)
