"""Which optimizers error feedback is for, told by tracing a step of them."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import leaf_name
from madax._core.names import Tree, flatten_named
from madax._core.tracing import Shapes, dependences, shapes_of
from madax.codes._quantize import dequantize_params
from madax.wrappers._momentum import CodedLeaves, coded_leaves


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
