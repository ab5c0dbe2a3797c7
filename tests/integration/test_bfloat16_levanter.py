"""Levanter's Trainer on weights in bfloat16: its state has output shardings."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import normal, same

import madax

pytest.importorskip("levanter")
import haliax as hax
import jmp
from levanter.checkpoint import CheckpointerConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS = 10
Batch, In, Out = hax.make_axes(batch=16, inputs=64, outputs=8)
X = normal(16, 64)
rounded = madax.wrappers.with_stochastic_rounding


def loss(model, x, *, key=None):
    wanted = hax.nn.one_hot(hax.argmax(x["inputs", 0:8], "inputs"), Out)
    return hax.nn.cross_entropy_loss(model(x), Out, wanted)


def by_levanter(folder, tx, steps=STEPS, **options):
    """The losses and the state after its loop, on a mesh of eight."""
    config = TrainerConfig(
        id="tiny",
        mp=jmp.get_policy("params=bfloat16,compute=float32,output=float32"),
        num_train_steps=steps,
        train_batch_size=Batch.size,
        checkpointer=CheckpointerConfig(
            base_path=str(folder), save_interval=None, keep=[{"every": STEPS // 2}]
        ),
        log_dir=folder / "logs",
        require_accelerator=False,
        tracker=NoopConfig(),
        **options,
    )
    config.initialize()
    losses = []
    init = lambda: hax.nn.MLP.init(In, Out, 256, 1, key=jax.random.PRNGKey(0))
    with Trainer(config, tx, loss) as trainer:
        trainer.add_hook(lambda info: losses.append(float(info.loss)), every=1)
        state = trainer.initial_state(jax.random.PRNGKey(1), model_init=init)
        x = hax.shard(hax.named(X, (Batch, In)), trainer.compute_axis_mapping)
        state = trainer.train(state, [x] * steps).state
    return losses[:-1], state  # It calls hooks once more at the end.


def test_its_loop_trains_on_four_bytes_per_parameter(tmp_path):
    tx = rounded(optax.adamw(1e-3), moment_format=madax.MomentFormat(bits=8))
    losses, state = by_levanter(tmp_path, tx)
    assert losses[-1] < 0.9 * losses[0]
    assert {w.dtype for w in jax.tree.leaves(state.model)} == {jnp.dtype("bfloat16")}
    kept = sum(x.nbytes for x in jax.tree.leaves((state.model, state.opt_state)))
    # Moments of small leaves stay float32.
    assert kept < 5 * sum(w.size for w in jax.tree.leaves(state.model))


def test_a_run_that_is_resumed_ends_in_the_same_weights(tmp_path):
    """With no booleans in its state: it cannot read them onto several devices."""
    tx = rounded(optax.adamw(1e-3), moment_format=madax.MomentFormat(bits=8))
    options = {"per_device_parallelism": 1}
    losses, whole = by_levanter(tmp_path / "whole", tx, **options)
    before, _ = by_levanter(tmp_path / "half", tx, STEPS // 2, **options)
    after, state = by_levanter(tmp_path / "half", tx, **options)
    assert before + after == losses
    same(state.model, whole.model)
