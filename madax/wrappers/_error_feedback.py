"""Error feedback: a momentum makes up for what the rounding of codes lost.

In each element, the previous momentum enters the update with a factor, the slope, and
the new momentum with another, the decay. An amount added to the momentum therefore adds
slope * (1 + decay + decay**2 + ...) times as much to the updates that follow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.names import Tree
from madax._core.numerics import rounded
from madax._core.shards import barrier
from madax._core.vectors import entries, one_a_leaf
from madax.codes._array import QuantizedArray, is_quantized
from madax.codes._leaves import widen
from madax.codes._quantize import dequantize_params
from madax.wrappers._momentum import CodedLeaves, check_feedback, coded_leaves


def zero_slopes(
    inner: optax.GradientTransformationExtraArgs, state: optax.OptState, params: Tree
) -> jax.Array:
    """The slopes before the first step: zeros, one for each leaf of codes.

    Raises:
      ValueError: if ``inner`` is known to be wrong for errors of rounding.
    """
    coded = coded_leaves(params)
    coded.momentum(state)
    # An update that needs more arguments is checked when there are some.
    with contextlib.suppress(TypeError):
        check_feedback(inner, params, {})
    return jnp.zeros(entries(len(coded.places)), jnp.float32)


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
        return coded_leaves(self.params)

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
            self.params,
            is_leaf=is_quantized,
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
        step = self._step(state, grads, dequantize_params(values))
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
    value, slope = w.dequantize(), rounded(widen(slope))
    moved = QuantizedArray(codes, w.scale, w.format).dequantize() - value
    # What would have gone beyond the max code is no error of rounding.
    wanted = jnp.clip(rounded(widen(u)), -w.scale - value, w.scale - value)
    error = rounded((wanted - moved) * (1 - widen(decay)))
    after = widen(m) + error / jnp.where(slope == 0, 1, slope)
    after = after.astype(m.dtype)
    ok = (slope != 0) & jnp.isfinite(u) & jnp.isfinite(after)
    return jnp.where(ok, after, m)
