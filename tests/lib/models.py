"""What the tests of Flax share, whichever its API."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.training import train_state


class TrainState(train_state.TrainState):
    batch_stats: dict


def images():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 16)
    x = rng.normal(size=(16, 4, 4, 1)) + y[:, None, None, None]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def with_zeros_drawn(model):
    """The model, whose leaves that start at zero are drawn, so that all formats fit."""
    drawn = lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x if x.any() else drawn(x), state))
    return model


def nnx_list(modules):
    """A list of modules, as newer versions of Flax want it."""
    return nnx.List(modules) if hasattr(nnx, "List") else modules
