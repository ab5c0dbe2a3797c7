"""Compilers for accelerators that need not be there, and what a program takes there.

Nothing is run. XLA compiles for a TPU if the package libtpu is there, and for a GPU if
those of ``jax[cuda12]`` are (``pip install '.[compilers]'``).
"""

import contextlib
import dataclasses
import math
import os
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from benchmarks.compilers.programs import SIZES

# Compilers answer only in a process that was started with these variables.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}
# XLA's GpuTargetConfigProto: what its own specifications say of these GPUs, in
# xla/backends/gpu/target_config/specs, as far as it is needed.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
  driver_version: "12.9.0" runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_HOPPER = {
    "shared": 233472,
    "threads": 2048,
    "cores": 132,
    "cache": 52428800,
    "clock": 1.98,
    "optin": 232448,
    "major": 9,
    "minor": 0,
}
_ADA = {
    "shared": 102400,
    "threads": 1536,
    "optin": 101376,
    "major": 8,
    "minor": 9,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
      memory: bytes that a program may take.
      topology: of TPUs, by the number of chips: the name and arguments that XLA knows.
      gpu: of a GPU, fields of XLA's specification.
    """

    memory: int
    topology: dict[int, tuple[str, dict[str, Any]]] | None = None
    gpu: dict[str, Any] | None = None

    def devices(self, count: int = 1) -> list[jax.Device]:
        """Returns devices of this chip, on which to put the shapes to compile for."""
        missing = {
            k: v for k, v in ENVIRONMENT.items() if v not in os.environ.get(k, "")
        }
        if missing:
            raise RuntimeError(f"start Python with the environment {missing}.")
        from jax.experimental import topologies

        if self.gpu is not None:
            config = _GPU.format(memory=self.memory, **self.gpu)
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=config,
                topology=f"1x1x{count}",
            )
        else:
            assert self.topology is not None
            name, options = self.topology[count]
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=name, **options
            )
        return list(found.devices)


CHIPS = {
    # XLA keeps some of the 16, 95 and 32 GiB.
    "TPU v5e": Chip(
        int(15.75 * 2**30),
        {
            1: ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
            4: ("v5e:2x2", {}),
            16: ("v5e:4x4", {}),
            256: ("v5e:16x16", {}),
        },
    ),
    "TPU v5p": Chip(
        int(95.74 * 2**30),
        {1: ("v5:1x1x1", {"chips_per_host_bounds": (1, 1, 1)}), 4: ("v5:2x2x1", {})},
    ),
    "TPU v6e": Chip(
        int(31.25 * 2**30), {1: ("v6e:1x1", {"chips_per_host_bounds": (1, 1, 1)})}
    ),
    "H100": Chip(
        84942979072,
        gpu=_HOPPER | {"bandwidth": 3352320000000, "name": "NVIDIA H100 80GB HBM3"},
    ),
    "H200": Chip(
        151397597184,
        gpu=_HOPPER | {"bandwidth": 4800000000000, "name": "NVIDIA H200"},
    ),
    "B200": Chip(
        191514411008,
        gpu=_HOPPER
        | {
            "bandwidth": 7672320000000,
            "cores": 148,
            "cache": 132644864,
            "clock": 1.965,
            "major": 10,
            "name": "NVIDIA B200",
        },
    ),
    "RTX 4090": Chip(
        25393692672,
        gpu=_ADA
        | {
            "cores": 128,
            "cache": 75497472,
            "clock": 2.52,
            "bandwidth": 1008096000000,
            "name": "NVIDIA GeForce RTX 4090",
        },
    ),
    # Of its 12 GiB as much as XLA knows of the 24 of the other.
    "RTX 4070": Chip(
        25393692672 // 2,
        gpu=_ADA
        | {
            "cores": 46,
            "cache": 37748736,
            "clock": 2.475,
            "bandwidth": 504048000000,
            "name": "NVIDIA GeForce RTX 4070",
        },
    ),
}


def compiler(chip: str) -> str | None:
    """Returns the package that compiles for a key of ``CHIPS``, or for "CPU".

    Returns:
      Its name and version; None if it is not installed.
    """
    packages = ["jaxlib"]
    if chip != "CPU":
        is_gpu = CHIPS[chip].gpu is not None
        packages = ["jax-cuda12-plugin", "jax-cuda13-plugin"] if is_gpu else ["libtpu"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return None


def footprint(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns what a compiled program takes of each device's memory, in bytes."""
    used = compiled.memory_analysis()
    assert used is not None
    return {
        "arguments": used.argument_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "peak": used.argument_size_in_bytes
        + used.temp_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes,
    }


def gathered(text: str) -> dict[str, int]:
    """Returns the bytes of the results of all-gathers in a program, by dtype."""
    total: dict[str, int] = {}
    for line in text.splitlines():
        found = re.search(r"= (.*?)\ball-gather(-start)?\(", line)
        if found is not None:
            # The type of an asynchronous one is a pair: what goes in, and what comes
            # out.
            dtype, dims = re.findall(r"(\w+)\[([\d,]*)\]", found[1])[-1]
            size = SIZES.get(dtype, 4) * math.prod(map(int, dims.split(",")))
            total[dtype] = total.get(dtype, 0) + size
    return total


def needed(error: Exception) -> int | None:
    """Returns the bytes that a refused TPU program needs, from its error."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
    if found is None:
        return None
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
