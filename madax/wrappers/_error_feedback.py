"""Error feedback: a momentum makes up for what the rounding of codes lost.

In each element, the previous momentum enters the update with a factor, the slope, and
the new momentum with another, the decay. An amount added to the momentum therefore adds
slope * (1 + decay + decay**2 + ...) times as much to the updates that follow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils

from madax._core.checks import leaf_name
from madax._core.names import Tree, flatten_named
from madax._core.numerics import rounded
from madax._core.shards import barrier
from madax._core.tracing import Shapes, dependences, shapes_of
from madax._core.vectors import entries, one_a_leaf
from madax.codes._array import QuantizedArray, is_quantized
from madax.codes._leaves import widen
from madax.codes._quantize import decoded

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
                    f"error_feedback=True needs a momentum of floats, but {name} has "
                    f"a momentum with dtype {found[0].dtype}; pass moment_format to "
                    "with_quantized_params instead of with_quantized_state inside it."
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


@functools.lru_cache(maxsize=64)
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


class _Step(NamedTuple):
    """A step, and its derivatives by the momentum of each leaf of codes."""

    updates: optax.Updates
    state: optax.OptState
    slopes: list[jax.Array]  # the derivatives of the updates
    decays: list[jax.Array]  # the derivatives of the new momentum


@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """A step of an optimizer whose momentum gets errors of rounding."""

    inner: optax.GradientTransformationExtraArgs
    grads: Tree
    params: Tree
    extra_args: dict[str, Tree]

    @functools.cached_property
    def coded(self) -> CodedLeaves:
        paths, ws, treedef = flatten_named(self.params, is_leaf=is_quantized)
        places = tuple(i for i, w in enumerate(ws) if is_quantized(w))
        return CodedLeaves(treedef, tuple(paths), places)

    def check(self) -> None:
        """Raises a ValueError if errors do not belong in the momentum.

        They do if an update is a linear function of the momentum, element by element,
        and nothing else that ``inner`` keeps depends on it.
        """
        args = self.params, self.extra_args
        shapes = jax.eval_shape(lambda p, x: (decoded(p), x), *args)
        place, reason = _place_and_reason(self.inner, shapes_of(shapes), self.coded)
        if reason:
            name = leaf_name("params", self.coded.paths[place])
            raise ValueError(
                f"error_feedback=True, but {name} {reason}; leave error_feedback out, "
                "or use an optimizer whose updates are a linear function of its "
                "momentum, element by element, such as optax.adamw."
            )

    def zero_slopes(self, state: optax.OptState) -> jax.Array:
        """The slopes before the first step, for each leaf of codes, after a check."""
        self.coded.momentum(state)
        # An update that needs more arguments is checked when there are some.
        with contextlib.suppress(TypeError):
            self.check()
        return jnp.zeros(entries(len(self.coded.places)), jnp.float32)

    def limited_momentum(
        self, state: optax.OptState, before: jax.Array | None
    ) -> tuple[optax.OptState, jax.Array]:
        """The state with a momentum that fits the learning rate, and slopes of a step.

        A momentum that makes up for errors at a low rate would be far too large at a
        high one, as in a warm restart. Its effect grows only where slopes rise faster
        than the momentum decays, so it is made smaller there, and only there. Slopes
        ``before`` are the last ones that were not zero.

        The rate is read from a step of the same optimizer on a tree of single elements,
        whose moments are all ones. Its slopes change with counts, schedules and
        hyperparameters, but not with any gradient.
        """
        count = len(self.coded.places)
        if before is None or before.shape != entries(count):
            made = "without" if before is None else f"for {sum(before.shape)}"
            raise ValueError(
                f"error_feedback=True and params has {count} leaves of codes, but "
                f"the optimizer state was made {made}; call init again."
            )
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
        step = self._step(ones, zeros, single)

        ms, after = self.coded.momentum(state), []
        for i, last in enumerate(one_a_leaf(before, count, apart=True)):
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
        """The state after a step with its rounding errors in the momentum, and moves.

        ``moves`` say by how many codes the leaves of codes move. The moves that are
        returned are computed from the stored codes.

        On CPUs the step is taken a second time, after the new codes are stored. A
        kernel there has one result, and quotients that the codes and the momentum share
        would be kept as floats, six for each weight.
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
        # An optimizer that stores the momentum as codes reads it in several kernels.
        ms = [_computed_first(_momentum_with_error(*leaf)) for leaf in leaves]
        moves = [
            codes.astype(jnp.int32) - w.codes.astype(jnp.int32)
            for w, codes in zip(ws, new, strict=True)
        ]
        return coded.with_momentum(step.state, ms), moves

    def _step(self, state: optax.OptState, grads: Tree, values: Tree) -> _Step:
        """A step with other gradients and parameters, floats, and its derivatives.

        Elements have their own derivatives, as the momentum acts on each alone.
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
    """A tree of arrays, which CPUs store before they go on.

    Other compilers make one kernel for all results of a leaf, and keep no floats.
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
    """The momentum ``m`` after an update ``u`` that was rounded to ``codes``.

    It gains ``(1 - decay) / slope`` times the error of the value, not of the code: on a
    curved grid, a step of one code up and one down are not equally long.
    """
    # Compilers rewrite a quotient of quotients, where they see that it is one.
    value, slope = w.dequantize(jnp.float32), rounded(widen(slope))
    moved = w.like(codes, w.scale).dequantize(jnp.float32) - value
    # What would have gone beyond the max code is no error of rounding.
    wanted = jnp.clip(rounded(widen(u)), -w.scale - value, w.scale - value)
    error = rounded((wanted - moved) * (1 - widen(decay)))
    after = widen(m) + error / jnp.where(slope == 0, 1, slope)
    after = after.astype(m.dtype)
    ok = (slope != 0) & jnp.isfinite(u) & jnp.isfinite(after)
    return jnp.where(ok, after, m)
