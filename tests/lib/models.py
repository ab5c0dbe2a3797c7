"""What the tests of Flax share, whichever its API."""

import jax.numpy as jnp
import numpy as np
from flax.training import train_state


class TrainState(train_state.TrainState):
    batch_stats: dict


def images():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 16)
    x = rng.normal(size=(16, 4, 4, 1)) + y[:, None, None, None]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)
