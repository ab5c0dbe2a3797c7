"""Training on many hosts, of CPUs, GPUs or TPUs: one process on each, all the same.

On a TPU pod, under SLURM or Open MPI, the processes find each other::

    srun python -m benchmarks.systems.multihost

Elsewhere each is told where the first one listens, how many there are, and its number,
from 0 (to try it, start both on one machine)::

    python -m benchmarks.systems.multihost --coordinator localhost:1234 \
        --num-processes 2 --process-id 0

The batch is spread over the devices of all processes, the codes and the optimizer's
state are on every device, and all take the same step: random numbers included, which
depend on the seed, the step and the place of a weight, not on the device.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import madax
from benchmarks.data import images as load_images
from benchmarks.workloads import Workload
from benchmarks.workloads.images import MLP, classification

FORMAT = madax.LogFormat.from_dynamic_range(bits=8, ratio=100)


def multihost(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    steps: int = 500,
    batch_size: int = 64,
) -> None:
    """Train a network on digits, in 8 bits, on the devices of all processes.

    Each process prints one line of JSON at the end, all the same but for its number.

    Args:
        coordinator: Address HOST:PORT of process 0; found on TPUs and under SLURM.
        num_processes: Number of processes, found likewise; 1 to train alone.
        process_id: Number of this process, found likewise.
        steps: Optimizer steps.
        batch_size: Examples in a step, of all processes together.
    """
    if num_processes != 1:
        # CPUs talk to each other by gloo; GPUs and TPUs do not use this setting.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    if batch_size % jax.device_count():
        raise ValueError(
            f"batch_size must be a multiple of the {jax.device_count()} devices there "
            f"are, got {batch_size}"
        )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    workload = classification("digits", partial(MLP, 8), load_images("digits"))
    tx = madax.madam(
        optax.cosine_decay_schedule(0.01, steps),
        moment_format=madax.MomentFormat(bits=8),
    )
    start, step = programs(workload, tx, mesh)
    params, state = start(jax.random.key(0))
    loss = np.nan
    for batch in batches(workload, mesh, steps, batch_size):
        params, state, loss = step(params, state, batch)
    print(json.dumps(summary(workload, params, loss)), flush=True)


def programs(
    workload: Workload, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns what makes parameters and state from a key, and the train step."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=everywhere)
    def start(key):
        params = madax.quantize_params(workload.init(key), FORMAT)
        return params, tx.init(params)

    # Without out_shardings the compiler may leave each device with a part of the codes.
    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
    def step(params, state, batch):
        # The loss is a mean over all processes, and so are its gradients.
        weights = madax.dequantize_params(params)
        loss, grads = jax.value_and_grad(workload.loss)(weights, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return start, step


def batches(
    workload: Workload, mesh: Mesh, steps: int, batch_size: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields batches spread over the devices of all processes."""
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    images, labels = map(np.asarray, workload.train)
    rng = np.random.default_rng(0)
    share = batch_size // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for _ in range(steps):
        # All processes draw the same order, and each loads its own share of it.
        rows = rng.choice(len(images), batch_size, replace=False)[mine]
        local = images[rows], labels[rows]
        yield jax.tree.map(
            partial(jax.make_array_from_process_local_data, by_example), local
        )


def summary(
    workload: Workload, params: optax.Params, loss: jax.Array | float
) -> dict[str, Any]:
    """Returns what a process prints, with a checksum of all codes."""
    score = jax.jit(
        lambda p: workload.metric(madax.dequantize_params(p), workload.test)
    )
    accuracy = score(params)["accuracy"]
    codes = [x for x in jax.tree.leaves(params) if x.dtype == FORMAT.storage_dtype]
    return {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "loss": float(loss),
        "accuracy": float(accuracy),
        "weights": sum(x.size for x in codes),
        "codes_crc32": zlib.crc32(b"".join(np.asarray(x).tobytes() for x in codes)),
    }


if __name__ == "__main__":
    tyro.cli(multihost)
