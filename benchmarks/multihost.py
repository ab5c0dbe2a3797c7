"""Training on many hosts, of CPUs, GPUs or TPUs: one process on each, all the same.

On a TPU pod, under SLURM or Open MPI, the processes find each other::

    srun python -m benchmarks.multihost

Elsewhere each is told where the first one listens, how many there are, and its number,
from 0 (to try it, start both on one machine)::

    python -m benchmarks.multihost --coordinator localhost:1234 \
        --num-processes 2 --process-id 0

The batch is spread over the devices of all processes, the codes and the optimizer's
state are on every device, and all take the same step: random numbers included, which
depend on the seed, the step and the place of a weight, not on the device.
"""

import json
import zlib
from functools import partial

import jax
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import madax
from benchmarks.data import images as load_images
from benchmarks.workloads.images import MLP, classification


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
        num_processes: How many processes there are, likewise; 1 to train alone.
        process_id: Which one this is, likewise.
        steps: Optimizer steps.
        batch_size: Examples in a step, of all processes together.
    """
    if num_processes != 1:
        # What CPUs talk to each other by; GPUs and TPUs do not ask.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    if batch_size % jax.device_count():
        raise ValueError(
            f"batch_size must be a multiple of the {jax.device_count()} devices there "
            f"are, got {batch_size}"
        )

    workload = classification("digits", partial(MLP, 8), load_images("digits"))
    format = madax.LogFormat.from_dynamic_range(bits=8, ratio=100)
    tx = madax.madam(
        optax.cosine_decay_schedule(0.01, steps),
        moment_format=madax.MomentFormat(bits=8),
    )

    @partial(jax.jit, out_shardings=everywhere)
    def start(key):
        params = madax.quantize_params(workload.init(key), format)
        return params, tx.init(params)

    # Without out_shardings the compiler may leave each device with a part of the codes.
    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
    def step(params, state, batch):
        # The mean over the batch is one over all processes: gradients are theirs too.
        weights = madax.dequantize_params(params)
        loss, grads = jax.value_and_grad(workload.loss)(weights, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = start(jax.random.key(0))
    images, labels = map(np.asarray, workload.train)
    rng = np.random.default_rng(0)
    share = batch_size // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    loss = np.nan
    for _ in range(steps):
        # The same order in all processes, of which each loads its own share.
        rows = rng.choice(len(images), batch_size, replace=False)[mine]
        local = images[rows], labels[rows]
        batch = jax.tree.map(
            partial(jax.make_array_from_process_local_data, by_example), local
        )
        params, state, loss = step(params, state, batch)

    score = jax.jit(
        lambda p: workload.metric(madax.dequantize_params(p), workload.test)
    )
    accuracy = score(params)["accuracy"]
    codes = [x for x in jax.tree.leaves(params) if x.dtype == format.storage_dtype]
    result = {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "loss": float(loss),
        "accuracy": float(accuracy),
        "weights": sum(x.size for x in codes),
        "codes_crc32": zlib.crc32(b"".join(np.asarray(x).tobytes() for x in codes)),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    tyro.cli(multihost)
