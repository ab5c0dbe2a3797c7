"""The cost of an optimizer: the time of its step alone, and memory."""

import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks.lib.contender import Contender
from benchmarks.lib.steps import nbytes
from benchmarks.workloads import Workload


def cost(
    workload: Workload, contender: Contender, *, repeats: int = 300
) -> dict[str, float]:
    """Measures the step from gradients to new parameters, at the default rate.

    Args:
      workload: gives the parameters.
      contender: what to measure.
      repeats: steps timed, each on its own, after warm-up.

    Returns:
      ``step_us``, median microseconds per step, compiled and with donated buffers, as
      seen from Python; ``bytes_per_weight``, parameters and optimizer state.
    """
    weights = workload.init(jax.random.key(0))
    # Any values will do: no optimizer here takes longer for some than for others.
    grads = jax.tree.map(jnp.ones_like, weights)
    params = jax.jit(contender.store)(weights)
    state = jax.jit(contender.tx.init)(params)

    step = jax.jit(contender.step, donate_argnums=(0, 1))
    stored = nbytes((params, state))
    times = []
    for _ in range(repeats + 10):
        begin = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, grads))
        times.append(time.perf_counter() - begin)
    return {
        "step_us": 1e6 * statistics.median(times[10:]),
        "bytes_per_weight": stored / sum(x.size for x in jax.tree.leaves(weights)),
    }
