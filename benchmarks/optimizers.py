"""The optimizers compared, and the learning rate each comes with."""

import dataclasses
from collections.abc import Callable

import optax

import madax


def _same(params: optax.Params) -> optax.Params:
    return params


def _to_8_bits(params: optax.Params) -> optax.Params:
    format = madax.LogFormat.from_dynamic_range(bits=8, ratio=100)
    return madax.quantize_params(params, format)


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
    "8-bit adam": Optimizer(
        lambda rate: madax.with_quantized_params(optax.adam(rate)), 1e-3, _to_8_bits
    ),
    "8-bit madam": Optimizer(
        lambda rate: madax.madam(rate, moment_format=madax.MomentFormat(bits=8)),
        0.01,
        _to_8_bits,
    ),
}
