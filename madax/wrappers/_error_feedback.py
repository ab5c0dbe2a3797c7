"""Error feedback: the momentum makes up for the rounding errors of codes.

For each element, the slope is the derivative of the update with respect to the previous
momentum, and the decay is the derivative of the new momentum. An amount added to the
momentum therefore adds slope * (1 + decay + decay**2 + ...) times as much to later
updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import tree_utils

from madax._core.checks import leaf_name
from madax._core.names import Tree, flatten_named
from madax._core.numerics import rounded
from madax._core.shards import barrier
from madax._core.tracing import Shapes, dependences, shapes_of
from madax._core.vectors import shape_per_leaf, split_per_leaf
from madax.codes._array import QuantizedArray, is_quantized
from madax.codes._leaves import widen
from madax.codes._quantize import decoded

# The names of a momentum in the states of optax.
_NUMERIC = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
_NAMES = ("mu", "trace")


class CodedLeaves(NamedTuple):
    """The leaves of the parameters that are codes, in flatten order."""

    treedef: jax.tree_util.PyTreeDef  # the structure, in which codes are leaves
    paths: tuple[str, ...]  # of all leaves
    places: tuple[int, ...]  # of the leaves of codes

    def momentum(self, state: optax.OptState) -> list[jax.Array]:
        """Returns the one float momentum that a state has for each leaf of codes."""
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
                    f"error_feedback=True needs a momentum of floats, but {name} has "
                    f"a momentum with dtype {found[0].dtype}; pass moment_format to "
                    "with_quantized_params instead of with_quantized_state inside it."
                )
            momenta += found
        return momenta

    def with_momentum(
        self, state: optax.OptState, ms: Sequence[jax.Array | None]
    ) -> optax.OptState:
        """Returns the state with another momentum for the leaves of codes."""
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

        A field counts only if it is a tree like the parameters, one of which may be
        called "mu", too.
        """
        # SM3 has a list of vectors instead of a leaf.
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


def place_and_reason(
    inner: optax.GradientTransformationExtraArgs, shapes: Shapes, coded: CodedLeaves
) -> tuple[int, str]:
    """Returns the first leaf that must not get errors, and why; "" if there is none.

    It traces ``inner``, so its caller caches it, for as long as ``inner`` lives.
    """
    params, extra_args = shapes.tree()
    state = jax.eval_shape(inner.init, params)
    ms, count = coded.momentum(state), len(coded.paths)

    def others(state):
        """Returns the leaves of a state that have derivatives, except the momentum."""
        paths, leaves, _ = flatten_named(coded.with_momentum(state, [None] * len(ms)))
        kinds = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
        return dict(itertools.compress(zip(paths, leaves, strict=True), kinds))

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
    # The first inputs are the momenta, followed by their tangents.
    for k, i in enumerate(coded.places):
        tangent, own = len(ms) + k, (updates[i], news[k])
        if tangent not in updates[i]:
            return i, "has updates whose derivative by the momentum is 0"
        if not all(x.get(tangent, True) for x in own) or any(
            tangent in x for x in (*updates, *news) if not any(x is y for y in own)
        ):
            return i, "mixes elements: the momentum of one changes other updates"
        for path, x in kept.items():
            if tangent in x:
                return i, f"has a momentum on which {path!r} in the state depends, too"
        if any(j < len(ms) for j in updates[i]):
            return i, "has updates that are not a linear function of the momentum"
    return 0, ""


class _Step(NamedTuple):
    """A step and its derivatives, with respect to the momentum of leaves of codes."""

    updates: optax.Updates
    state: optax.OptState
    slopes: list[jax.Array]  # the derivatives of the updates
    decays: list[jax.Array]  # the derivatives of the new momentum


