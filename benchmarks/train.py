"""The training loop: every rate and seed of one optimizer in one compiled program."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import madax
from benchmarks.optimizers import Optimizer
from benchmarks.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to train, the same for every optimizer.

    Attributes:
      steps: optimizer steps in a run.
      evaluations: how often to measure accuracy; divides ``steps``.
      batch_size: examples in a step.
      seeds: runs for each learning rate; a seed fixes the init and the data order.
    """

    steps: int = 1000
    evaluations: int = 20
    batch_size: int = 32
    seeds: int = 5

    def __post_init__(self):
        if self.steps % self.evaluations:
            raise ValueError(
                f"evaluations must divide steps, got {self.evaluations} and "
                f"{self.steps}"
            )


def train(
    workload: Workload,
    optimizer: Optimizer,
    rates: Sequence[float],
    budget: Budget,
    *,
    label: str,
) -> list[dict[str, Any]]:
    """Trains once for every seed and learning rate.

    The rate follows a cosine to zero over the budget.

    Args:
      workload: what to train.
      optimizer: row of the table of optimizers; its default rate is not used.
      rates: initial learning rates.
      budget: length and number of runs.
      label: name on the progress bar.

    Returns:
      One dict a run: ``seed``; ``rate``; final ``accuracy``; ``diverged``, whether
      the last losses or weights are not finite; and ``curve``, the mean training
      loss and the accuracy at each evaluation.
    """

    def transform(rate: jax.Array) -> optax.GradientTransformation:
        return optimizer.make(optax.cosine_decay_schedule(rate, budget.steps))

    def start(weights, rate):
        params = optimizer.quantize(weights)
        return params, transform(rate).init(params)

    def advance(carry, rate, batches, examples):
        def step(carry, batch):
            params, state = carry
            batch = jax.tree.map(lambda x: x[batch], examples)
            # Stored codes, if any, are trained; the loss is a function of their values.
            weights = madax.dequantize_params(params)
            loss, grads = jax.value_and_grad(workload.loss)(weights, batch)
            updates, state = transform(rate).update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        carry, losses = jax.lax.scan(step, carry, batches)
        weights = madax.dequantize_params(carry[0])
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((weights, losses))]
        return carry, {
            "loss": losses.mean(),
            "accuracy": workload.metric(weights),
            "diverged": ~jnp.array(finite).all(),
        }

    start_all = jax.vmap(jax.vmap(start, in_axes=(None, 0)), in_axes=(0, None))
    # A seed's rates share its batches, so those are gathered once.
    every_rate = jax.vmap(advance, in_axes=(0, 0, None, None))
    every_run = jax.vmap(every_rate, in_axes=(0, None, 0, None))
    advance_all = jax.jit(every_run, donate_argnums=0)

    seeds = range(budget.seeds)
    weights = [workload.init(jax.random.key(seed)) for seed in seeds]
    weights = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    order = [_data_order(seed, len(workload.train[0]), budget) for seed in seeds]
    carry = jax.jit(start_all)(weights, jnp.array(rates))
    measured = []
    with tqdm(total=budget.steps, desc=label, unit="step") as bar:
        for batches in np.split(np.stack(order), budget.evaluations, axis=1):
            carry, now = advance_all(carry, jnp.array(rates), batches, workload.train)
            measured.append(jax.device_get(now))
            losses = np.sort(measured[-1]["loss"], axis=None)  # NaN comes last.
            median = losses[losses.size // 2]
            bar.set_postfix(loss=f"{median:.3g}", refresh=False)
            bar.update(batches.shape[1])
    return list(_runs(measured, rates, budget))


def _data_order(seed: int, examples: int, budget: Budget) -> np.ndarray:
    """Returns indices of shape (steps, batch size): epochs, each shuffled anew."""
    rng = np.random.default_rng(seed)
    whole = examples - examples % budget.batch_size
    epochs = -(-budget.steps * budget.batch_size // whole)
    order = np.concatenate([rng.permutation(examples)[:whole] for _ in range(epochs)])
    return order.reshape(-1, budget.batch_size)[: budget.steps]


def _runs(measured, rates, budget: Budget) -> Iterator[dict[str, Any]]:
    """Takes the measurements, an item an evaluation, apart into runs."""
    # Arrays of shape (evaluations, seeds, rates).
    loss, accuracy, diverged = (
        np.stack([now[name] for now in measured])
        for name in ("loss", "accuracy", "diverged")
    )
    steps = np.linspace(0, budget.steps, budget.evaluations + 1, dtype=int)[1:]
    for seed, i in np.ndindex(loss.shape[1:]):
        yield {
            "seed": seed,
            "rate": rates[i],
            "accuracy": float(accuracy[-1, seed, i]),
            "diverged": bool(diverged[-1, seed, i]),
            "curve": {
                "step": steps.tolist(),
                "loss": loss[:, seed, i].tolist(),
                "accuracy": accuracy[:, seed, i].tolist(),
            },
        }
