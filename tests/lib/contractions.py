"""Which axes of each weight a model sums over, by the program that JAX traces of it."""

import itertools
import math

import jax
from jax.extend.core import Literal

from madax._core.names import flatten_named

# What leaves the axes of an array where they are.
_SAME = {"convert_element_type", "copy", "rev", "sharding_constraint", "slice"}


def contractions(function, params):
    """For each path of ``params``: what products do with that leaf.

    ``"0>12"`` is a product that sums over axis 0 and keeps the axes 1 and 2, as a
    convolution does, too; ``"depthwise"`` is a convolution of each channel for itself,
    ``"lookup"`` takes rows of a table. Each is listed once, in alphabetical order; axes
    that count matrices on both sides of a product stand in neither part.
    """
    paths, leaves, treedef = flatten_named(params)
    jaxpr = jax.make_jaxpr(lambda *x: function(treedef.unflatten(x)))(*leaves).jaxpr
    used = [set() for _ in leaves]
    tracked = {
        var: (i, tuple((axis,) for axis in range(len(var.aval.shape))))
        for i, var in enumerate(jaxpr.invars)
    }
    _walk(jaxpr, tracked, used)
    return {path: sorted(found) for path, found in zip(paths, used, strict=True)}


def _walk(jaxpr, tracked, used):
    for eqn in jaxpr.eqns:
        known = [None if isinstance(x, Literal) else tracked.get(x) for x in eqn.invars]
        if not any(known):
            continue
        inner = [eqn.params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr")]
        inner = next((getattr(x, "jaxpr", x) for x in inner if x is not None), None)
        if inner is not None and len(inner.invars) == len(eqn.invars):
            here = {v: k for v, k in zip(inner.invars, known, strict=True) if k}
            _walk(inner, here, used)
            outs = [here.get(x) for x in inner.outvars]
        else:
            outs = [_through(eqn, known, used)]
        for var, out in zip(eqn.outvars, outs, strict=False):
            if out:
                tracked[var] = out


def _through(eqn, known, used):
    """The leaf axes of the result of an equation, if it is still the leaf."""
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "ragged_dot", "ragged_dot_general"):
        for side, leaf in enumerate(known[:2]):
            if leaf:
                _record(leaf, *_summed(name, params, side), used)
        return None
    if name == "conv_general_dilated" and known[1]:
        out, into, *window = params["dimension_numbers"].rhs_spec
        if params["feature_group_count"] == eqn.invars[1].aval.shape[out] > 1:
            used[known[1][0]].add("depthwise")
        else:
            _record(known[1], (into, *window), (), used)
        return None
    first = next(filter(None, known))
    if name == "gather":
        used[first[0]].add("lookup")
        return None
    i, axes = first
    if name in _SAME:
        return first
    if name == "transpose":
        return i, tuple(axes[j] for j in params["permutation"])
    if name == "squeeze":
        return i, tuple(x for j, x in enumerate(axes) if j not in params["dimensions"])
    if name == "reshape":
        return _reshaped(i, axes, eqn.invars[0].aval.shape, params["new_sizes"])
    return None


def _summed(name, params, side):
    """The axes of an operand that a product sums over, and those that count."""
    if name == "ragged_dot":
        return (1,), (0,)
    numbers = params.get("dimension_numbers") or params["ragged_dot_dimension_numbers"]
    counted = tuple(getattr(numbers, "rhs_group_dimensions", ())) if side else ()
    summed, batch = getattr(numbers, "dot_dimension_numbers", numbers)
    return tuple(summed[side]), (*batch[side], *counted)


def _record(leaf, summed, counted, used):
    i, axes = leaf
    parts = [[], []]
    for j, own in enumerate(axes):
        if j not in counted:
            parts[j not in summed] += own
    used[i].add(">".join("".join(map(str, sorted(part))) for part in parts))


def _reshaped(i, axes, old, new):
    """Merges neighbouring axes; None where axes are split."""
    merged, at = [], 0
    for n in new:
        count = next(
            (
                c
                for c in itertools.count(at)
                if math.prod(old[at:c]) >= n or c > len(old)
            ),
            at,
        )
        if math.prod(old[at:count]) != n or count > len(old):
            return None
        merged.append(tuple(itertools.chain(*axes[at:count])))
        at = count
    return i, tuple(merged)
