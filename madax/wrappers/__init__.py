"""Wrappers that let any optax optimizer train codes, or keep its state in codes."""

from madax.wrappers._multi_steps import multi_steps
from madax.wrappers._quantized_params import (
    WithQuantizedParamsState,
    with_quantized_params,
)
from madax.wrappers._quantized_state import (
    WithQuantizedStateState,
    with_quantized_state,
)
from madax.wrappers._stochastic_rounding import (
    WithStochasticRoundingState,
    with_stochastic_rounding,
)

__all__ = [
    "WithQuantizedParamsState",
    "WithQuantizedStateState",
    "WithStochasticRoundingState",
    "multi_steps",
    "with_quantized_params",
    "with_quantized_state",
    "with_stochastic_rounding",
]
