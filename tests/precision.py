"""JAX with float64, for the length of a ``with``."""

import contextlib

import jax


def enable_x64(on: bool = True):
    """A context in which JAX has float64, or one that changes nothing."""
    if not on:
        return contextlib.nullcontext()
    # The name moved; either warns or is missing in the other half of jax 0.6 to 0.10.
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()
