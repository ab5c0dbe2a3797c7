"""Where a scale lies, of which the codes are sharded."""

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def replicated(sharding: Sharding) -> Sharding:
    """The whole array on each device."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def of_scale(sharding: Sharding, scale: jax.Array) -> Sharding:
    """The sharding of codes, without the axes along which there is one scale."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = zip(scale.shape, sharding.spec, strict=False)
    spec = [None if n == 1 else on for n, on in axes]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
