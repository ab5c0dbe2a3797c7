"""How each value of a step depends on the leaves of a state, read from its jaxpr.

A few primitives have rules. The results of all others depend on all their arguments,
and nothing more is known of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from madax._core.tracing import JaxprReader, shape_of

# Beside the indices of leaves, which are not negative: gradients, parameters, and the
# factors of matrices.
GRADS, PARAMS, FACTORS = -1, -2, -3
_KEEP = {"broadcast_in_dim", "convert_element_type", "copy", "copy_p"}
_KEEP |= {"reduce_precision", "reshape", "sharding_constraint", "squeeze", "transpose"}
_ROOTS = {"cbrt", "pow", "rsqrt", "sqrt"}
_POSITIVE = {"abs", "exp", "exp2", "logistic", "square"}
_POSITIVE_IF_ALL_ARE = {"add", "div", "min", "mul", *_ROOTS}
_FACTORISATIONS = {"cholesky", "eig", "eigh", "geqrf", "lu", "schur", "svd"}
_SUMS = {"conv_general_dilated", "cumsum", "dot_general", "reduce_sum"}


Leaves = frozenset[int]


class Value(NamedTuple):
    """What the reader knows of a value in a step.

    Attributes:
      parts: what it depends on: indices of leaves, ``GRADS``, ``PARAMS``
        and ``FACTORS``.
      summed: the leaves that it depends on by a sum over elements, as a norm does.
      linear: ``(leaf, c)`` if it is c times the leaf and something independent of it.
      signed: the leaves to which something was added that may be negative.
      multiple: the leaves that it is a product of.
      positive: whether it has no negative values.
      constant: its value, if it is the same number in every step.
    """

    parts: Leaves = frozenset()
    summed: Leaves = frozenset()
    linear: frozenset[tuple[int, float]] = frozenset()
    signed: Leaves = frozenset()
    multiple: Leaves = frozenset()
    positive: bool = False
    constant: float | None = None


class StepReader(JaxprReader[Value]):
    """Reads a step, and collects what it does with moments.

    Attributes:
      moments: the leaves of a state that belong to parameters.
      mixed: ``("the difference of", leaves)``, and likewise for other operations.
      rooted: the leaves of which a root is taken, element by element.
    """

    def __init__(self, moments: Iterable[int]) -> None:
        self.moments = frozenset(moments)
        self.mixed: list[tuple[str, Leaves]] = []
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
            # A bound leaves a sum or a product what it is.
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
    # A difference of two numbers is 1 minus a decay.
    is_rate = name == "sub" and not shape_of(eqn.outvars[0])
    return is_rate or (name in _POSITIVE_IF_ALL_ARE and all(x.positive for x in args))


def _together(values: Sequence[Value]) -> Value:
    """What is known of any function of several values."""
    return Value(
        _union(x.parts for x in values),
        _union(x.summed for x in values),
        signed=_union(x.signed for x in values),
    )


def _union(sets: Iterable[Leaves]) -> Leaves:
    return frozenset().union(*sets)
