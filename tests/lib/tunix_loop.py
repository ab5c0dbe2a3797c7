"""The training loop of Tunix, as it is."""

import jax.numpy as jnp
from tunix.sft import peft_trainer, utils

STEPS = 8


def data(steps):
    for i in range(steps):
        tokens = (jnp.arange(16)[None] * 3 + jnp.arange(4)[:, None] + i) % 64
        yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=tokens >= 0)


def inputs(batch):
    mask = batch.input_tokens >= 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def by_tunix(model, tx, steps=STEPS, **options):
    """The losses of its own loop."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=steps, **options
    )
    trainer = peft_trainer.PeftTrainer(model, tx, config)
    trainer = trainer.with_gen_model_input_fn(inputs)
    losses, buffer = [], trainer._buffer_metrics

    def record(metrics, loss, **rest):
        losses.append(float(loss))
        return buffer(metrics, loss, **rest)

    trainer._buffer_metrics = record
    trainer.train(data(steps * options.get("gradient_accumulation_steps", 1)))
    return losses
