"""The momentum in the state of an optimizer: found, replaced, and checked for use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils

from madax._core.checks import leaf_name
from madax._core.names import Tree, flatten_named
from madax._core.tracing import Shapes, dependences, shapes_of
from madax.codes._array import is_quantized
from madax.codes._quantize import dequantize_params

# What optax calls the momentum of an optimizer.
_NAMES = ("mu", "trace")


class CodedLeaves(NamedTuple):
    """The leaves of codes among all leaves of the parameters, in flatten order."""

    treedef: jax.tree_util.PyTreeDef  # the structure, in which codes are leaves
    paths: tuple[str, ...]  # of all leaves
    places: tuple[int, ...]  # of the leaves of codes

    def momentum(self, state: optax.OptState) -> list[jax.Array]:
        """The one momentum, of floats, that a state has for each leaf of codes."""
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

        Their values are trees like the parameters: a parameter may be called "mu", too.
        """
        # Instead of a leaf, SM3 has a list of vectors.
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


def check_feedback(
    inner: optax.GradientTransformationExtraArgs,
    params: Tree,
    extra_args: dict[str, Tree],
) -> None:
    """Raises a ValueError if errors do not belong in the momentum of ``inner``.

    They do if an update is a linear function of the momentum, element by element, and
    nothing else that ``inner`` keeps depends on it.
    """
    coded = coded_leaves(params)
    shapes = jax.eval_shape(lambda p, x: (dequantize_params(p), x), params, extra_args)
    place, reason = _place_and_reason(inner, shapes_of(shapes), coded)
    if reason:
        raise ValueError(
            f"error_feedback=True, but {leaf_name('params', coded.paths[place])} "
            f"{reason}; leave error_feedback out, or use an optimizer whose updates "
            "are a linear function of its momentum, element by element, such as "
            "optax.adamw."
        )


@lru_cache(maxsize=64)
def _place_and_reason(
    inner: optax.GradientTransformationExtraArgs, shapes: Shapes, coded: CodedLeaves
) -> tuple[int, str]:
    """The place of a leaf that may not get errors, and why; "" if all may."""
    params, extra_args = shapes.tree()
    state = jax.eval_shape(inner.init, params)
    ms, count = coded.momentum(state), len(coded.paths)

    def others(state):
        """The leaves of a state that have derivatives, without the momentum."""
        paths, leaves, _ = flatten_named(coded.with_momentum(state, [None] * len(ms)))
        named = zip(paths, leaves, strict=True)
        return {
            path: x
            for path, x in named
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        }

    def derivatives(ms, tangents, state, grads, params, extra_args):
        def step(ms):
            before = coded.with_momentum(state, ms)
            updates, after = inner.update(grads, before, params, **extra_args)
            us = coded.treedef.flatten_up_to(updates)
            return us, coded.momentum(after), list(others(after).values())

        return jax.jvp(step, (ms,), (tangents,))[1]

    found = dependences(derivatives, ms, ms, state, params, params, extra_args)
    updates, news = found[:count], found[count : count + len(ms)]
    kept = dict(zip(others(state), found[count + len(ms) :], strict=True))
    # Inputs of derivatives are first the momenta, then their tangents.
    for k, i in enumerate(coded.places):
        tangent, own = len(ms) + k, (updates[i], news[k])
        if tangent not in updates[i]:
            return i, "has updates whose derivative by the momentum is 0"
        if not all(x.get(tangent, True) for x in own) or any(
            tangent in x for x in (*updates, *news) if not any(x is y for y in own)
        ):
            return i, "has elements whose momentum changes updates of others"
        for path, x in kept.items():
            if tangent in x:
                return i, f"has a momentum on which {path!r} in the state depends, too"
        if any(j < len(ms) for j in updates[i]):
            return i, "has updates that are no linear function of the momentum"
    return 0, ""
