"""Workloads: data, a model and a score, one module each."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Measure:
    """The score of a workload.

    Attributes:
      name: as written in the records.
      better: "higher" or "lower".
      error: the score as an error, where lower is better and ratios mean something.
    """

    name: str
    better: Literal["higher", "lower"]
    error: Callable[[float], float]


ACCURACY = Measure("accuracy", "higher", lambda accuracy: 1 - accuracy)
# Its error is the mean squared one.
PSNR = Measure("PSNR", "higher", lambda decibels: 10 ** (-decibels / 10))
MSE = Measure("MSE", "lower", lambda mse: mse)


def nats_per(token: str) -> Measure:
    """Returns the measure of a language model; its error is the perplexity."""
    # Where a score diverges, exp would overflow.
    return Measure(f"nats/{token}", "lower", lambda nats: math.exp(min(nats, 700.0)))


def take(train: Any, indices: jax.Array, key: jax.Array) -> Any:
    """Takes the examples of those indices: a batch, for most workloads."""
    del key
    return jax.tree.map(lambda x: x[indices], train)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network to train, its data and its score.

    Attributes:
      name: as written in the records.
      train: data to train on, a tree of arrays.
      test: data held out.
      init: random key to parameters, compiled.
      loss: parameters and a batch to the mean loss.
      metric: parameters and ``test`` to scores, the one of ``measure`` among them.
      measure: the score that counts.
      batch: ``train``, indices and a random key to a batch.
      examples: how many indices there are; None for the length of ``train``.
      settings: what else the results depend on, for the records.
    """

    name: str
    train: Any
    test: Any
    init: Callable[[jax.Array], optax.Params]
    loss: Callable[[optax.Params, Any], jax.Array]
    metric: Callable[[optax.Params, Any], Mapping[str, jax.Array]]
    measure: Measure = ACCURACY
    batch: Callable[[Any, jax.Array, jax.Array], Any] = take
    examples: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        if self.examples is not None:
            return self.examples
        return len(jax.tree.leaves(self.train)[0])


def functional(
    make: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[Callable[[jax.Array], optax.Params], Callable[..., jax.Array]]:
    """Returns a network as two functions.

    Args:
      make: builds the network.

    Returns:
      ``init``, random key to parameters, compiled; and ``apply``, parameters and
      inputs to outputs.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    @jax.jit
    def init(key: jax.Array) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: optax.Params, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(*inputs)

    return init, apply
