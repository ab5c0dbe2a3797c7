"""The optimizers compared, and the learning rate each comes with."""

import dataclasses
from collections.abc import Callable

import optax

import madax


def _same(params: optax.Params) -> optax.Params:
    return params


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One row of the comparison.

    Attributes:
      make: learning rate, or a schedule of it, to the transformation.
      rate: default learning rate.
      quantize: initial parameters to those that are stored and trained, some of them
        as codes perhaps.
    """

    make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    rate: float
    quantize: Callable[[optax.Params], optax.Params] = _same


OPTIMIZERS = {
    "sgd momentum": Optimizer(lambda rate: optax.sgd(rate, momentum=0.9), 0.1),
    "adam": Optimizer(optax.adam, 1e-3),
    "madam": Optimizer(madax.madam, 0.01),
}
