"""Workloads: data, a model and a score, one module each."""

import dataclasses
from collections.abc import Callable

import jax
import optax

Batch = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What to train, and how it is scored.

    Attributes:
      name: as written in the records.
      train: inputs and targets; the first axis counts the examples.
      init: random key to parameters, compiled.
      loss: parameters and a batch of ``train`` to the mean loss.
      metric: parameters to the accuracy on data held out from ``train``, in [0, 1].
    """

    name: str
    train: Batch
    init: Callable[[jax.Array], optax.Params]
    loss: Callable[[optax.Params, Batch], jax.Array]
    metric: Callable[[optax.Params], jax.Array]
