"""Shardings of scales, for codes that are sharded."""

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def replicated(sharding: Sharding) -> Sharding:
    """Returns a sharding with the whole array on each device of another sharding."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def of_scale(sharding: Sharding, scale: jax.Array) -> Sharding:
    """Returns a sharding of codes without the axes along which the scale has size 1."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = zip(scale.shape, sharding.spec, strict=False)
    spec = [None if n == 1 else on for n, on in axes]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
