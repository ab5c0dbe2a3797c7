"""Training that is stopped, and goes on elsewhere or later as if it had not been.

This file is also the script that is killed: ``directory stop_at moment``.
"""

import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import processes
import pytest
from cases import FORMATS, OPTIMIZERS
from checkpoints import abstract, needs_set_mesh, restore, save
from helpers import different, mostly_nightly
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import SHAPES, spec, start_all, values

import madax
from madax import MomentFormat

# --- on another mesh ------------------------------------------------------------------

EVERY_STATE = OPTIMIZERS | {
    "schedule": madax.madam(optax.cosine_decay_schedule(0.01, 100)),
    "injected": optax.inject_hyperparams(madax.madam)(learning_rate=0.01),
    "wrapped_sgd": madax.with_quantized_params(optax.sgd(0.1, momentum=0.9)),
}


def shardings(tree, mesh, layout):
    """For every array of a tree, by its shape: leaves have shapes of their own."""
    specs = {shape: spec(layout, k) for k, shape in SHAPES.items()}
    return jax.tree.map(lambda x: NamedSharding(mesh, specs.get(x.shape, P())), tree)


def mesh_of(rows, columns):
    return jax.make_mesh(
        (rows, columns),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: rows * columns],
    )


def arbitrary(tree):
    """A tree of the same types, of any bits: infinities and NaN too."""
    rng = np.random.default_rng(0)

    def fill(x):
        values = np.frombuffer(rng.bytes(x.size * x.dtype.itemsize), x.dtype)
        if x.dtype == bool:
            values = rng.integers(0, 2, x.size) > 0
        return np.reshape(values, x.shape)

    return jax.tree.map(fill, tree)


@pytest.mark.nightly
@needs_set_mesh
def test_every_state_moves_from_eight_devices_to_four_to_one(tmp_path):
    params, _ = start_all()
    states = {k: jax.eval_shape(tx.init, params) for k, tx in EVERY_STATE.items()}
    like = {"params": params, "states": states}
    tree = arbitrary(like)
    assert len(jax.tree.leaves(tree)) > 150
    meshes = [
        (mesh_of(2, 4), "fsdp"),
        (mesh_of(2, 2), "tensor_parallel"),
        (mesh_of(1, 1), "data_parallel"),
    ]
    before = jax.device_put(tree, shardings(tree, *meshes[0]))
    for i, (mesh, layout) in enumerate(meshes):
        save(tmp_path / str(i), before)
        asked = shardings(tree, mesh, layout)
        after = restore(tmp_path / str(i), abstract(like, asked))
        assert different(after, tree) == []
        for x, sharding in zip(
            jax.tree.leaves(after), jax.tree.leaves(asked), strict=True
        ):
            assert x.sharding == sharding
        v = after["states"]["moments8"].direction.nu["log8"]
        assert len(v.sharding.device_set) == mesh.size
        before = after


# --- killed at any moment -------------------------------------------------------------

LAST, EVERY = 16, 4
KILLED = madax.madam(0.02, b1=0.9, moment_format=MomentFormat(8), seed=7)


@jax.jit
def fresh():
    rng = np.random.default_rng(0)
    shapes = {"hidden": (16, 64), "bias": (64,), "out": (64, 8)}
    weights = {k: jnp.float32(rng.normal(size=s) / 8) for k, s in shapes.items()}
    params = madax.quantize_params(weights, FORMATS["log8"])
    return {"params": params, "state": KILLED.init(params)}


@jax.jit
def train_step(params, state, i):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (32, 16))

    def loss(w):
        return jnp.mean(
            (jnp.tanh(x @ w["hidden"] + w["bias"]) @ w["out"] - x[:, :8]) ** 2
        )

    grads = jax.grad(loss)(madax.dequantize_params(params))
    updates, state = KILLED.update(grads, state, params)
    return {"params": optax.apply_updates(params, updates), "state": state}


def train(directory, stop_at=None, moment=""):
    """Trains from the newest checkpoint to the end, or until it is killed."""
    options = ocp.CheckpointManagerOptions(save_interval_steps=EVERY, max_to_keep=2)
    with ocp.CheckpointManager(directory, options=options) as manager:
        tree, done = fresh(), manager.latest_step()
        if done is not None:
            target = ocp.args.StandardRestore(abstract(tree))
            tree = manager.restore(done, args=target)
        print("resumed from", done, flush=True)
        for i in range(0 if done is None else done + 1, LAST + 1):
            tree = train_step(**tree, i=i)
            manager.save(i, args=ocp.args.StandardSave(tree))
            if i == stop_at:
                if moment == "after a save":
                    manager.wait_until_finished()
                print("stopped, perhaps in the middle of a save", flush=True)
                signal.pause()
    return tree


def kill(directory, stop_at, moment):
    """Kills a run at a step; the step that it had resumed from."""
    child = processes.start(__file__, directory, stop_at, moment)
    lines = [child.stdout.readline(), child.stdout.readline()]
    os.kill(child.pid, signal.SIGKILL)
    _, errors = child.communicate(timeout=processes.TIMEOUT)
    assert child.returncode == -signal.SIGKILL, errors
    assert lines[1].startswith("stopped"), errors
    return lines[0].split()[-1]


# The step at which a run is killed. A save goes on beside it unless it is waited for.
MOMENTS = {"in a save": 8, "after a save": 12, "between saves": 9}


@pytest.fixture(
    scope="module",
    params=mostly_nightly(MOMENTS, "in a save"),
)
def killed_and_not(request, tmp_path_factory):
    """A run that was killed and one that was not, from the last checkpoints."""
    moment, stop_at = request.param, MOMENTS[request.param]

    def make(path):
        assert kill(path / "killed", stop_at, moment) == "None"
        again = processes.start(__file__, path / "killed", LAST + 1, "")
        (out,) = processes.finish(again)
        train(path / "whole")
        newest = stop_at - stop_at % EVERY
        saved = [newest] if moment == "after a save" else [newest, newest - EVERY]
        assert int(out.split()[-1]) in saved, (moment, out)

    path = processes.once(tmp_path_factory, f"runs_{stop_at}", make)
    trees = []
    for directory in (path / "killed", path / "whole"):
        with ocp.CheckpointManager(directory) as manager:
            assert manager.latest_step() == LAST
        trees.append(train(directory))  # Nothing is left to do: the last checkpoint.
    return trees


def test_a_killed_run_ends_like_one_that_was_not_killed(killed_and_not):
    killed, whole = killed_and_not
    assert different(killed, whole) == []
    before = fresh()["params"]
    for k, w in whole["params"].items():
        assert np.mean(values(w) != values(before[k])) > 0.7
    counts = [x for x in jax.tree.leaves(whole["state"]) if x.dtype == jnp.int32]
    assert LAST + 1 in [int(x) for x in counts if x.ndim == 0]


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
