"""Which optimizers error feedback is for, told by tracing a step of them."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import leaf_name
from madax._core.names import Tree, flatten_named
from madax._core.tracing import Shapes, dependences, shapes_of
from madax.codes._leaves import flatten
from madax.codes._quantize import dequantize_params
from madax.wrappers._momentum import find_momentum, places_of_codes, with_momentum


def check_feedback(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    extra_args: dict[str, Tree],
) -> None:
    """Raises a ValueError if errors do not belong in the momentum of ``inner``.

    They do if an update is a linear function of the momentum, element by element, and
    nothing else that ``inner`` keeps depends on it.
    """
    paths, places = flatten(params)[0], places_of_codes(params)
    shapes = jax.eval_shape(lambda p, x: (dequantize_params(p), x), params, extra_args)
    reason = _reason_against(inner, shapes_of(shapes), tuple(places))
    if reason is not None:
        place, text = reason
        raise ValueError(
            f"error_feedback=True, but {leaf_name('params', paths[place])} {text}; "
            "leave error_feedback out, or use an optimizer whose updates are a linear "
            "function of its momentum, element by element, such as optax.adamw."
        )


@lru_cache(maxsize=64)
def _reason_against(
    inner: optax.GradientTransformationExtraArgs,
    shapes: Shapes,
    places: tuple[int, ...],
) -> tuple[int, str] | None:
    """The place of a leaf that may not get errors, and the reason; traced once."""
    params, extra_args = shapes.tree()
    state = jax.eval_shape(inner.init, params)
    ms = find_momentum(state, params, places)
    count = len(jax.tree.leaves(params))

    def derivatives(ms, tangents, state, grads, params, extra_args):
        def step(ms):
            before = with_momentum(state, params, places, ms)
            updates, after = inner.update(grads, before, params, **extra_args)
            others = with_momentum(after, params, places, [None] * len(places))
            us = jax.tree.structure(params).flatten_up_to(updates)
            new = find_momentum(after, params, places)
            return us, new, list(_inexact(others).values())

        return jax.jvp(step, (ms,), (tangents,))[1]

    found = dependences(derivatives, ms, ms, state, params, params, extra_args)
    updates, news = found[:count], found[count : count + len(places)]
    kept = _inexact(with_momentum(state, params, places, [None] * len(places)))
    kept = dict(zip(kept, found[count + len(places) :], strict=True))
    # Inputs of derivatives are first the momenta, then their tangents.
    for k, i in enumerate(places):
        tangent, own = len(places) + k, (updates[i], news[k])
        if tangent not in updates[i]:
            return i, "has updates whose derivative by the momentum is 0"
        if not all(x.get(tangent, True) for x in own) or any(
            tangent in x for x in (*updates, *news) if not any(x is y for y in own)
        ):
            return i, "has elements whose momentum changes updates of others"
        for path, x in kept.items():
            if tangent in x:
                return i, f"has a momentum on which {path!r} in the state depends, too"
        if any(j < len(places) for j in updates[i]):
            return i, "has updates that are no linear function of the momentum"
    return None


def _inexact(state: optax.OptState) -> dict[str, jax.Array]:
    """The leaves of a state that have derivatives, by their paths."""
    paths, leaves, _ = flatten_named(state)
    return {
        path: x
        for path, x in zip(paths, leaves, strict=True)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    }
