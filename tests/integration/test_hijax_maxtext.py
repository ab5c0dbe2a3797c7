"""MaxText's training loop on lifted codes, eight devices, and its checkpoints."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import needs_hijax, same

import madax

maxtext = pytest.importorskip("maxtext")
from maxtext.common import train_state_nnx  # noqa: E402
from maxtext.trainers.pre_train import train  # noqa: E402
from maxtext.utils import train_utils  # noqa: E402
from orbax.checkpoint.experimental import v1  # noqa: E402

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS = 10
FMT = madax.SymlogFormat(8)
TINY = {
    "run_name": "tiny",
    "async_checkpointing": False,
    "gradient_clipping_threshold": 0,
    "hardware": "cpu",
    "ici_data_parallelism": 8,
    # JAX, compiling ahead of time, gives a scale the sharding of its codes.
    "ici_fsdp_parallelism": 1,
    "dataset_type": "synthetic",
    "attention": "dot_product",
    "base_emb_dim": 32,
    "base_mlp_dim": 64,
    "base_num_decoder_layers": 2,
    "base_num_kv_heads": 4,
    "base_num_query_heads": 4,
    "enable_goodput_recording": False,
    "head_dim": 8,
    "max_target_length": 16,
    "per_device_batch_size": 1,
    "scan_layers": False,
    "skip_jax_distributed_system": True,
    "steps": STEPS,
    "vocab_size": 64,
}
setup_train_loop = train_utils.setup_train_loop


def coded(tx):
    """Its function that makes the state, patched."""

    def setup(config, recorder, devices=None):
        *made, state = setup_train_loop(config, recorder, devices)
        model = madax.hijax.lift(madax.quantize_params(state.model, FMT))
        state = train_state_nnx.TrainStateNNX(
            model, nnx.Optimizer(model, tx, wrt=nnx.Param)
        )
        made[2] = jax.tree.map(lambda _: None, nnx.state(state))  # Its shardings.
        return *made, state

    return setup


def configured(folder, **options):
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    options = TINY | {"base_output_directory": folder} | options
    argv = ["train.py", str(base), *(f"{k}={v}" for k, v in options.items())]
    return train.initialize(argv)


def by_maxtext(folder, **options):
    """The losses and the state after its loop."""
    metrics = folder / "metrics.json"
    state = train.train_loop(*configured(folder, metrics_file=metrics, **options))
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["learning/loss"] for line in lines], state


def by_madax(folder, tx):
    config, recorder = configured(folder, enable_checkpointing=False)
    *made, state = setup_train_loop(config, recorder)
    model = madax.quantize_params(state.model, FMT)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss = lambda model: train.loss_fn(model, config, batch, None, None)[0]
        value, grads = madax.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    mesh, loader = made[4], made[7]
    with jax.set_mesh(mesh), train.logical_axis_rules(config.logical_axis_rules):
        batches = [loader.load_next_batch() for _ in range(STEPS)]
        return [float(step(model, optimizer, batch)) for batch in batches]


def test_its_loop_trains_on_a_mesh_and_saves_codes(tmp_path, monkeypatch):
    tx = madax.madam(0.02)
    patched = coded(madax.hijax.optimizer(tx))
    monkeypatch.setattr(train_utils, "setup_train_loop", patched)
    losses, state = by_maxtext(tmp_path)
    assert losses[-1] < losses[0]
    params = nnx.state(state.model, nnx.Param)
    lifted = [w for w in jax.tree.leaves(params) if hasattr(w, "codes")]
    assert {w.codes.dtype for w in lifted} == {jnp.dtype("int8")}
    assert {len(w.devices()) for w in lifted} == {8}
    saved = tmp_path / "tiny" / "checkpoints" / str(STEPS - 1)
    items = v1.load_pytree(saved, checkpointable_name="items")
    expected = train_state_nnx.to_checkpoint_dict(state)
    same(*(madax.hijax.lower(tree["params"]) for tree in (items, expected)))
    np.testing.assert_array_equal(losses, by_madax(tmp_path / "ours", tx))
