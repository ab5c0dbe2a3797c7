"""Two processes, as on two hosts, train as one does.

This file is also the script that the two run: ``address process path``.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import processes
import pytest
from cases import FORMATS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    Run,
    enter,
    make_mesh,
    place,
    random_weights,
    start,
    values,
)
from processes import address

import madax

# Half of the mesh is in each of the processes.
NAME, LEAVES = "moments8", ("bias", "log16", "symlog8")
CHANNELS = "scales of channels"


def trained_in_one_of_two(coordinator, process, path):
    """Trains on the four devices of this process and on four of another's."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Importing madax and making optimizers, above, has started no device yet.
    jax.distributed.initialize(coordinator, 2, process)
    assert (jax.local_device_count(), jax.device_count()) == (4, 8)
    found = {}

    def record(name, tree):
        everywhere = NamedSharding(make_mesh("auto"), P())
        gathered = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
        for i, leaf in enumerate(jax.tree.leaves(gathered)):
            found[f"{name} {i}"] = np.asarray(leaf)

    with enter(make_mesh("auto")):
        trained = Run(NAME, *start(LEAVES, "auto", "fsdp"))
    assert not all(values(w).is_fully_addressable for w in trained.params.values())
    record(NAME, (trained.params, trained.state))

    # These calls are eager. No process has all channels, or may ask for their values.
    w = place(random_weights()["log8"], "log8", "auto", "tensor_parallel")
    with enter(make_mesh("auto")):
        codes = madax.quantize_params(w, FORMATS["log8"], channel_axis=-1)
    assert not codes.scale.is_fully_addressable
    record(CHANNELS, codes)
    np.savez(path, **found)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    def make(path):
        coordinator, other = address(), path.with_suffix(".other")
        both = [(0, path.with_suffix(".npz")), (1, other.with_suffix(".npz"))]
        processes.finish(
            *(processes.start(__file__, coordinator, *b, devices=4) for b in both)
        )
        both[0][1].rename(path)

    with np.load(processes.once(tmp_path_factory, "two_processes", make)) as file:
        return dict(file)


def assert_found(found, name, tree):
    leaves = jax.tree.leaves(tree)
    assert len(leaves) == sum(key.startswith(f"{name} ") for key in found)
    for i, expected in enumerate(leaves):
        actual = found[f"{name} {i}"]
        assert actual.dtype == expected.dtype
        assert actual.tobytes() == np.asarray(expected).tobytes(), (name, i)


def test_training_in_two_processes_matches_one_device(found):
    one = Run(NAME, *start(LEAVES))
    assert_found(found, NAME, (one.params, one.state))


def test_channels_in_two_processes_have_the_scales_of_one_device(found):
    w = place(random_weights()["log8"], "log8", None, None)
    codes = madax.quantize_params(w, FORMATS["log8"], channel_axis=-1)
    assert_found(found, CHANNELS, codes)


# --- the example of it, as people start it --------------------------------------------


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the example prints, in one process of two devices and in two of one."""

    def make(path):
        example = ["-m", "benchmarks.systems.multihost", "--steps", 50]
        two = [*example, "--coordinator", address(), "--num-processes", 2]
        lines = processes.finish(
            processes.start(*example, "--num-processes", 1, devices=2),
            processes.start(*two, "--process-id", 0),
            processes.start(*two, "--process-id", 1),
        )
        path.write_text("".join(line.splitlines()[-1] + "\n" for line in lines))

    path = processes.once(tmp_path_factory, "multihost.jsonl", make)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.nightly
def test_the_example_is_the_same_in_two_processes(printed):
    alone, *pair = printed
    who = ("process", "processes", "devices")
    assert [[result.pop(key) for key in who] for result in (alone, *pair)] == [
        [0, 1, 2],
        [0, 2, 2],
        [1, 2, 2],
    ]
    # A sum of two gradients has one order only, so these are the same bits.
    assert alone == pair[0] == pair[1]


@pytest.mark.nightly
def test_the_example_learns(printed):
    assert printed[0]["accuracy"] > 0.8
    assert printed[0]["weights"] == 64 * 256 + 256 * 256 + 256 * 10


if __name__ == "__main__":
    trained_in_one_of_two(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
