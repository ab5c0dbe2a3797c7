"""The training loop: every run of one optimizer in one compiled program."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import madax
from benchmarks.lib import records
from benchmarks.lib.contender import Contender, Point, hyperparameters
from benchmarks.lib.steps import Tree, apply
from benchmarks.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Budget:
    """The length of training, the same for every optimizer.

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
    contender: Contender,
    points: Sequence[Point],
    budget: Budget,
    *,
    label: str,
    at_once: int = 32,
    seeds: Sequence[int] = (),
) -> list[records.Record]:
    """Trains once for every seed and point.

    Args:
      workload: what to train.
      contender: what to train it with; its own rates are not used.
      points: hyperparameters, with the same keys in all.
      budget: length and number of runs.
      label: name on the progress bar.
      at_once: points to train side by side; the others wait. Bounds the memory.
      seeds: those to train from; by default the first ones of the budget.

    Returns:
      One dict per run: ``seed``; the point; the scores at the end; ``diverged``,
      whether the last losses or weights are not finite; ``error``, that of the score
      that counts, None if diverged; ``curve``, the mean training loss and the scores at
      each evaluation; and ``wall_s``, the time of all runs, compilation included, over
      their number.
    """
    begin = time.perf_counter()
    # Chunks have one size, if possible, as another size would be compiled, too.
    chunk = math.ceil(len(points) / math.ceil(len(points) / at_once))
    values = {
        name: jnp.array([hyperparameters(point)[name] for point in points], float)
        for name in hyperparameters(points[0])
    }
    start_all, advance_all = _programs(workload, contender, budget.steps, chunk)
    seeds = seeds or range(budget.seeds)
    weights = [workload.init(jax.random.key(seed)) for seed in seeds]
    carry = start_all(jax.tree.map(lambda *x: jnp.stack(x), *weights), values)
    data = (workload.train, workload.test)
    measured = []
    with tqdm(total=budget.steps, desc=label, unit="step") as bar:
        for now in _parts(len(workload), budget, seeds):
            carry, scores = advance_all(carry, values, now, data)
            measured.append(jax.device_get(scores))
            losses = np.sort(measured[-1]["loss"], axis=None)  # NaN comes last.
            median = losses[losses.size // 2]
            bar.set_postfix(loss=f"{median:.3g}", refresh=False)
            bar.update(now[0].shape[1])
    wall = (time.perf_counter() - begin) / (len(points) * len(seeds))
    runs = _runs(measured, points, budget, seeds, workload)
    return [run | {"wall_s": round(wall, 3)} for run in runs]


def _programs(
    workload: Workload, contender: Contender, steps: int, chunk: int
) -> tuple[Callable[..., Tree], Callable[..., tuple]]:
    """Returns two compiled functions, for all seeds and points.

    The first starts runs; the second trains to the next evaluation, and measures.
    """

    def start(weights, point):
        params = contender.store(weights)
        return params, contender.transform(point, steps).init(params)

    def every_point(carry, points, order, data):
        # A seed's points share its batches, so those are gathered once.
        def one(now):
            carry, point = now
            tx = contender.transform(point, steps)
            return _advance(workload, contender, tx, carry, order, data)

        return jax.lax.map(one, (carry, points), batch_size=chunk)

    start_all = jax.vmap(jax.vmap(start, in_axes=(None, 0)), in_axes=(0, None))
    every_run = jax.vmap(every_point, in_axes=(0, None, 0, None))
    return jax.jit(start_all), jax.jit(every_run, donate_argnums=0)


def _advance(
    workload: Workload,
    contender: Contender,
    tx: optax.GradientTransformation,
    carry: Tree,
    order: tuple[jax.Array, jax.Array],
    data: tuple[Tree, Tree],
) -> tuple[Tree, dict[str, jax.Array]]:
    """Trains one run on some batches; returns what it carries on, and its scores."""

    def step(carry, now):
        params, state = carry
        indices, noise = now
        batch = workload.batch(data[0], indices, jax.random.key(noise))
        # Stored codes, if any, are trained; the loss is a function of their values.
        weights = madax.dequantize_params(params)
        loss, grads = jax.value_and_grad(workload.loss)(weights, batch)
        return apply(tx, params, state, grads), loss

    carry, losses = jax.lax.scan(step, carry, order)
    weights = madax.dequantize_params(contender.evaluated(*carry))
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((weights, losses))]
    return carry, {
        "loss": losses.mean(),
        "diverged": ~jnp.array(finite).all(),
        **workload.metric(weights, data[1]),
    }


def _parts(
    examples: int, budget: Budget, seeds: Sequence[int]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields what all seeds draw between two evaluations."""
    orders = [data_order(seed, examples, budget) for seed in seeds]
    stacked = [np.stack(drawn) for drawn in zip(*orders, strict=True)]
    parts = [np.split(array, budget.evaluations, axis=1) for array in stacked]
    yield from zip(*parts, strict=True)


def data_order(
    seed: int, examples: int, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a seed draws: the examples of each step, and a number for noise.

    The examples come in epochs, each with a new shuffle.
    """
    rng = np.random.default_rng(seed)
    whole = examples - examples % budget.batch_size
    epochs = -(-budget.steps * budget.batch_size // whole)
    order = np.concatenate([rng.permutation(examples)[:whole] for _ in range(epochs)])
    order = order.reshape(-1, budget.batch_size)[: budget.steps]
    return order, rng.integers(2**32, size=budget.steps, dtype=np.uint32)


def _runs(
    measured,
    points: Sequence[Point],
    budget: Budget,
    seeds: Sequence[int],
    workload: Workload,
) -> Iterator[records.Record]:
    """Takes the measurements, one item per evaluation, apart into runs."""
    # Arrays of shape (evaluations, seeds, points).
    arrays = {name: np.stack([now[name] for now in measured]) for name in measured[0]}
    diverged = arrays.pop("diverged")
    scores = [name for name in arrays if name != "loss"]
    steps = np.linspace(0, budget.steps, budget.evaluations + 1, dtype=int)[1:]
    for k, i in np.ndindex(diverged.shape[1:]):
        last = {name: float(arrays[name][-1, k, i]) for name in scores}
        bad = bool(diverged[-1, k, i])
        yield {
            "seed": seeds[k],
            **points[i],
            **last,
            "error": None
            if bad
            else workload.measure.error(last[workload.measure.name]),
            "diverged": bad,
            "curve": {
                "step": steps.tolist(),
                **{name: array[:, k, i].tolist() for name, array in arrays.items()},
            },
        }
