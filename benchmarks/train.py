"""The training loop: every run of one optimizer in one compiled program."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import madax
from benchmarks.optimizers import Optimizer, Point, hyperparameters
from benchmarks.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to train, the same for every optimizer.

    Attributes:
      steps: optimizer steps in a run.
      evaluations: how often to measure the score; divides ``steps``.
      batch_size: examples in a step.
      seeds: runs for each point; a seed fixes the init and the data order.
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
    points: Sequence[Point],
    budget: Budget,
    *,
    label: str,
    at_once: int = 32,
) -> list[dict[str, Any]]:
    """Trains once for every seed and point.

    Args:
      workload: what to train.
      optimizer: row of the table of optimizers; its default rate is not used.
      points: hyperparameters, with the same keys in all.
      budget: length and number of runs.
      label: name on the progress bar.
      at_once: points to train side by side; the others wait. Bounds the memory.

    Returns:
      One dict a run: ``seed``; the point; the scores at the end; ``error``, that of
      the score that counts, None if ``diverged``, which is whether the last losses or
      weights are not finite; ``curve``, the mean training loss and the scores at each
      evaluation; and ``wall_s``, the share in the time that all took, compilation
      included.
    """
    begin = time.perf_counter()
    # Chunks of one size, if possible, as another one would be compiled, too.
    chunk = math.ceil(len(points) / math.ceil(len(points) / at_once))
    values = {
        name: jnp.array([hyperparameters(point)[name] for point in points], float)
        for name in hyperparameters(points[0])
    }

    def start(weights, point):
        params = optimizer.quantize(weights)
        return params, optimizer.transform(point, budget.steps).init(params)

    def advance(carry, point, order, data):
        tx = optimizer.transform(point, budget.steps)

        def step(carry, now):
            params, state = carry
            indices, noise = now
            batch = workload.batch(data[0], indices, jax.random.key(noise))
            # Stored codes, if any, are trained; the loss is a function of their values.
            weights = madax.dequantize_params(params)
            loss, grads = jax.value_and_grad(workload.loss)(weights, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        carry, losses = jax.lax.scan(step, carry, order)
        weights = madax.dequantize_params(optimizer.evaluated(*carry))
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((weights, losses))]
        return carry, {
            "loss": losses.mean(),
            "diverged": ~jnp.array(finite).all(),
            **workload.metric(weights, data[1]),
        }

    def every_point(carry, points, order, data):
        # A seed's points share its batches, so those are gathered once.
        def one(now):
            carry, point = now
            return advance(carry, point, order, data)

        return jax.lax.map(one, (carry, points), batch_size=chunk)

    start_all = jax.vmap(jax.vmap(start, in_axes=(None, 0)), in_axes=(0, None))
    every_run = jax.vmap(every_point, in_axes=(0, None, 0, None))
    advance_all = jax.jit(every_run, donate_argnums=0)

    seeds = range(budget.seeds)
    weights = [workload.init(jax.random.key(seed)) for seed in seeds]
    weights = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    orders = [data_order(seed, len(workload), budget) for seed in seeds]
    order = [np.stack(parts) for parts in zip(*orders, strict=True)]
    carry = jax.jit(start_all)(weights, values)
    data = (workload.train, workload.test)
    measured = []
    with tqdm(total=budget.steps, desc=label, unit="step") as bar:
        parts = [np.split(array, budget.evaluations, axis=1) for array in order]
        for now in zip(*parts, strict=True):
            carry, scores = advance_all(carry, values, now, data)
            measured.append(jax.device_get(scores))
            losses = np.sort(measured[-1]["loss"], axis=None)  # NaN comes last.
            median = losses[losses.size // 2]
            bar.set_postfix(loss=f"{median:.3g}", refresh=False)
            bar.update(now[0].shape[1])
    wall = (time.perf_counter() - begin) / (len(points) * budget.seeds)
    runs = _runs(measured, points, budget, workload)
    return [run | {"wall_s": round(wall, 3)} for run in runs]


def data_order(
    seed: int, examples: int, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a seed draws: the examples of each step, and a number for noise.

    The examples come in epochs, each shuffled anew.
    """
    rng = np.random.default_rng(seed)
    whole = examples - examples % budget.batch_size
    epochs = -(-budget.steps * budget.batch_size // whole)
    order = np.concatenate([rng.permutation(examples)[:whole] for _ in range(epochs)])
    order = order.reshape(-1, budget.batch_size)[: budget.steps]
    return order, rng.integers(2**32, size=budget.steps, dtype=np.uint32)


def _runs(
    measured, points: Sequence[Point], budget: Budget, workload: Workload
) -> Iterator[dict[str, Any]]:
    """Takes the measurements, an item an evaluation, apart into runs."""
    # Arrays of shape (evaluations, seeds, points).
    arrays = {name: np.stack([now[name] for now in measured]) for name in measured[0]}
    diverged = arrays.pop("diverged")
    scores = [name for name in arrays if name != "loss"]
    steps = np.linspace(0, budget.steps, budget.evaluations + 1, dtype=int)[1:]
    for seed, i in np.ndindex(diverged.shape[1:]):
        last = {name: float(arrays[name][-1, seed, i]) for name in scores}
        bad = bool(diverged[-1, seed, i])
        yield {
            "seed": seed,
            **points[i],
            **last,
            "error": None
            if bad
            else workload.measure.error(last[workload.measure.name]),
            "diverged": bad,
            "curve": {
                "step": steps.tolist(),
                **{name: array[:, seed, i].tolist() for name, array in arrays.items()},
            },
        }
