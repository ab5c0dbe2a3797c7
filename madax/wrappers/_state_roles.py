"""What an optimizer does with each leaf of its state, found by tracing its step.

The noise of a code is harmless where values are averaged, and ruins a step that takes
the difference of two moments. Nothing is run: the jaxpr of a step is read, of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.names import flatten_named
from madax._core.tracing import depends_on
from madax.codes._array import is_quantized
from madax.codes._quantize import dequantize_params
from madax.wrappers._step_reader import FACTORS, GRADS, PARAMS, Reader, Value


class StateLeaves(NamedTuple):
    """The leaves of the state of an optimizer, by their index in flatten order.

    Attributes:
      paths: their names.
      shapes: their shapes and dtypes.
      treedef: the structure of the state.
      owner: the index of the parameter that a leaf belongs to: a float that has the
        shape of the parameter and ends with its path. None for other leaves.
      copies: whether a leaf starts as a function of parameters, such as a copy.
    """

    paths: list[str]
    shapes: list[Any]
    treedef: Any
    owner: list[int | None]
    copies: list[bool]


def state_leaves(inner: Any, params: Any) -> StateLeaves:
    """The leaves of the state that ``inner`` has for ``params``, arrays or shapes."""
    params = jax.eval_shape(lambda params: params, params)
    paths, shapes, treedef = flatten_named(jax.eval_shape(inner.init, params))
    copies = depends_on(lambda params, _: inner.init(params), params, ())
    names, ws, _ = flatten_named(params, is_leaf=is_quantized)

    def owner(path, leaf):
        # A factored moment may have the shape of a bias, but not its path.
        ends = [i for i, name in enumerate(names) if f"/{path}".endswith(f"/{name}")]
        ends += [i for i, name in enumerate(names) if not name]
        best = max(ends, key=lambda i: len(names[i]), default=None)
        is_moment = best is not None and ws[best].shape == leaf.shape
        return best if is_moment and is_float(leaf) else None

    owners = [owner(*leaf) for leaf in zip(paths, shapes, strict=True)]
    return StateLeaves(paths, shapes, treedef, owners, copies)


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def unfit(inner: Any, params: Any, leaves: StateLeaves) -> dict[int, str]:
    """Which leaves of a state must not be stored as codes, and why.

    Args:
      inner: the optimizer.
      params: the parameters, arrays or shapes.
      leaves: the leaves of its state.

    Returns:
      Reasons, by the indices of leaves.

    Raises:
      Exception: what the update of ``inner`` raises, if it cannot be traced.
    """
    updates, new, reader = _step(inner, params, leaves)
    decay = {i: c for i, value in enumerate(new) for k, c in value.linear if k == i}
    reasons = {i: "it starts from parameters" for i, x in enumerate(leaves.copies) if x}

    def refuse(i, reason):
        reasons.setdefault(i, reason)

    for taken, together in reader.mixed:
        for i in together:
            others = [leaves.paths[k] for k in sorted(together - {i})]
            refuse(i, f"a step takes {taken} it and {' and '.join(others)}")
    used = set().union(*(value.parts for value in updates))
    while more := {k for j in used if j >= 0 for k in new[j].parts} - used:
        used |= more
    divisors = {leaves.owner[k]: k for k in reader.rooted if k >= 0}
    for i, value in enumerate(new):
        owner = leaves.owner[i]
        if PARAMS in value.parts and GRADS not in value.parts:
            refuse(i, "a step makes it of parameters without the gradient")
        if decay.get(i) == 1 and i in value.signed:
            refuse(i, "it is a sum that never decays")
        if i in value.multiple and i not in decay:
            refuse(i, "a step only multiplies it, and so its errors")
        if i not in used:
            refuse(i, "no update depends on it, so others read it")
        if FACTORS in value.parts:
            refuse(i, "it is made of the factors of a matrix")
        # Where gradients cease, the errors of a momentum outlive the moment below it.
        k = i if owner is None else divisors.get(owner, i)
        is_divided = i not in reader.rooted and k not in value.parts
        if is_divided and decay.get(i, 0) ** 2 > decay.get(k, 1):
            refuse(i, f"it decays more slowly than the root of {leaves.paths[k]}")
            refuse(k, f"its root decays faster than {leaves.paths[i]}")
    for i in used:
        # The contribution of one element to a number cannot be taken back.
        is_number = i >= 0 and leaves.owner[i] is None
        if is_number and any(k >= 0 for k in new[i].summed - {i}):
            for k in range(len(new)):
                refuse(k, f"a step puts sums of moments into {leaves.paths[i]}")
    return reasons


# --- reading a step -------------------------------------------------------------------


def _step(
    inner: Any, params: Any, leaves: StateLeaves
) -> tuple[list[Value], list[Value], Reader]:
    """The updates of a step, its new leaves of the state, and what was found."""
    params = jax.eval_shape(lambda params: params, params)
    grads = jax.eval_shape(dequantize_params, params)
    state = leaves.treedef.unflatten(leaves.shapes)

    def step(grads, params, state, **extra):
        return inner.update(grads, state, params, **extra)

    def line_search(grads, params, state):
        def value_fn(params, obj_fn=None):
            del obj_fn
            return optax.tree.vdot(grads, optax.tree.cast_like(params, grads))

        value = jnp.float32(0) + optax.tree.sum(grads)
        extra = {"value": value, "grad": grads, "value_fn": value_fn}
        return step(grads, params, state, **extra, obj_fn=value_fn)

    closed, out = _first_traced((step, line_search), grads, params, state)
    given = [Value(frozenset({GRADS})) for _ in jax.tree.leaves(grads)]
    given += [Value(frozenset({PARAMS})) for _ in jax.tree.leaves(params)]
    for i, leaf in enumerate(leaves.shapes):
        part, linear = frozenset({i}), frozenset({(i, 1.0)})
        is_number = leaf.ndim == 0  # a count or a rate
        given.append(Value(part, linear=linear, multiple=part, positive=is_number))
    reader = Reader(i for i, x in enumerate(leaves.owner) if x is not None)
    values = reader.read(closed.jaxpr, closed.consts, given)
    updates = len(jax.tree.leaves(out[0]))
    return values[:updates], values[updates:], reader


def _first_traced(steps: Sequence[Callable], *args: Any) -> tuple[Any, Any]:
    """The jaxpr of the first of some functions that takes arguments, and its shapes."""
    errors = []
    for step in steps:
        try:
            return jax.make_jaxpr(step, return_shape=True)(*args)
        except (TypeError, ValueError) as error:
            errors.append(error)
    raise errors[0]
