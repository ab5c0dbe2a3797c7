"""Values that all devices share inside ``jax.shard_map``, despite their shards.

With ``check_vma=True``, the default, the type of a value says over which axes of the
mesh it varies between devices. Otherwise, and in ``jax.pmap``, this is unknown.
"""

from collections.abc import Callable

import jax

from madax._core.names import Tree


def manual_axes() -> tuple[str, ...]:
    """The mesh axes of the enclosing ``shard_map``; () outside of any."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def types_tell() -> bool:
    """Returns whether types say what varies, inside a ``shard_map``."""
    return bool(varying(jax.lax.axis_index(manual_axes()[0])))


def over_shards(
    reduce: Callable[[jax.Array, tuple[str, ...]], jax.Array],
    x: jax.Array,
    shared: Tree = (),
) -> jax.Array:
    """``x``, reduced over shards by a function such as ``jax.lax.pmax``.

    Shards are devices with the same ``shared`` but different ``x``, by their types, or
    all devices if types do not say.
    """
    axes = manual_axes()
    if axes and types_tell():
        axes = tuple(a for a in axes if a in varying(x) and a not in varying(shared))
    return reduce(x, axes) if axes else x


def varying(tree: Tree) -> frozenset[str]:
    """The axes over which some array of a tree varies, by its type."""
    # The name of the attribute changed in newer versions of JAX.
    kinds = map(jax.typeof, jax.tree.leaves(tree))
    found = (x.vma if hasattr(x, "vma") else x.manual_axis_type.varying for x in kinds)
    return frozenset().union(*found)


def in_auto_axes(
    fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    spec: jax.sharding.PartitionSpec | None = None,
) -> jax.Array:
    """``fn(x)``, where types of explicit axes would not tell the layout of its parts.

    The compiler chooses it then, as on a mesh of Auto axes. The result lies like ``x``,
    or by ``spec``.
    """
    mesh = jax.typeof(x).sharding.mesh
    # JAX has it since 0.7.
    if not mesh.explicit_axes or not hasattr(jax.sharding, "auto_axes"):
        return fn(x)
    out = jax.typeof(x).sharding if spec is None else jax.NamedSharding(mesh, spec)
    run: Tree = jax.sharding.auto_axes(fn, out_sharding=out)
    return run(x)


def spread(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Returns the array with a type that also varies over ``axes``."""
    more = tuple(sorted(axes - varying(x)))
    if not more:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, more, to="varying")
    return jax.lax.pvary(x, more)  # pyrefly: ignore[missing-attribute]


def barrier(tree: Tree) -> Tree:
    """An ``optimization_barrier``, left out where older JAX changes types by it."""
    leaves, treedef = jax.tree.flatten(tree)
    after = jax.lax.optimization_barrier(leaves)
    return treedef.unflatten(
        after if list(map(varying, after)) == list(map(varying, leaves)) else leaves
    )


def axes_returned(fn: Callable[..., Tree], *args: Tree) -> tuple[Tree, Tree]:
    """The shapes that a function returns, and the axes over which each leaf varies."""
    found: list[Tree] = []

    def run(*args):
        out = fn(*args)
        found.append(jax.tree.map(varying, out))
        return out

    return jax.eval_shape(run, *args), found[0]
