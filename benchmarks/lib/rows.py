"""The optimizers and formats whose steps are timed, weighed and compiled."""

import dataclasses
from importlib.util import find_spec
from typing import Any

import jax.numpy as jnp
import optax

import madax

LOG_8 = madax.LogFormat.from_dynamic_range(bits=8, ratio=100)
LOG_16 = madax.LogFormat.from_dynamic_range(bits=16, ratio=1000)
SYMLOG_8 = madax.SymlogFormat(bits=8, linear_range=1 / 3)
V_8 = madax.MomentFormat(bits=8)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the tables.

    Attributes:
      tx: the optimizer.
      format: format of the weight matrices; None for floats.
      params: dtype of float parameters.
      grads: dtype of gradients.
    """

    tx: optax.GradientTransformation
    format: madax.formats.Format | None = None
    params: Any = jnp.float32
    grads: Any = jnp.float32

    def quantize(self, weights: optax.Params) -> optax.Params:
        """Returns float32 weights as the optimizer stores them."""
        if self.format is not None:
            return madax.quantize_params(weights, self.format)
        return optax.tree.cast(weights, self.params)

    def quantize_stack(self, weights: Any) -> Any:
        """Returns stacks of layers, a scale for each layer's matrices."""
        if self.format is None:
            return self.quantize(weights)
        layers = madax.quantize_params(
            weights["layers"],
            self.format,
            where=lambda path, w: path.endswith("kernel"),
            channel_axis=0,
        )
        return {"ends": self.quantize(weights["ends"]), "layers": layers}

    def step(self, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        """Returns parameters and state after the step of the optimizer alone."""
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state


BF16 = {"params": jnp.bfloat16, "grads": jnp.bfloat16}
ROWS = {
    "adam": Row(optax.adam(1e-3)),
    "adamw": Row(optax.adamw(1e-3)),
    "lion": Row(optax.lion(1e-4)),
    "sgd": Row(optax.sgd(0.1)),
    "adafactor": Row(optax.adafactor(1e-3)),
    "muon": Row(optax.contrib.muon(0.02)),
    "adam bfloat16": Row(optax.adam(1e-3), **BF16),
    "adamw, 8-bit state": Row(madax.with_quantized_state(optax.adamw(1e-3))),
    "adamw bfloat16, 8-bit state": Row(
        madax.with_quantized_state(optax.adamw(1e-3)), **BF16
    ),
    "madam": Row(madax.madam()),
    "madam bfloat16": Row(madax.madam(), **BF16),
    "bbit_madam": Row(madax.papers.bbit_madam()),
    "native 16": Row(madax.madam(), LOG_16, grads=jnp.bfloat16),
    "native 16, 8-bit v": Row(
        madax.madam(moment_format=V_8), LOG_16, grads=jnp.bfloat16
    ),
    "native 8": Row(madax.madam(), LOG_8, grads=jnp.bfloat16),
    "native 8, 8-bit v": Row(madax.madam(moment_format=V_8), LOG_8, grads=jnp.bfloat16),
    "native 8 symlog, 8-bit v": Row(
        madax.madam(moment_format=V_8), SYMLOG_8, grads=jnp.bfloat16
    ),
    "native 8 adam": Row(
        madax.with_quantized_params(optax.adam(1e-3)), LOG_8, grads=jnp.bfloat16
    ),
    "native 8 adam, 8-bit state": Row(
        madax.with_quantized_params(optax.adam(1e-3), moment_format=V_8),
        LOG_8,
        grads=jnp.bfloat16,
    ),
}
# These need a package, and with Pallas a GPU.
RIVALS: dict[str, Row] = {}
if find_spec("flashoptim_jax") is not None:
    from flashoptim_jax import flash_adamw  # pyrefly: ignore[missing-import]

    @dataclasses.dataclass(frozen=True)
    class _Flash(Row):
        """An optimizer that is no transform of optax."""

        def step(self, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            """Returns parameters and state after a step of its own kind."""
            return self.tx.step(params, state, grads)  # pyrefly: ignore

    RIVALS = {
        "flash_adamw": _Flash(flash_adamw(), **BF16),
        "flash_adamw, no Pallas": _Flash(flash_adamw(fused=False), **BF16),
    }
BASELINE = "adam"
