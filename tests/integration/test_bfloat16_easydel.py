"""EasyDeL's Trainer on weights in bfloat16, which trains codes by no JAX it takes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import normal, raises, same

import madax

ed = pytest.importorskip("easydel")
datasets = pytest.importorskip("datasets")
factory = pytest.importorskip("eformer.optimizers").OptimizerFactory
# EasyDeL patches these when it is first used, and they need PyTorch.
for name in ("glm4v_moe", "llama4", "phimoe", "qwen3_5_moe", "qwen3_next"):
    sys.modules[f"transformers.models.{name}"] = None

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS, LENGTH = 10, 32


def four_bytes(rate):
    return madax.wrappers.with_stochastic_rounding(
        optax.adamw(rate), moment_format=madax.MomentFormat(bits=8)
    )


class Trainer(ed.Trainer):
    """Its own, which also notes losses."""

    def on_step_end(self, state, metrics, step):
        self.losses.append(float(metrics.loss))
        return super().on_step_end(state, metrics, step)


def by_easydel(folder, steps=STEPS):
    """The losses and the state after its loop, on a mesh of eight."""
    config = ed.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    tokens = np.asarray(normal(16 * STEPS, LENGTH) > 0).astype(int)
    columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    arguments = ed.TrainingArguments(
        model_name="tiny",
        save_directory=str(folder),
        optimizer=madax.trainers.easydel("four_bytes", four_bytes),
        learning_rate=0.01,
        weight_decay=0.0,
        total_batch_size=16,
        max_length=LENGTH,
        num_train_epochs=1,
        max_training_steps=steps,
        save_steps=STEPS // 2,
        use_wandb=False,
    )
    trainer = Trainer(
        arguments=arguments,
        model=ed.LlamaForCausalLM(
            config, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        ),
        dataset_train=datasets.Dataset.from_dict(
            {k: x.tolist() for k, x in columns.items()}
        ),
    )
    trainer.losses = []
    return trainer.losses, trainer.train().state


def test_its_loop_trains_on_four_bytes_per_parameter_and_resumes(tmp_path):
    losses, whole = by_easydel(tmp_path / "whole")
    assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
    weights = jax.tree.leaves(whole.graphstate)
    assert {w.dtype for w in weights} == {jnp.dtype("bfloat16")}
    assert {len(w.sharding.device_set) for w in weights} == {8}
    kept = sum(x.nbytes for x in jax.tree.leaves((weights, whole.opt_state)))
    # Moments of small leaves stay float32.
    assert kept < 5 * sum(w.size for w in weights)

    before, _ = by_easydel(tmp_path / "half", STEPS // 2)
    after, state = by_easydel(tmp_path / "half")
    assert before + after == losses
    same(state.graphstate, whole.graphstate)


def test_a_name_takes_the_last_function_that_was_given_for_it():
    for rate in (1.0, 2.0):
        make = lambda _, rate=rate: optax.sgd(rate)
        name = madax.trainers.easydel("ours", make)
        tx, _ = factory.create(name)
        updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
        assert updates == -rate


def test_arguments_are_checked():
    make = lambda rate: optax.sgd(rate)
    with raises(TypeError, "name must be a string, got 3 of type int"):
        madax.trainers.easydel(3, make)
    with raises(TypeError, "make must be a function, got"):
        madax.trainers.easydel("sgd", optax.sgd(0.1))
    with pytest.raises(ValueError, match="Optimizer 'adamw' is already registered"):
        madax.trainers.easydel("adamw", make)
    name = madax.trainers.easydel("none", lambda rate: None)
    with raises(TypeError, "make(learning_rate) must be an optax.GradientTransf"):
        factory.create(name)


def test_a_decay_after_the_optimizer_is_refused():
    name = madax.trainers.easydel("decayed", lambda rate: optax.sgd(rate))
    with raises(ValueError, "weight_decay is 0.01", "pass weight_decay=0.0"):
        factory.create(name, weight_decay=0.01)
    # The default of EasyDeL.
    arguments = ed.TrainingArguments(optimizer=name, max_training_steps=1)
    with raises(ValueError, "weight_decay is 0.01", "pass weight_decay=0.0"):
        arguments.get_optimizer_and_scheduler(1)
