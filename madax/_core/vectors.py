"""Vectors with one entry per leaf, and the values of arrays on the host."""

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.names import Tree


def shape_per_leaf(leaves: int) -> tuple[int, ...]:
    """Returns the shape of a vector with one entry per leaf; () for no leaves.

    A scalar replaces the empty vector, which Orbax refuses to save.
    """
    return (leaves,) if leaves else ()


def split_per_leaf(
    tree: Tree, leaves: int, *, separate_kernels: bool = False
) -> list[Tree]:
    """Splits a tree of vectors, with one entry per leaf, into trees of scalars.

    With ``separate_kernels``, for vectors of 32 bits, GPUs step each leaf in kernels of
    its own. Otherwise compilers make one kernel of all steps that read the same vector,
    which is fine for cheap steps, but takes more time and memory for expensive ones.
    """
    if not leaves:
        return []
    vectors, treedef = jax.tree.flatten(tree)
    if separate_kernels:
        parts = jax.lax.platform_dependent(
            vectors, cpu=_scalars, tpu=_scalars, default=_scalars_apart
        )
    else:
        parts = _scalars(vectors)
    return [treedef.unflatten(leaf) for leaf in parts]


def _scalars(vectors: list[jax.Array]) -> list[list[jax.Array]]:
    # One operation splits a vector into all its parts: this code is traced often.
    parts = [jax.lax.split(x, (1,) * len(x)) for x in vectors]
    parts = [[jax.lax.squeeze(x, (0,)) for x in part] for part in parts]
    return [list(leaf) for leaf in zip(*parts, strict=True)]


def _scalars_apart(vectors: list[jax.Array]) -> list[list[jax.Array]]:
    """:func:`_scalars` from one array per leaf, which holds the bits of its entries."""
    # The first barrier keeps XLA from computing vectors part by part, and the second
    # from reading rows where they are used.
    columns = [
        jax.lax.bitcast_convert_type(x, jnp.uint32)
        for x in jax.lax.optimization_barrier(vectors)
    ]
    # XLA puts many rows of two or more columns together in a kernel. A part of a single
    # vector would be a kernel of its own.
    table = jnp.stack(columns if len(columns) > 1 else columns * 2, axis=1)
    rows = jax.lax.optimization_barrier(jax.lax.split(table, (1,) * len(table)))
    return [
        [
            jax.lax.bitcast_convert_type(bits, x.dtype)
            for x, bits in zip(vectors, row[0], strict=False)
        ]
        for row in rows
    ]


def awaited(tree: Tree) -> Tree:
    """Returns a tree after waiting for its arrays on several CPU devices.

    CPU devices share threads, so two programs at once could deadlock in collectives.
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
