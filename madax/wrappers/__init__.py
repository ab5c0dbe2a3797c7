"""Any optimizer of optax, on codes and with its state in codes."""

from madax.wrappers._quantized_params import (
    WithQuantizedParamsState,
    with_quantized_params,
)
from madax.wrappers._quantized_state import (
    WithQuantizedStateState,
    with_quantized_state,
)

__all__ = [
    "WithQuantizedParamsState",
    "WithQuantizedStateState",
    "with_quantized_params",
    "with_quantized_state",
]
