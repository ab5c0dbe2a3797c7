"""MaxText's training loop on lifted codes, eight devices, and its checkpoints."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import needs_hijax, raises, same

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


def arguments(folder, **options):
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    options = TINY | {"base_output_directory": folder} | options
    return ["train.py", str(base), *(f"{k}={v}" for k, v in options.items())]


def by_maxtext(folder, tx, monkeypatch):
    """The losses and the state after its loop."""
    metrics, states = folder / "metrics.json", []
    train_loop = train.train_loop  # Its main returns no state.
    noted = lambda *args: states.append(train_loop(*args))
    monkeypatch.setattr(train, "train_loop", noted)
    with madax.trainers.maxtext(tx, FMT):
        train.main(arguments(folder, metrics_file=metrics))
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["learning/loss"] for line in lines], states[0]


def by_madax(folder, tx):
    config, recorder = train.initialize(arguments(folder, enable_checkpointing=False))
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
    lifted_tx = madax.hijax.optimizer(tx)
    losses, state = by_maxtext(tmp_path, lifted_tx, monkeypatch)
    assert train_utils.setup_train_loop is setup_train_loop
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
    with raises(ValueError, "has a checkpoint of step 9", "pass another run_name"):
        by_maxtext(tmp_path, lifted_tx, monkeypatch)


def test_gradients_are_accumulated_by_the_optimizer(tmp_path, monkeypatch):
    tx = optax.MultiSteps(madax.hijax.optimizer(madax.madam(0.02)), 2)
    losses, _ = by_maxtext(tmp_path, tx.gradient_transformation(), monkeypatch)
    # Its synthetic batches are all the same.
    assert losses[0] == losses[1] > losses[2] == losses[3] > losses[-1]


REFUSED = {
    "layers that are scanned": (
        {"scan_layers": True},
        "scan_layers is True",
        "pass scan_layers=false",
    ),
    "gradients that MaxText accumulates": (
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps is 2",
        "optax.MultiSteps(tx, 2).gradient_transformation()",
    ),
    "an optimizer that is sharded": (
        {"shard_optimizer_over_data": True},
        "shard_optimizer_over_data is True",
        "pass shard_optimizer_over_data=false",
    ),
    "moments on the host": (
        {"optimizer_memory_host_offload": True},
        "optimizer_memory_host_offload is True",
        "pass optimizer_memory_host_offload=false",
    ),
    "weights on the host": (
        {"parameter_memory_host_offload": True, "param_scan_axis": 0},
        "parameter_memory_host_offload is True",
        "pass parameter_memory_host_offload=false",
    ),
    "steps that are skipped": (
        {"skip_step_on_spikes": True},
        "skip_step_on_spikes is True",
        "pass skip_step_on_spikes=false",
    ),
    "weights that are frozen": (
        {"trainable_parameters_mask": "['.*mlp.*']"},
        "trainable_parameters_mask is ['.*mlp.*']",
        "freeze weights in tx; pass trainable_parameters_mask=[]",
    ),
    "workers that are averaged": (
        {"enable_diloco": True},
        "enable_diloco is True",
        "pass enable_diloco=false",
    ),
    "the state of another optimizer": (
        {"load_full_state_path": "elsewhere"},
        "load_full_state_path is elsewhere",
        "load weights by load_parameters_path; pass load_full_state_path=''",
    ),
    "weights that are sharded": (
        {"ici_fsdp_parallelism": 8, "ici_data_parallelism": 1},
        "ici_fsdp_parallelism is 8",
        "pass ici_fsdp_parallelism=1 and ici_data_parallelism=-1",
    ),
    "sharded by default": (
        {"ici_fsdp_parallelism": -1, "ici_data_parallelism": 1},
        "ici_fsdp_parallelism is -1",
        "over 8 devices",
    ),
    "in two ways": (
        {"ici_tensor_parallelism": 2, "ici_data_parallelism": 4},
        "ici_tensor_parallelism is 2",
        "over 2 devices",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_and_the_function_restored(tmp_path, name):
    options, *parts = REFUSED[name]
    tx = madax.hijax.optimizer(madax.madam(0.02))
    with raises(ValueError, *parts), madax.trainers.maxtext(tx, FMT):
        assert train_utils.setup_train_loop is not setup_train_loop
        train.main(arguments(tmp_path, **options))
    assert train_utils.setup_train_loop is setup_train_loop


def test_its_loop_gets_no_floats_and_no_other_rate(tmp_path):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    with madax.trainers.maxtext(tx, FMT):
        options = {"enable_checkpointing": False}
        made = train_utils.setup_train_loop(
            *train.initialize(arguments(tmp_path, **options))
        )
    model, rate, state = made[3], made[5], made[-1]
    assert model is state.model and rate(3) == float("inf")


def test_arguments_are_checked():
    tx = madax.hijax.optimizer(madax.madam(0.02))
    with (
        raises(TypeError, "tx must be an optax.GradientTransformation, got 3"),
        madax.trainers.maxtext(3, FMT),
    ):
        pass
    with (
        raises(TypeError, "format must be a Format, got 8 of type int"),
        madax.trainers.maxtext(tx, 8),
    ):
        pass
