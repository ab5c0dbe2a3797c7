"""What is tested, by name: number formats and optimizers."""

import operator

import optax
import pytest

import madax
from madax import LogFormat, MomentFormat, SymlogFormat, UniformFormat

FORMATS = {
    "log8": LogFormat.from_dynamic_range(8, 100),
    "log16": LogFormat.from_dynamic_range(16, 10_000),
    "symlog8": SymlogFormat(8, 1 / 3),
    "symlog16": SymlogFormat(16, 1e-3),
    "uniform8": UniformFormat(8),
    "uniform16": UniformFormat(16),
}


# Of two arrays.
OPERATORS = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.eq,
    operator.ne,
]


every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def formats(*names):
    """Some of them, by name."""
    return {name: FORMATS[name] for name in names}


# Each class, and 16 bits.
SOME = formats("log8", "log16", "symlog8", "uniform8")

# Two roundings may not be fused into one or the other: a product with a power of two
# has none. XLA fuses Adam's b1 * m + (1 - b1) * g either way, by the shape of a shard.
EXACT_ADAM = optax.adam(2**-7, b1=0.5, b2=0.75)
OPTIMIZERS = {
    "madam": madax.madam(0.02),
    "floor_b1": madax.madam(
        optax.linear_schedule(0.05, 0.01, 50), b1=0.9, floor=1.0, p_scale=1.5
    ),
    "moments8": madax.madam(0.02, b1=0.9, moment_format=MomentFormat(8), seed=3),
    "moments12": madax.madam(0.02, b1=0.9, moment_format=MomentFormat(12)),
    "decayed": madax.madam(0.05, floor=1.0, weight_decay=0.3),
    "nearest": madax.madam(0.05, rounding="nearest"),
    "muon": madax.muon(
        0.02,
        b1=None,
        direction="factored",
        weight_decay=0.3,
        moment_format=MomentFormat(8),
    ),
    "factored": madax.muon_madam(
        0.02, b1=None, direction="factored", moment_format=MomentFormat(8)
    ),
    "bbit_madam": madax.papers.bbit_madam(0.02),
    "lns_madam": madax.papers.lns_madam(2**-5),
    "wrapped_adam": madax.with_quantized_params(EXACT_ADAM),
    "adam_feedback": madax.with_quantized_params(EXACT_ADAM, error_feedback=True),
    # Adam's is exact only without its quotient by 1 - b1**t.
    "sgd_feedback": madax.with_quantized_params(
        optax.sgd(2**-4, momentum=0.5), error_feedback=True
    ),
}


def optimizers(*names):
    """Some of them, by name."""
    return {name: OPTIMIZERS[name] for name in names}
