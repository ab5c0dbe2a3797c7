"""Trees in and out of Orbax's checkpoints."""

import jax
import orbax.checkpoint as ocp
import pytest

needs_set_mesh = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="Orbax needs a newer JAX to save from a mesh"
)


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, *target):
    """The tree at ``path``, as in a target: arrays, or what ``abstract`` makes."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


def abstract(tree, placed=None):
    """Shapes and dtypes, on those shardings; by default on the first device."""
    if placed is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda _: one, tree)
    like = lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)
    return jax.tree.map(like, tree, placed)
