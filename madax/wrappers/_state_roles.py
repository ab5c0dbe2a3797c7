"""What an optimizer does with each leaf of its state, found by tracing its step.

The noise of a code is harmless where values are averaged, and ruins a step that takes
the difference of two moments. Nothing is run: the jaxpr of a step is read, of shapes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.names import Tree, flatten_named
from madax._core.tracing import depends_on
from madax.codes._array import is_quantized
from madax.codes._quantize import dequantize_params
from madax.wrappers._step_reader import FACTORS, GRADS, PARAMS, StepReader, Value


class StateLeaves(NamedTuple):
    """The leaves of the state of an optimizer, by their index in flatten order.

    Attributes:
      paths: their names.
      shapes: their shapes and dtypes.
      treedef: the structure of the state.
      parameters: the end of a path that is the path of a parameter; None without one.
      owners: the path of the parameter that a leaf is a moment of: it also has the
        shape of the parameter, and is floating. None for other leaves.
      copies: whether a leaf starts as a function of parameters, such as a copy.
    """

    paths: list[str]
    shapes: list[jax.ShapeDtypeStruct]
    treedef: jax.tree_util.PyTreeDef
    parameters: list[str | None]
    owners: list[str | None]
    copies: list[bool]


def state_leaves(inner: optax.GradientTransformation, params: Tree) -> StateLeaves:
    """The leaves of the state that ``inner`` has for ``params``, arrays or shapes."""
    params = jax.eval_shape(lambda params: params, params)
    paths, shapes, treedef = flatten_named(jax.eval_shape(inner.init, params))
    copies = depends_on(lambda params, _: inner.init(params), params, ())
    names, ws, _ = flatten_named(params, is_leaf=is_quantized)
    shape_of = {name: w.shape for name, w in zip(names, ws, strict=True)}
    parameters, owners = [], []
    for path, leaf in zip(paths, shapes, strict=True):
        ends = [name for name in names if not name or f"/{path}".endswith(f"/{name}")]
        name = max(ends, key=len) if ends else None
        # A factored moment may have the shape of a bias, but not its path.
        is_moment = name is not None and shape_of[name] == leaf.shape and is_float(leaf)
        parameters.append(name)
        owners.append(name if is_moment else None)
    return StateLeaves(paths, shapes, treedef, parameters, owners, copies)


def is_float(leaf: jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def reasons_for_floats(
    inner: optax.GradientTransformationExtraArgs, params: Tree, leaves: StateLeaves
) -> dict[int, str]:
    """Why some leaves of a state must not be stored as codes, by their indices.

    Raises:
      Exception: what the update of ``inner`` raises, if it cannot be traced.
    """
    updates, new, reader = _read_step(inner, params, leaves)
    decay = {i: c for i, value in enumerate(new) for k, c in value.linear if k == i}
    reasons = {i: "it starts from parameters" for i, x in enumerate(leaves.copies) if x}

    def refuse(i: int, reason: str) -> None:
        reasons.setdefault(i, reason)

    for taken, together in reader.mixed:
        for i in together:
            others = [leaves.paths[k] for k in sorted(together - {i})]
            refuse(i, f"a step takes {taken} it and {' and '.join(others)}")
    used = set().union(*(value.parts for value in updates))
    while more := {k for j in used if j >= 0 for k in new[j].parts} - used:
        used |= more
    divisors = {leaves.owners[k]: k for k in reader.rooted if k >= 0}
    for i, value in enumerate(new):
        owner = leaves.owners[i]
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
        is_number = i >= 0 and leaves.owners[i] is None
        if is_number and any(k >= 0 for k in new[i].summed - {i}):
            for k in range(len(new)):
                refuse(k, f"a step puts sums of moments into {leaves.paths[i]}")
    return reasons


class _ReadStep(NamedTuple):
    """What is known of the updates of a step, and of its new leaves of the state."""

    updates: list[Value]
    new: list[Value]
    reader: StepReader


def _read_step(
    inner: optax.GradientTransformationExtraArgs, params: Tree, leaves: StateLeaves
) -> _ReadStep:
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

    trace = functools.partial(jax.make_jaxpr, return_shape=True)
    try:
        closed, out = trace(step)(grads, params, state)
    except (TypeError, ValueError) as error:
        try:
            closed, out = trace(line_search)(grads, params, state)
        except (TypeError, ValueError):
            raise error from None
    given = [Value(frozenset({GRADS})) for _ in jax.tree.leaves(grads)]
    given += [Value(frozenset({PARAMS})) for _ in jax.tree.leaves(params)]
    for i, leaf in enumerate(leaves.shapes):
        part, linear = frozenset({i}), frozenset({(i, 1.0)})
        is_number = leaf.ndim == 0  # a count or a rate
        given.append(Value(part, linear=linear, multiple=part, positive=is_number))
    reader = StepReader(i for i, x in enumerate(leaves.owners) if x is not None)
    values = reader.read(closed, given)
    updates = len(jax.tree.leaves(out[0]))
    return _ReadStep(values[:updates], values[updates:], reader)
