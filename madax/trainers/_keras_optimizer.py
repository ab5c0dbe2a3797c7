"""An optimizer of optax as an optimizer of Keras, with its state in variables.

This module is imported only after Keras.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import optax

from madax._core.names import Tree
from madax.trainers._shared import imported

_keras: Any = imported("keras", "keras")


def _refuse(*args: object) -> None:
    raise ValueError(
        "the learning rate of this optimizer cannot be set, because tx has its "
        "own; leave callbacks out that set one, and pass a schedule to tx, such as "
        "madax.muon(optax.cosine_decay_schedule(0.02, steps))."
    )


class _Rate(float):
    """Stands for the rate of ``tx``, which is not known; infinite, as no rate is."""

    assign = _refuse


_RATE = _Rate("inf")


@_keras.saving.register_keras_serializable("madax.trainers.keras")
class Optax(_keras.optimizers.Optimizer):
    """An optimizer of optax, for ``compile``."""

    def __init__(self, tx: optax.GradientTransformation):
        super().__init__(learning_rate=lambda: _RATE)
        self.tx = tx

    def build(self, variables: Sequence[Tree]) -> None:
        if self.built:  # A LossScaleOptimizer around it builds it again.
            return
        super().build(variables)
        state = self.tx.init(self._named([v.value for v in variables]))
        leaves, self.treedef = jax.tree.flatten(state)
        for i, x in enumerate(leaves):
            self.add_variable(x.shape, "zeros", x.dtype, name=f"state_{i}").assign(x)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[jax.Array],
        trainable_variables: Sequence[Tree],
    ) -> tuple[list[Tree], list[jax.Array]]:
        given, known = len(trainable_variables), len(self._trainable_variables)
        if given != known:
            raise ValueError(
                f"an optimizer that was made for {known} variables got {given}; call "
                "madax.trainers.keras again after layers were frozen, unfrozen or "
                "added, and compile with what it returns."
            )
        # A LossScaleOptimizer passes its variables.
        count, *leaves = (getattr(v, "value", v) for v in optimizer_variables)
        state = self.treedef.unflatten(leaves)
        params = self._named(trainable_variables)
        updates, state = self.tx.update(self._named(grads), state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.leaves(params), [count + 1, *jax.tree.leaves(state)]

    def apply(
        self,
        grads: Sequence[jax.Array],
        trainable_variables: Sequence[Any] | None = None,
    ) -> None:
        variables = trainable_variables or self._trainable_variables
        self._check_variables_are_known(variables)
        kept = self.variables
        values = [v.value for v in kept], grads, [v.value for v in variables]
        new = itertools.chain(*self.stateless_apply(*values))
        for variable, value in zip([*variables, *kept], new, strict=True):
            variable.assign(value)

    def _named(self, values: Sequence[Tree]) -> Tree:
        return named(self._trainable_variables, values)

    learning_rate = property(lambda self: _RATE, _refuse)

    def get_config(self) -> dict[str, Any]:
        return {}  # A tx cannot be written to a file.

    @classmethod
    def from_config(cls, config: object, custom_objects: object = None) -> Any:
        raise ValueError(
            "a file does not hold the tx of madax.trainers.keras; pass compile=False "
            "to load_model, and the model to madax.trainers.keras and compile."
        )


def named(variables: Sequence[Tree], values: Sequence[Tree]) -> Tree:
    """Returns the values by the paths of their variables, in the same order.

    Two modules of the same name have variables of the same path, of which the later
    module gets a number. JAX sorts the keys of a dict, but not of an ``OrderedDict``.
    Keras counts the modules of a process in their names, so another model's numbers
    would sort in another order, in which its checkpoints would be restored wrongly.
    """
    found: OrderedDict[str, Tree] = OrderedDict()
    for variable, value in zip(variables, values, strict=True):
        module, _, name = variable.path.rpartition("/")
        numbered = (f"{module}_{i}/{name}" for i in itertools.count(1))
        paths = itertools.chain([variable.path], numbered)
        found[next(path for path in paths if path not in found)] = value
    return found
