"""What an output of a function depends on, read from its traced program.

Nothing is computed: the program is walked once, operation by operation.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

# Operations of which each output element depends on one element of every operand of
# that shape. Any other operation counts as one that mixes elements.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh div eq erf erf_inv exp exp2 expm1 floor ge
    gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not
    or pow real reduce_precision rem round rsqrt select_n sharding_constraint sign sin
    sinh sqrt square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)

# What a value depends on: for inputs by their place, whether element by element.
Dependence = dict[int, bool]


def dependences(fn: Callable[..., Any], *args: Any) -> list[Dependence]:
    """For each leaf of ``fn(*args)``, the leaves of ``args`` it depends on.

    Args:
      fn: a function of trees of arrays.
      args: its arguments, or their shapes.

    Returns:
      A dict for each leaf of the result: the places of the input leaves in flatten
      order, and whether each element depends on no more than the element of the same
      place in that input.
    """
    closed = jax.make_jaxpr(fn)(*args)
    inputs = [{i: True} for i in range(len(closed.jaxpr.invars))]
    return _outputs(closed.jaxpr, inputs)


def _outputs(jaxpr: Any, inputs: Sequence[Dependence]) -> list[Dependence]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Dependence:
        # A literal is no variable, and depends on nothing.
        return {} if hasattr(atom, "val") else known.get(atom, {})

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        for var, found in zip(eqn.outvars, _of(eqn, operands), strict=True):
            known[var] = found
    return [read(atom) for atom in jaxpr.outvars]


def _of(eqn: Any, operands: Sequence[Dependence]) -> list[Dependence]:
    """What the results of an operation depend on."""
    if eqn.primitive.name == "cond":
        index, *rest = operands
        branches = [_outputs(one.jaxpr, rest) for one in eqn.params["branches"]]
        return [
            _union([_mixed(index), *found]) for found in zip(*branches, strict=True)
        ]
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        inner = getattr(inner, "jaxpr", inner)
        loops = eqn.primitive.name in ("scan", "while")
        if inner is not None and not loops and len(inner.invars) == len(operands):
            return _outputs(inner, operands)
    if eqn.primitive.name == "optimization_barrier":
        return list(operands)
    elementwise = eqn.primitive.name in _ELEMENTWISE
    results = []
    for out in eqn.outvars:
        shapes = [np.shape(atom.aval) == np.shape(out.aval) for atom in eqn.invars]
        results.append(
            _union(
                found if elementwise and same else _mixed(found)
                for found, same in zip(operands, shapes, strict=True)
            )
        )
    return results


def _mixed(found: Dependence) -> Dependence:
    return dict.fromkeys(found, False)


def _union(parts: Iterable[Dependence]) -> Dependence:
    total: Dependence = {}
    for part in parts:
        for i, elementwise in part.items():
            total[i] = total.get(i, True) and elementwise
    return total


def depends_on(fn: Callable[[Any, Any], Any], mapped: Any, fixed: Any) -> list[bool]:
    """For each leaf of ``fn(mapped, fixed)``, whether it depends on ``mapped``.

    ``vmap`` knows: what does not is not batched. Nothing is run.
    """
    found: list[bool] = []

    @jax.custom_batching.custom_vmap
    def look(leaves):
        return leaves

    @look.def_vmap
    def _(axis_size, batched, leaves):
        del axis_size
        found.extend(batched[0])
        return leaves, batched[0]

    def run(mapped, fixed):
        return look(jax.tree.leaves(fn(mapped, fixed)))

    def two(x):
        return jax.ShapeDtypeStruct((2, *x.shape), x.dtype)

    mapped = jax.tree.map(two, mapped)
    if not jax.tree.leaves(mapped):
        return [False] * len(jax.eval_shape(run, mapped, fixed))
    out = jax.eval_shape(jax.vmap(run, in_axes=(0, None)), mapped, fixed)
    return found or [False] * len(out)
