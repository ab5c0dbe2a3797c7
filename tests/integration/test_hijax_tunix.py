"""Tunix's PeftTrainer on lifted codes: its loop, accumulation, mesh and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import needs_hijax, same
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import with_zeros_drawn

import madax

peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")
from tunix_loop import STEPS, by_tunix, data, inputs  # noqa: E402

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("quick_compiles"),
]

FMT = madax.LogFormat(8)


def coded():
    from tunix.models.qwen3 import model as qwen

    config = qwen.ModelConfig(
        num_layers=2,
        vocab_size=64,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    model = with_zeros_drawn(qwen.Qwen3(config, rngs=nnx.Rngs(0)))
    return madax.quantize_params(model, FMT)


def by_madax(model, tx, steps=STEPS):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss = lambda model: peft_trainer._default_loss_fn(model, **inputs(batch))
        value, grads = madax.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer, batch)) for batch in data(steps)]


def weights(model):
    return nnx.state(madax.hijax.lower(model), nnx.Param)


TXS = {
    "madam": madax.madam(0.02),
    "muon": madax.muon(0.02),
    "muon_madam": madax.muon_madam(0.02),
    "adam": madax.with_quantized_params(optax.adam(1e-3)),
}


@pytest.mark.parametrize("name", TXS)
def test_its_loop_trains_as_with_madax(name):
    tx = TXS[name]
    lifted, ours = madax.hijax.lift(coded()), coded()
    losses = by_tunix(lifted, madax.hijax.optimizer(tx))
    np.testing.assert_array_equal(losses, by_madax(ours, tx))
    same(weights(lifted), nnx.state(ours, nnx.Param))
    kinds = [type(w).__name__ for w in jax.tree.leaves(nnx.state(lifted, nnx.Param))]
    assert kinds.count("LiftedArray") == 15 and losses[-1] < losses[0]


def test_gradients_are_accumulated():
    tx = madax.hijax.optimizer(madax.madam(0.02))
    losses = by_tunix(madax.hijax.lift(coded()), tx, gradient_accumulation_steps=2)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_a_mesh_trains_as_one_device():
    mesh = jax.make_mesh(
        (4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def on(w):
        spec = P("fsdp") if w.ndim > 1 and w.shape[0] % 4 == 0 else P()
        return NamedSharding(mesh, spec)

    model = madax.hijax.lift(coded())
    state = nnx.state(model, nnx.Param)
    nnx.update(model, madax.hijax.put(state, jax.tree.map(on, state)))
    tx = madax.hijax.optimizer(madax.madam(0.02))
    with mesh:
        losses = by_tunix(model, tx, data_sharding_axis=("fsdp",))
    one = by_tunix(madax.hijax.lift(coded()), tx)
    np.testing.assert_allclose(losses, one, rtol=1e-3)
    table = model.embedder.input_embedding.get_value()
    assert table.codes.dtype == jnp.int8 and table.sharding.spec == P("fsdp")


def test_a_run_that_is_resumed_ends_in_the_same_codes(tmp_path):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    whole, first, rest = (madax.hijax.lift(coded()) for _ in range(3))
    losses = by_tunix(whole, tx)
    options = {
        "checkpoint_root_directory": str(tmp_path),
        "checkpointing_options": ocp.CheckpointManagerOptions(save_interval_steps=1),
    }
    before = by_tunix(first, tx, STEPS // 2, **options)
    after = by_tunix(rest, tx, **options)
    assert before + after == losses
    same(weights(rest), weights(whole))
