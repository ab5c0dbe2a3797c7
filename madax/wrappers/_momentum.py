"""The momentum in the state of an optimizer: found, and replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils

from madax._core.checks import leaf_name
from madax._core.names import Tree, flatten_named
from madax.codes._array import is_quantized

# What optax calls the momentum of an optimizer.
_NAMES = ("mu", "trace")


class CodedLeaves(NamedTuple):
    """The leaves of codes among all leaves of the parameters, in flatten order.

    Attributes:
      treedef: the structure of the parameters, in which codes are leaves.
      paths: the paths of all leaves.
      places: the places of the leaves of codes.
    """

    treedef: jax.tree_util.PyTreeDef
    paths: tuple[str, ...]
    places: tuple[int, ...]

    def momentum(self, state: optax.OptState) -> list[jax.Array]:
        """The momentum that the state of an optimizer has for each leaf of codes.

        Raises:
          ValueError: if there is none, more than one, or one of codes.
        """
        fields, names, momenta = self._momenta(state), " or ".join(_NAMES), []
        for i in self.places:
            found = [leaves[i] for *_, leaves in fields]
            found = [m for m in found if not isinstance(m, optax.MaskedNode)]
            name = leaf_name("params", self.paths[i])
            if len(found) != 1:
                raise ValueError(
                    f"error_feedback=True needs one momentum of {name} in the state of "
                    f"inner, called {names} as in optax.adam and optax.sgd with "
                    f"momentum, but there are {len(found)}; leave error_feedback out."
                )
            if not jnp.issubdtype(found[0].dtype, jnp.floating):
                raise ValueError(
                    "error_feedback=True needs a momentum of floats, but inner has a "
                    f"momentum of {name} with dtype {found[0].dtype}; pass "
                    "moment_format to with_quantized_params instead of "
                    "with_quantized_state inside it."
                )
            momenta += found
        return momenta

    def with_momentum(
        self, state: optax.OptState, ms: Sequence[jax.Array | None]
    ) -> optax.OptState:
        """The state of an optimizer with another momentum for the leaves of codes."""
        for name, path, leaves in self._momenta(state):
            for i, m in zip(self.places, ms, strict=True):
                if not isinstance(leaves[i], optax.MaskedNode):
                    leaves[i] = m
            tree = self.treedef.unflatten(leaves)
            state = tree_utils.tree_set(
                state, lambda at, _, path=path: at == path, **{name: tree}
            )
        return state

    def _momenta(
        self, state: optax.OptState
    ) -> list[tuple[str, jax.tree_util.KeyPath, list[Tree]]]:
        """The names, paths and leaves of fields that hold a momentum of all parameters.

        Only a field counts whose value is a tree like the parameters: a parameter may
        be called "mu", too. Instead of a leaf, SM3 has a list of vectors.
        """
        kinds = (optax.MaskedNode, jax.Array, jax.ShapeDtypeStruct)
        fields = []
        for name in _NAMES:
            for path, value in tree_utils.tree_get_all_with_path(state, name):
                try:
                    leaves = self.treedef.flatten_up_to(value)
                except (ValueError, TypeError):
                    continue
                if leaves and all(isinstance(m, kinds) for m in leaves):
                    fields.append((name, path, leaves))
        return fields


def coded_leaves(params: Tree) -> CodedLeaves:
    """The leaves of codes of parameters."""
    paths, ws, treedef = flatten_named(params, is_leaf=is_quantized)
    places = tuple(i for i, w in enumerate(ws) if is_quantized(w))
    return CodedLeaves(treedef, tuple(paths), places)
