"""Finds what an optimizer does with each leaf of its state, by tracing a step.

The noise of codes is harmless where values are averaged, but ruins a step that takes
the difference of two moments. Nothing is run: the jaxpr of a step is read. A few
primitives have rules. Of the results of others it is only known that they depend on all
arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from madax._core.checks import is_float
from madax._core.names import Tree, flatten_named
from madax._core.tracing import JaxprReader, depends_on, shape_of
from madax.codes._array import is_quantized
from madax.codes._quantize import dequantize_params

# Dependences besides the indices of leaves, which are not negative: gradients,
# parameters, and the factors of matrices.
GRADS, PARAMS, FACTORS = -1, -2, -3
_KEEP = {"broadcast_in_dim", "convert_element_type", "copy", "copy_p"}
_KEEP |= {"reduce_precision", "reshape", "sharding_constraint", "squeeze", "transpose"}
_ROOTS = {"cbrt", "pow", "rsqrt", "sqrt"}
_POSITIVE = {"abs", "exp", "exp2", "logistic", "square"}
_POSITIVE_IF_ALL_ARE = {"add", "div", "min", "mul", *_ROOTS}
_FACTORISATIONS = {"cholesky", "eig", "eigh", "geqrf", "lu", "schur", "svd"}
_SUMS = {"conv_general_dilated", "cumsum", "dot_general", "reduce_sum"}
Leaves = frozenset[int]


class StateLeaves(NamedTuple):
    """The leaves of the state of an optimizer, by their index in flatten order.

    Attributes:
      parameters: the path of the parameter at the end of a leaf's path, or None.
      owners: the path of the parameter of which a leaf is a moment, that is, has the
        shape, too, and is floating. None for other leaves.
      copies: whether the initial value of a leaf depends on parameters, such as a copy.
    """

    paths: list[str]
    shapes: list[jax.ShapeDtypeStruct]
    treedef: jax.tree_util.PyTreeDef
    parameters: list[str | None]
    owners: list[str | None]
    copies: list[bool]


def state_leaves(inner: optax.GradientTransformation, params: Tree) -> StateLeaves:
    """Returns the leaves of the state of ``inner`` for ``params``, arrays or shapes."""
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


def reasons_for_floats(
    inner: optax.GradientTransformationExtraArgs, params: Tree, leaves: StateLeaves
) -> dict[int, str]:
    """Returns why leaves of a state must not be stored as codes, by index.

    Raises:
      Exception: the error of the update of ``inner``, if it cannot be traced.
    """
    reader, values = _read_step(inner, params, leaves)
    updates, new = values[: -len(leaves.paths)], values[-len(leaves.paths) :]
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
            refuse(i, "a step computes it from parameters alone")
        if decay.get(i) == 1 and i in value.signed:
            refuse(i, "it is a sum that never decays")
        if i in value.multiple and i not in decay:
            refuse(i, "a step only multiplies it, and so its errors")
        if i not in used:
            refuse(i, "no update depends on it, so it is read outside the optimizer")
        if FACTORS in value.parts:
            refuse(i, "it comes from a matrix factorisation")
        # Without gradients, errors of a momentum outlive the moment that divides it.
        k = i if owner is None else divisors.get(owner, i)
        is_divided = i not in reader.rooted and k not in value.parts
        if is_divided and decay.get(i, 0) ** 2 > decay.get(k, 1):
            refuse(i, f"it decays more slowly than the root of {leaves.paths[k]}")
            refuse(k, f"its root decays faster than {leaves.paths[i]}")
    for i in used:
        # The contribution of a skipped element to a sum cannot be taken back.
        is_number = i >= 0 and leaves.owners[i] is None
        if is_number and any(k >= 0 for k in new[i].summed - {i}):
            for k in range(len(new)):
                refuse(k, f"a step adds sums of moments to {leaves.paths[i]}")
    return reasons


def _read_step(
    inner: optax.GradientTransformationExtraArgs, params: Tree, leaves: StateLeaves
) -> tuple[StepReader, list[Value]]:
    """Returns the reader of a step, and its values of (updates, new state)."""
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

    try:
        closed = jax.make_jaxpr(step)(grads, params, state)
    except (TypeError, ValueError) as error:
        try:
            closed = jax.make_jaxpr(line_search)(grads, params, state)
        except (TypeError, ValueError):
            raise error from None
    given = [Value(frozenset({GRADS})) for _ in jax.tree.leaves(grads)]
    given += [Value(frozenset({PARAMS})) for _ in jax.tree.leaves(params)]
    for i, leaf in enumerate(leaves.shapes):
        part, linear = frozenset({i}), frozenset({(i, 1.0)})
        is_number = leaf.ndim == 0  # a count or a rate
        given.append(Value(part, linear=linear, multiple=part, positive=is_number))
    reader = StepReader(i for i, x in enumerate(leaves.owners) if x is not None)
    return reader, reader.read(closed, given)


# --- reading a step -------------------------------------------------------------------


class Value(NamedTuple):
    """What the reader knows about a value in a step."""

    # Its dependences: indices of leaves, GRADS, PARAMS and FACTORS.
    parts: Leaves = frozenset()
    # The leaves that it depends on through a sum over elements, as a norm does.
    summed: Leaves = frozenset()
    # (leaf, c) if it is c times the leaf plus a term independent of the leaf.
    linear: frozenset[tuple[int, float]] = frozenset()
    # The leaves to which a term was added that may be negative.
    signed: Leaves = frozenset()
    multiple: Leaves = frozenset()  # the leaves that are its factors
    positive: bool = False  # whether it has no negative values
    constant: float | None = None  # its value, if that is the same in every step


class StepReader(JaxprReader[Value]):
    """Reads a step, and collects its operations on the moments of parameters."""

    def __init__(self, moments: Iterable[int]) -> None:
        self.moments = frozenset(moments)
        # ("the difference of", leaves), and likewise for other operations.
        self.mixed: list[tuple[str, Leaves]] = []
        # The leaves of which the step takes a root, element by element.
        self.rooted: Leaves = frozenset()

    def constant(self, x: jax.typing.ArrayLike) -> Value:
        if not jnp.issubdtype(jnp.result_type(x), jnp.number):
            return Value()
        if isinstance(x, jax.core.Tracer):  # a rate, if it is a number
            return Value(positive=np.ndim(x) == 0)
        values = np.ravel(x)
        is_one = values.size and np.all(values == values[0])
        constant = float(values[0]) if is_one else None
        return Value(positive=bool(np.all(values >= 0)), constant=constant)

    def one_of(self, values: Sequence[Value], chosen_by: Sequence[Value] = ()) -> Value:
        out = _together(values)
        # A choice does not make a copy of parameters a copy of gradients, too.
        by = _union(x.parts for x in chosen_by) - {GRADS, PARAMS}
        constants = {x.constant for x in values}
        return out._replace(
            parts=out.parts | by,
            linear=frozenset.intersection(*(x.linear for x in values)),
            multiple=frozenset.intersection(*(x.multiple for x in values)),
            positive=all(x.positive for x in values),
            constant=constants.pop() if len(constants) == 1 else None,
        )

    def operation(self, eqn: core.JaxprEqn, args: list[Value]) -> list[Value]:
        return [self._result(eqn, eqn.primitive.name, args)] * len(eqn.outvars)

    def _result(self, eqn: core.JaxprEqn, name: str, args: list[Value]) -> Value:
        out = _together(args)
        if name in _KEEP:
            return args[0]
        if name in _FACTORISATIONS:
            return out._replace(parts=out.parts | {FACTORS})
        if name in _SUMS:
            return out._replace(summed=out.summed | out.parts)
        if name == "select_n":
            return self.one_of(args[1:], args[:1])
        if name in ("max", "min", "sub"):
            taken = "the difference of" if name == "sub" else f"the {name}imum of"
            first, second = (x.parts & self.moments for x in args)
            if first and second and first != second:
                self.mixed.append((taken, first | second))
        if name in _ROOTS:
            self.rooted |= args[0].parts - args[0].summed
        if name == "neg":
            out = _scaled(args[0], -1.0)
        elif name in ("add", "add_any", "sub"):
            out = _sum(args[0], _scaled(args[1], -1.0) if name == "sub" else args[1])
        elif name in ("mul", "div"):
            a, b = args if args[0].constant is None else args[::-1]
            out = out._replace(multiple=a.multiple | b.multiple)
            if b.constant and (name == "mul" or b is args[1]):
                c = b.constant if name == "mul" else 1 / b.constant
                out = _scaled(a, c)
        elif name in ("max", "min", "clamp"):
            # A clip of a sum or a product is still a sum or a product.
            free = [x for x in args if x.parts]
            if len(free) == 1:
                out = free[0]
        return out._replace(positive=_is_positive(eqn, name, args))


def _scaled(x: Value, c: float) -> Value:
    constant = None if x.constant is None else c * x.constant
    linear = frozenset((leaf, c * factor) for leaf, factor in x.linear)
    positive = x.positive if c > 0 else x.constant is not None and x.constant <= 0
    return x._replace(linear=linear, positive=positive, constant=constant)


def _sum(a: Value, b: Value) -> Value:
    first, second, linear = dict(a.linear), dict(b.linear), {}
    for leaf in first.keys() | second.keys():
        known = leaf in first or leaf not in a.parts
        if known and (leaf in second or leaf not in b.parts):
            linear[leaf] = first.get(leaf, 0.0) + second.get(leaf, 0.0)
    constants = [x.constant for x in (a, b) if x.constant is not None]
    signed = a.signed | b.signed
    signed |= frozenset() if b.positive else a.parts
    signed |= frozenset() if a.positive else b.parts
    return _together((a, b))._replace(
        linear=frozenset(linear.items()),
        signed=signed,
        constant=sum(constants) if len(constants) == 2 else None,
    )


def _is_positive(eqn: core.JaxprEqn, name: str, args: list[Value]) -> bool:
    if name in _POSITIVE:
        return True
    if name == "integer_pow":
        return eqn.params["y"] % 2 == 0 or args[0].positive
    if name == "mul" and eqn.invars[0] is eqn.invars[1]:
        return True
    if name in ("max", "clamp"):
        return any(x.positive for x in args[:2])
    # A difference of two scalars is 1 minus a decay.
    is_rate = name == "sub" and not shape_of(eqn.outvars[0])
    return is_rate or (name in _POSITIVE_IF_ALL_ARE and all(x.positive for x in args))


def _together(values: Sequence[Value]) -> Value:
    """Returns what is known about any function of several values."""
    return Value(
        _union(x.parts for x in values),
        _union(x.summed for x in values),
        signed=_union(x.signed for x in values),
    )


def _union(sets: Iterable[Leaves]) -> Leaves:
    return frozenset().union(*sets)
