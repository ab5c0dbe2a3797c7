"""EasyDeL: an optimizer of optax in its registry, from which it makes optimizers."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import optax

from madax._core.checks import check_function, check_transformation, type_error
from madax.trainers._shared import imported

# Registered names, with the functions that were given for them last.
_MAKERS: dict[str, Callable] = {}


def easydel(
    name: str, make: Callable[[optax.Schedule], optax.GradientTransformation]
) -> str:
    """Registers an optimizer of optax with EasyDeL, under a name.

    EasyDeL makes its optimizer again when it resumes a run, from a registry of its own.
    It pins a JAX without hijax types, and so trains no codes. Weights in bfloat16 take
    :func:`madax.wrappers.with_stochastic_rounding`.

    The weight decay of EasyDeL, by default 0.01, goes after the optimizer, where it
    would move rounded weights: pass ``weight_decay=0.0``, and give the decay to the
    optimizer of optax.

    Args:
      name: the name for ``optimizer=`` of the training arguments. A name that this
        function registered before gets the new ``make``.
      make: ``make(learning_rate)`` returns the optimizer, for a schedule from steps to
        rates that EasyDeL makes of its training arguments.

    Returns:
      The name.

    Raises:
      ImportError: if EasyDeL is not installed.
      TypeError: if ``name`` is no string, ``make`` no function or, when EasyDeL calls
        it, does not return an optimizer.
      ValueError: if EasyDeL has an optimizer of that name or, when it makes this one,
        a weight decay.

    Example:
      .. code-block:: python

          def four_bytes(rate):
              return madax.wrappers.with_stochastic_rounding(
                  optax.adamw(rate), moment_format=madax.MomentFormat(bits=8)
              )

          arguments = ed.TrainingArguments(
              optimizer=madax.trainers.easydel("four_bytes", four_bytes),
              weight_decay=0.0,
              ...,
          )
    """
    if not isinstance(name, str):
        raise type_error("name", "a string", name, "pass for example 'four_bytes'")
    check_function("make", make, "pass for example lambda rate: optax.adamw(rate)")
    optimizers: Any = imported("eformer.optimizers", "easydel")

    def build(self, schedule):
        # EasyDeL adds the decay itself, and tells no optimizer of it.
        decay = sys._getframe(1).f_locals.get("weight_decay", 0.0)
        if decay:
            raise ValueError(
                f"weight_decay is {decay}, but EasyDeL would add it after the "
                "optimizer, where it moves rounded weights; pass weight_decay=0.0, and "
                "the decay to the optimizer of optax."
            )
        tx = _MAKERS[name](schedule)
        check_transformation("make(learning_rate)", tx)
        return tx

    if name not in _MAKERS:
        builder = dataclasses.make_dataclass(
            "Builder",
            [("config", optimizers.AdamWConfig)],  # EasyDeL fills in one it knows.
            bases=(optimizers.OptimizerBuilder,),
            namespace={"build": build},
        )
        optimizers.register_optimizer(name)(builder)
    _MAKERS[name] = make
    return name