@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """The steps of an optimizer whose momentum gets rounding errors."""

    inner: optax.GradientTransformationExtraArgs
    place_and_reason: Callable[[Shapes, CodedLeaves], tuple[int, str]]
    grads: Tree
    params: Tree
    extra_args: dict[str, Tree]

    @functools.cached_property
    def coded(self) -> CodedLeaves:
        paths, ws, treedef = flatten_named(self.params, is_leaf=is_quantized)
        places = tuple(i for i, w in enumerate(ws) if is_quantized(w))
        return CodedLeaves(treedef, tuple(paths), places)

    def check(self) -> None:
        """Raises a ValueError if ``inner`` cannot take errors in its momentum.

        It can if an update is a linear function of the momentum, element by element,
        and nothing else in its state depends on the momentum.
        """
        # Functions and text, which cannot be traced, are for other transforms of a
        # chain, such as a line search.
        arrays = {
            name: x
            for name, x in self.extra_args.items()
            if all(isinstance(leaf, _NUMERIC) for leaf in jax.tree.leaves(x))
        }
        shapes = jax.eval_shape(lambda p, x: (decoded(p), x), self.params, arrays)
        place, reason = self.place_and_reason(shapes_of(shapes), self.coded)
        if reason:
            name = leaf_name("params", self.coded.paths[place])
            raise ValueError(
                f"error_feedback=True, but {name} {reason}; leave error_feedback out, "
                "or use an optimizer whose updates are a linear function of its "
                "momentum, element by element, such as optax.adamw."
            )

    def zero_slopes(self, state: optax.OptState) -> jax.Array:
        """Checks ``inner``, and returns the slopes before the first step."""
        self.coded.momentum(state)
        # An update that needs extra arguments is checked when it gets them.
        with contextlib.suppress(TypeError):
            self.check()
        return jnp.zeros(shape_per_leaf(len(self.coded.places)), jnp.float32)

    def limited_momentum(
        self, state: optax.OptState, before: jax.Array | None
    ) -> tuple[optax.OptState, jax.Array]:
        """Limits the momentum of a state to the learning rate; returns slopes, too.

        A momentum that makes up for errors at a low rate is far too large at a high
        rate, as in a warm restart. Its effect grows only where slopes rise faster than
        the momentum decays, so only there it is reduced. ``before`` are the last slopes
        that were not zero.

        The rate is measured by a step of the same optimizer on a tree of single
        elements whose moments are all one. Its slopes depend on counts, schedules and
        hyperparameters, but not on gradients.
        """
        count = len(self.coded.places)
        if before is None or before.shape != shape_per_leaf(count):
            made = "without" if before is None else f"for {sum(before.shape)}"
            raise ValueError(
                f"error_feedback=True and params has {count} leaves of codes, but "
                f"the optimizer state was made {made}; call init again."
            )
        if not count:
            return state, before
        single = jax.tree.map(
            lambda w: jnp.ones((1,) * w.ndim, w.dtype),
            jax.eval_shape(decoded, self.params),
        )
        ones = jax.tree.map(
            lambda x, one: x if jnp.shape(x) == one.shape else jnp.ones_like(one),
            state,
            jax.eval_shape(self.inner.init, single),
        )
        zeros = jax.tree.map(
            lambda w, g: jnp.zeros_like(w, g.dtype), single, self.grads
        )
        try:
            step = self._step(ones, zeros, single)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "error_feedback=True steps inner on single elements, but inner depends "
                f"on the shapes of leaves ({error}); leave error_feedback out, or "
                "label leaves by path or rank."
            ) from error

        ms, after = self.coded.momentum(state), []
        for i, last in enumerate(split_per_leaf(before, count, separate_kernels=True)):
            slope, decay = (
                each[i].reshape(()).astype(last.dtype)
                for each in (step.slopes, step.decays)
            )
            now = jnp.abs(slope)
            rises = (last > 0) & (now * decay > last)
            factor = jnp.where(rises, last / jnp.where(rises, now * decay, 1), 1)
            ms[i] = rounded(widen(ms[i]) * factor).astype(ms[i].dtype)
            after.append(jnp.where(now > 0, now, last))
        state = self.coded.with_momentum(state, ms)
        return state, jnp.stack(after) if after else before

    def state_with_errors(
        self, state: optax.OptState, moves: Sequence[jax.Array]
    ) -> tuple[optax.OptState, list[jax.Array]]:
        """Returns the state with rounding errors in its momentum, and the moves.

        ``moves`` says by how many codes the leaves of codes move. The returned moves
        are computed from the stored codes.

        On CPUs the step is computed again after the new codes are stored. A CPU kernel
        has one result, so quotients that the codes and the momentum share would be kept
        as floats, six for each weight.
        """
        coded, new = self.coded, []
        gs, ws = map(coded.treedef.flatten_up_to, (self.grads, self.params))
        for i, move in zip(coded.places, moves, strict=True):
            codes = ws[i].codes
            codes = (codes.astype(jnp.int32) + move).astype(codes.dtype)
            gs[i], ws[i], codes = _computed_first((gs[i], ws[i], codes))
            new.append(codes)
        grads, values = map(coded.treedef.unflatten, (gs, ws))
        step = self._step(state, grads, decoded(values))
        us = coded.treedef.flatten_up_to(step.updates)
        us, ws = ([each[i] for i in coded.places] for each in (us, ws))
        ms = coded.momentum(step.state)
        leaves = zip(ws, us, new, ms, step.slopes, step.decays, strict=True)
        # An optimizer that stores the momentum as codes would read it in several
        # kernels.
        ms = [_computed_first(_momentum_with_error(*leaf)) for leaf in leaves]
        moves = [
            codes.astype(jnp.int32) - w.codes.astype(jnp.int32)
            for w, codes in zip(ws, new, strict=True)
        ]
        return coded.with_momentum(step.state, ms), moves

    def _step(self, state: optax.OptState, grads: Tree, values: Tree) -> _Step:
        """Returns a step and its derivatives, for float gradients and parameters.

        Each element has a derivative of its own, because its momentum acts on it alone.
        """
        coded, ms = self.coded, self.coded.momentum(state)

        def step(ms):
            before = coded.with_momentum(state, ms)
            updates, after = self.inner.update(grads, before, values, **self.extra_args)
            us = coded.treedef.flatten_up_to(updates)
            us = [us[i] for i in coded.places]
            return (us, coded.momentum(after)), (updates, after)

        ones = [jnp.ones_like(m) for m in ms]
        _, slopes, (updates, after) = jax.jvp(step, (ms,), (ones,), has_aux=True)
        return _Step(updates, after, *slopes)


