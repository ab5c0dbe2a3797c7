"""The momentum in the state of an optimizer: found, and replaced."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils

from madax._core.checks import leaf_name
from madax._core.names import Tree
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten

# What optax calls the momentum of an optimizer.
_NAMES = ("mu", "trace")


def find_momentum(
    state: optax.OptState, params: optax.Params, places: Sequence[int]
) -> list[jax.Array]:
    """The momentum that the state of an optimizer has for each leaf of codes.

    Raises:
      ValueError: if there is none, more than one, or one of codes.
    """
    fields, names, momenta = _fields(state, params), " or ".join(_NAMES), []
    paths, *_ = flatten(params)
    for i in places:
        found = [leaves[i] for *_, leaves in fields]
        found = [m for m in found if not isinstance(m, optax.MaskedNode)]
        name = leaf_name("params", paths[i])
        if len(found) != 1:
            raise ValueError(
                f"error_feedback=True needs one momentum of {name} in the state of "
                f"inner, called {names} as in optax.adam and optax.sgd with momentum, "
                f"but there are {len(found)}; leave error_feedback out."
            )
        if not jnp.issubdtype(found[0].dtype, jnp.floating):
            raise ValueError(
                "error_feedback=True needs a momentum of floats, but inner has a "
                f"momentum of {name} with dtype {found[0].dtype}; pass moment_format "
                "to with_quantized_params instead of with_quantized_state inside it."
            )
        momenta += found
    return momenta


def with_momentum(
    state: optax.OptState,
    params: optax.Params,
    places: Sequence[int],
    ms: Sequence[jax.Array | None],
) -> optax.OptState:
    """The state of an optimizer with another momentum for the leaves of codes."""
    treedef = jax.tree.structure(params, is_leaf=is_quantized)
    for name, path, leaves in _fields(state, params):
        for i, m in zip(places, ms, strict=True):
            if not isinstance(leaves[i], optax.MaskedNode):
                leaves[i] = m
        tree = treedef.unflatten(leaves)
        state = tree_utils.tree_set(
            state, lambda at, _, path=path: at == path, **{name: tree}
        )
    return state


def _fields(
    state: optax.OptState, params: optax.Params
) -> list[tuple[str, jax.tree_util.KeyPath, list[Tree]]]:
    """The names, paths and leaves of fields that hold a momentum of all parameters.

    Only a field counts whose value is a tree like the parameters: a parameter may be
    called "mu", too.
    """
    treedef = jax.tree.structure(params, is_leaf=is_quantized)

    def leaves_of(value: Tree) -> list[Tree]:
        try:
            return treedef.flatten_up_to(value)
        except (ValueError, TypeError):
            return []

    fields = [
        (name, path, leaves_of(value))
        for name in _NAMES
        for path, value in tree_utils.tree_get_all_with_path(state, name)
    ]
    # Instead of a leaf, SM3 has a list of vectors.
    kinds = (optax.MaskedNode, jax.Array, jax.ShapeDtypeStruct)
    return [
        field
        for field in fields
        if field[2] and all(isinstance(m, kinds) for m in field[2])
    ]


def places_of_codes(params: optax.Params) -> list[int]:
    """The places of the leaves of codes, in flatten order."""
    return [i for i, w in enumerate(flatten(params)[1]) if is_quantized(w)]
