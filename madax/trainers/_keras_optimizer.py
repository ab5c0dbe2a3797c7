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

_Optimizer: Any = imported("keras", "keras").optimizers.Optimizer


class Optax(_Optimizer):
    """An optimizer of optax, for ``compile``."""

    def __init__(self, tx: optax.GradientTransformation):
        super().__init__(learning_rate=1.0)
        self.tx = tx

    def build(self, variables: Sequence[Tree]) -> None:
        super().build(variables)
        own = len(self.variables)
        self.slices = slice(own), slice(own, None)
        state = self.tx.init(self._named([v.value for v in variables]))
        leaves, self.treedef = jax.tree.flatten(state)
        for i, x in enumerate(leaves):
            self.add_variable(x.shape, "zeros", x.dtype, name=f"state_{i}").assign(x)

    def stateless_apply(
        self,
        optimizer_variables: list[jax.Array],
        grads: list[jax.Array],
        trainable_variables: list[Tree],
    ) -> tuple[list[Tree], list[jax.Array]]:
        own, leaves = (optimizer_variables[s] for s in self.slices)
        state = self.treedef.unflatten(leaves)
        params = self._named(trainable_variables)
        updates, state = self.tx.update(self._named(grads), state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.leaves(params), own + jax.tree.leaves(state)

    def _named(self, values: Sequence[Tree]) -> Tree:
        return named(self._trainable_variables, values)

    def _refuse(self, learning_rate: object) -> None:
        raise ValueError(
            "the learning rate of this optimizer cannot be set, because tx has its "
            "own; leave callbacks out that set one, and pass a schedule to tx, such as "
            "madax.muon(optax.cosine_decay_schedule(0.02, steps))."
        )

    learning_rate = property(_Optimizer.learning_rate.fget, _refuse)


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