def _computed_first(x: Tree) -> Tree:
    """Returns a tree of arrays that CPUs compute before all that uses it.

    Other compilers make one kernel for all results of a leaf, and need no barrier.
    """
    return jax.lax.platform_dependent(x, cpu=barrier, default=lambda x: x)


@jax.jit
def _momentum_with_error(
    w: QuantizedArray,
    u: jax.Array,
    codes: jax.Array,
    m: jax.Array,
    slope: jax.Array,
    decay: jax.Array,
) -> jax.Array:
    """Returns the momentum ``m`` after an update ``u`` that was rounded to ``codes``.

    It gains ``(1 - decay) / slope`` times the error of the value, not of the code,
    because on a curved grid a code up and a code down differ in length.
    """
    # Compilers would rewrite a quotient of quotients, and round differently.
    value, slope = w.dequantize(jnp.float32), rounded(widen(slope))
    moved = w.like(codes, w.scale).dequantize(jnp.float32) - value
    # The part of a step beyond the max code is not a rounding error.
    wanted = jnp.clip(rounded(widen(u)), -w.scale - value, w.scale - value)
    error = rounded((wanted - moved) * (1 - widen(decay)))
    after = widen(m) + error / jnp.where(slope == 0, 1, slope)
    after = after.astype(m.dtype)
    ok = (slope != 0) & jnp.isfinite(u) & jnp.isfinite(after)
    return jnp.where(ok, after, m)
