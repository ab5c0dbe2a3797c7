"""Reads from a traced program what its outputs depend on.

Nothing is computed: the jaxpr is read once, operation by operation.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from madax._core.names import Tree

# Operations in which each element of the result depends on one element of each operand
# of that shape. Any other operation counts as mixing elements.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh div eq erf erf_inv exp exp2 expm1 floor ge
    gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not
    or pow real reduce_precision rem round rsqrt select_n sharding_constraint sign sin
    sinh sqrt square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)

T = TypeVar("T")
# The dependences of a value: input index to whether it is element by element.
Dependence = dict[int, bool]


class JaxprReader(abc.ABC, Generic[T]):
    """Reads jaxprs and nested jaxprs. Subclasses define what is known of a value."""

    @abc.abstractmethod
    def constant(self, x: jax.typing.ArrayLike) -> T:
        """Returns what is known about a constant; none about NaN."""

    @abc.abstractmethod
    def operation(self, eqn: core.JaxprEqn, args: list[T]) -> list[T]:
        """Returns what is known about the results of an operation."""

    @abc.abstractmethod
    def one_of(self, values: Sequence[T], chosen_by: Sequence[T] = ()) -> T:
        """Returns what is known about one of several values."""

    def looped(self, values: list[T], goes_on: Callable[[], list[T]]) -> list[T]:
        """Returns what is known about values after a round of a loop."""
        del goes_on
        return values

    def read(self, jaxpr: core.Jaxpr | core.ClosedJaxpr, args: Sequence[T]) -> list[T]:
        """Returns what is known about the results of a jaxpr."""
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known = dict(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
        known |= dict(zip(jaxpr.invars, args, strict=True))

        def look(x: core.Var | core.Literal) -> T:
            return self.constant(x.val) if isinstance(x, core.Literal) else known[x]

        for eqn in jaxpr.eqns:
            out = self._results(eqn, [look(x) for x in eqn.invars])
            known |= dict(zip(eqn.outvars, out, strict=True))
        return [look(x) for x in jaxpr.outvars]

    def _results(self, eqn: core.JaxprEqn, args: list[T]) -> list[T]:
        name, params = eqn.primitive.name, eqn.params
        if name == "optimization_barrier":
            return args
        if name == "cond":
            each = [self.read(branch, args[1:]) for branch in params["branches"]]
            return [self.one_of(found, args[:1]) for found in zip(*each, strict=True)]
        if name == "while":
            n, m = params["cond_nconsts"], params["body_nconsts"]
            test, body = params["cond_jaxpr"], params["body_jaxpr"]
            return self._loop(
                lambda x: self.looped(
                    self.read(body, args[n : n + m] + x),
                    lambda: self.read(test, args[:n] + x),
                ),
                args[n + m :],
            )
        if name == "scan":
            body = params["jaxpr"]
            # Stacked values have one more axis outside. They come last: xs after
            # constants and carries, ys after carries.
            carries, first = (
                sum(len(shape_of(x)) == len(shape_of(y)) for x, y in pairs)
                for pairs in (
                    zip(eqn.outvars, body.jaxpr.outvars, strict=True),
                    zip(eqn.invars, body.jaxpr.invars, strict=True),
                )
            )
            consts, start = args[: first - carries], args[first - carries : first]
            start += [self.constant(np.nan)] * (len(eqn.outvars) - carries)
            return self._loop(
                lambda x: self.looped(
                    self.read(body, consts + x[:carries] + args[first:]), list
                ),
                start,
            )
        for inside in params.values():
            if isinstance(inside, core.Jaxpr | core.ClosedJaxpr) and len(
                getattr(inside, "jaxpr", inside).invars
            ) == len(args):
                return self.read(inside, args)
        return self.operation(eqn, args)

    def _loop(self, body: Callable[[list[T]], list[T]], values: list[T]) -> list[T]:
        """Returns what is known about values for any number of rounds of a loop."""
        while True:
            pairs = zip(values, body(values), strict=True)
            after = [self.one_of(pair) for pair in pairs]
            if after == values:
                return values
            values = after


def shape_of(x: core.Var | core.Literal) -> tuple[int, ...]:
    """The shape of a value in a jaxpr."""
    return getattr(x.aval, "shape", ())


class _Dependences(JaxprReader[Dependence]):
    """Reads which inputs a value depends on."""

    def constant(self, x: jax.typing.ArrayLike) -> Dependence:
        return {}

    def operation(self, eqn: core.JaxprEqn, args: list[Dependence]) -> list[Dependence]:
        is_elementwise = eqn.primitive.name in _ELEMENTWISE
        return [
            _union(
                found
                if is_elementwise and shape_of(x) == shape_of(out)
                else _mixed(found)
                for found, x in zip(args, eqn.invars, strict=True)
            )
            for out in eqn.outvars
        ]

    def one_of(
        self, values: Sequence[Dependence], chosen_by: Sequence[Dependence] = ()
    ) -> Dependence:
        return _union([*map(_mixed, chosen_by), *values])

    def looped(
        self, values: list[Dependence], goes_on: Callable[[], list[Dependence]]
    ) -> list[Dependence]:
        # A round of a scan sees some elements of what it is given.
        return [_mixed(self.one_of([value], goes_on())) for value in values]


def _mixed(found: Dependence) -> Dependence:
    return dict.fromkeys(found, False)


def _union(parts: Iterable[Dependence]) -> Dependence:
    total: Dependence = {}
    for part in parts:
        for i, elementwise in part.items():
            total[i] = total.get(i, True) and elementwise
    return total


def dependences(fn: Callable[..., Tree], *args: Tree) -> list[Dependence]:
    """Returns, for each leaf of ``fn(*args)``, the leaves of ``args`` it depends on.

    A dict has the flatten-order indices of these leaves, and whether each element
    depends only on the same element of the leaf.
    """
    closed = jax.make_jaxpr(fn)(*args)
    inputs = [{i: True} for i in range(len(closed.jaxpr.invars))]
    return _Dependences().read(closed, inputs)


class Shapes(NamedTuple):
    """The structure and leaves of a tree of shapes, hashable, as a key for traces.

    It has no shardings, which may not be hashable, but the dtype of JAX's floats, on
    which traces depend.
    """

    treedef: jax.tree_util.PyTreeDef
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    float_dtype: np.dtype

    def tree(self) -> Tree:
        return self.treedef.unflatten(self.leaves)


def shapes_of(tree: Tree) -> Shapes:
    """The shapes of a tree of arrays, numbers or shapes."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda x: x, tree))
    kinds = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return Shapes(treedef, kinds, jnp.result_type(float))


def depends_on(
    fn: Callable[[Tree, Tree], Tree], mapped: Tree, fixed: Tree
) -> list[bool]:
    """Returns which leaves of ``fn(mapped, fixed)`` depend on ``mapped``."""
    inputs = range(len(jax.tree.leaves(mapped)))
    return [any(i in inputs for i in x) for x in dependences(fn, mapped, fixed)]
