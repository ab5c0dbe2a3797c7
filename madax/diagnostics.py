"""Diagnostics of updates and weights: small pure functions that ``jax.jit`` compiles.

Each returns a dict of scalars or small vectors, by the path of a leaf
(``"Dense_0/kernel"``), ready for a logger. Codes count by their values.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from madax._core.checks import leaf_name, warn_of_leaves
from madax._core.leaf_kinds import read_leaves
from madax._core.names import Tree, flatten_named
from madax._core.numerics import decay_rate
from madax._core.shards import in_auto_axes
from madax._core.sums import fraction
from madax._core.vectors import shape_per_leaf
from madax.codes._array import is_quantized
from madax.codes._leaves import (
    flatten,
    flatten_like,
    max_weight,
    nodes_of,
    per_leaf,
    widen,
)
from madax.codes._quantize import decoded
from madax.codes._scales import split_max
from madax.formats._moment_format import MomentFormat
from madax.formats._second_moment_codec import SecondMomentCodec, is_fast
from madax.optimizers._muon import MuonState
from madax.papers._grid import QuantizeToGridState
from madax.transforms._factored import FactoredMoments
from madax.transforms._geometry import Geometry
from madax.transforms._matrices import Matrices, check_matrices, in_order, read_axes
from madax.transforms._matrix_direction import ScaleByOrthogonalMomentumState
from madax.transforms._second_moment import Moments, ScaleBySecondMomentState

_STUCK = (
    "half of the weights or more are at their bound and may be unable to grow; pass a "
    "larger p_scale to the optimizer (inf for no bound), or, for codes, to "
    "quantize_params."
)

__all__ = [
    "code_occupancy",
    "count_skipped",
    "fraction_at_bound",
    "fraction_sign_changed",
    "fraction_zero",
    "matrices",
    "relative_update_size",
]


class _MatrixTable(dict[str, tuple[int, int, int] | None]):
    """For each path None, or (matrices in the stack, rows, columns)."""

    def __init__(self, found: dict, facts: Sequence[tuple[str, str, str]]):
        super().__init__(found)
        self._facts = facts

    def __repr__(self) -> str:
        rows = [("leaf", "shape", "storage", "read as")]
        cells = zip(self.items(), self._facts, strict=True)
        for (path, found), (shape, stored, kind) in cells:
            read_as = kind if found is None else "{} of {} x {}".format(*found)
            rows.append((path, shape, stored, read_as))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def matrices(params: Tree, matrices: Matrices | None = None) -> _MatrixTable:
    """Returns what :func:`madax.muon` and :func:`madax.muon_madam` read leaves as.

    Args:
      params: tree of floating-point or quantised arrays, or of their shapes.
      matrices: the optimizer's ``matrices``.

    Returns:
      For each path None, for a leaf that is not a matrix, or (matrices in the stack,
      rows, columns), in the order of the leaf's own axes. The dict prints as a table,
      which says what the other leaves are: a vector, a table, a last layer (``head``),
      a router, a depthwise ``filter``, or ``other``.

    Raises:
      ValueError: if ``matrices`` gives axes that a leaf does not have.
      TypeError: if a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> query = {"kernel": jnp.ones((64, 4, 16)), "bias": jnp.ones((4, 16))}
      >>> madax.diagnostics.matrices({"query": query})
      leaf          shape        storage  read as
      query/bias    (4, 16)      float32  vector
      query/kernel  (64, 4, 16)  float32  1 of 64 x 64
    """
    check_matrices(matrices)
    paths, leaves, _ = flatten(params)
    found, facts = {}, []
    readings = read_leaves(paths, map(np.shape, leaves))
    every = read_axes(paths, leaves, matrices)
    for path, leaf, axes, reading in zip(paths, leaves, every, readings, strict=True):
        shape = np.shape(leaf)
        found[path] = None
        if axes is not None:
            groups = in_order(shape, axes)
            found[path] = tuple(math.prod(shape[i] for i in x) for x in groups)
        stored = leaf.format if is_quantized(leaf) else jnp.result_type(leaf)
        kind = "other" if reading.kind in ("matrix", "unknown") else reading.kind
        facts.append((str(shape), str(stored), kind))
    return _MatrixTable(found, facts)


def relative_update_size(params: Tree, updates: Tree) -> dict[str, jax.Array]:
    r"""Returns the norm of an update over the norm of the weights, leaf by leaf.

    .. math:: \|u\| / \|w\|

    Args:
      params: tree of floating-point or quantised arrays, before the update.
      updates: what ``tx.update`` returned; same structure and shapes.

    Returns:
      A scalar for each leaf; 0 for a zero update, inf for a leaf that leaves zero.

    Raises:
      ValueError: if the trees do not match.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> params, updates = {"w": jnp.full(4, 2.0)}, {"w": jnp.full(4, 0.02)}
      >>> sizes = madax.diagnostics.relative_update_size(params, updates)
      >>> print(f"{sizes['w']:.3f}")
      0.010
    """

    # An update of codes is a number of codes; its size is how far the values move.
    def in_values(w, u):
        if not (is_quantized(w) and is_quantized(u)):
            return u
        # In the dtype of the values neighbouring codes may be the same.
        new = decoded(optax.apply_updates(w, u))
        return new - decoded(w)

    structure = partial(jax.tree.structure, is_leaf=is_quantized)
    if structure(params) == structure(updates):
        updates = jax.tree.map(in_values, params, updates, is_leaf=is_quantized)
    return _by_path(lambda w, u: _relative_norm(u, w), params, updates)


def fraction_at_bound(params: Tree, state: Tree = None) -> dict[str, jax.Array]:
    r"""Returns the fraction of weights at their bound, leaf by leaf.

    A float weight counts as at the bound when it is within a fraction of :math:`2^{-6}`
    of the bound, which any dtype can tell; a quantised weight when its code is the max.
    The bound is the one that ``clip_log_weights`` used in the last step: for a leaf
    without a bound, the max of the dtype, or of a grid if that is lower.

    Outside ``jax.jit`` a warning names leaves with half of their weights or more at the
    bound, because they may be unable to grow. In a matrix a quarter is usual.

    Args:
      params: tree of floating-point or quantised arrays.
      state: optimizer state that holds the bounds of ``params``, as the state of
        :func:`madam` does, or of a chain with ``clip_log_weights``; None, or the state
        of :func:`muon`, if only codes are bounded.

    Returns:
      A scalar in [0, 1] for each leaf.

    Raises:
      ValueError: if ``state`` does not hold the bounds of these ``params``.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> params = {"w": jnp.array([[1.0, -1.0, 1.0]])}
      >>> state = madax.madam().init(params)
      >>> after = {"w": jnp.array([[3.0, 1.0, 1.0]])}
      >>> print(f"{madax.diagnostics.fraction_at_bound(after, state)['w']:.2f}")
      0.33
    """
    found = [g.bound for g in nodes_of(state, Geometry) if g.bound is not None]
    paths, leaves, _ = flatten(params)
    floats = sum(not is_quantized(leaf) for leaf in leaves)
    if state is None or (not found and nodes_of(state, MuonState)):
        found = [jnp.full(shape_per_leaf(floats), jnp.inf)]
    if len(found) != 1 or found[0].shape != shape_per_leaf(floats):
        raise ValueError(
            f"state must hold the bounds of the {floats} leaves of floats in params, "
            f"got bounds of shapes {[bound.shape for bound in found]}; pass the state "
            "of madam, with optax.masked or optax.partition its part of params, or "
            "None for an optimizer that bounds no floats."
        )
    found += [grid.scale for grid in nodes_of(state, QuantizeToGridState)]
    bounds = [per_leaf(bound, leaves) for bound in found]
    fractions = {
        path: fraction(_is_at_bound(w, own))
        for path, w, *own in zip(paths, leaves, *bounds, strict=True)
    }
    is_traced = any(isinstance(x, jax.core.Tracer) for x in fractions.values())
    known = {} if is_traced else jax.device_get(fractions)  # all at once
    stuck = [leaf_name("params", path) for path, x in known.items() if x >= 0.5]
    warn_of_leaves(stuck, _STUCK, stacklevel=2)
    return fractions


def fraction_zero(params: Tree) -> dict[str, jax.Array]:
    """Returns the fraction of weights that are exactly zero, leaf by leaf.

    Args:
      params: tree of floating-point or quantised arrays.

    Returns:
      A scalar in [0, 1] for each leaf.

    Raises:
      TypeError: if a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> print(madax.diagnostics.fraction_zero({"b": jnp.array([0.0, 1.0])}))
      {'b': Array(0.5, dtype=float32)}
    """
    return _by_path(lambda w: fraction(w == 0), params)


def fraction_sign_changed(params: Tree, previous: Tree) -> dict[str, jax.Array]:
    """Returns the fraction of weights whose sign differs from an earlier step.

    Args:
      params: tree of floating-point or quantised arrays.
      previous: the parameters at an earlier step; same structure and shapes.

    Returns:
      A scalar in [0, 1] for each leaf; leaving or reaching zero counts as a change.

    Raises:
      ValueError: if the trees do not match.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> now, then = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([-1.0, 2.0])}
      >>> print(madax.diagnostics.fraction_sign_changed(now, then))
      {'w': Array(0.5, dtype=float32)}
    """
    return _by_path(
        lambda w, before: fraction(jnp.sign(w) != jnp.sign(before)), params, previous
    )


def code_occupancy(params: Tree) -> dict[str, jax.Array]:
    """Returns the number of weights with each code, for each quantised leaf.

    The entropy of the counts is the number of bits per weight that a leaf needs.

    Args:
      params: tree of floating-point or quantised arrays.

    Returns:
      The counts of the codes from -levels to levels, int32, shape (2 * levels + 1,),
      for each quantised leaf; nothing for float leaves.

    Raises:
      TypeError: if a leaf is neither real floating nor quantised.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> fmt = madax.UniformFormat(bits=3)
      >>> w = madax.quantize_params({"w": jnp.ones((4, 4))}, fmt, p_scale=1.0)
      >>> print(madax.diagnostics.code_occupancy(w)["w"])
      [ 0  0  0  0  0  0 16]
    """
    paths, leaves, _ = flatten(params)
    return {
        path: in_auto_axes(partial(_counts, w.format.levels), w.codes, PartitionSpec())
        for path, w in zip(paths, leaves, strict=True)
        if is_quantized(w)
    }


def _counts(levels: int, codes: jax.Array) -> jax.Array:
    """The counts of the codes from -levels to levels."""
    places = codes.astype(jnp.int32).ravel() + levels
    return jnp.bincount(places, length=2 * levels + 1).astype(jnp.int32)


def count_skipped(
    grads: Tree, state: Tree = None, *, b2: jax.typing.ArrayLike = 0.999
) -> dict[str, jax.Array]:
    r"""Returns how many gradient elements madax's optimizers skip, leaf by leaf.

    ``scale_by_second_moment`` skips an element that is not finite, or whose square
    overflows: neither its moments nor its weight change in that step. With a
    ``moment_format`` it also skips one whose second moment is beyond the octaves,
    unless ``b2`` is below 0.75. ``scale_by_orthogonal_momentum`` keeps an element that
    is not finite out of its momentum, or takes it as zero, and
    ``scale_by_factored_second_moment`` also takes one as zero whose square overflows.
    The state shows which of them a leaf has, and which elements were beyond octaves.

    Args:
      grads: tree of floating-point arrays, no wider than their moments: float64
        gradients of float32 weights are to be cast first, as the optimizer does.
      state: the state that ``update`` returned for these gradients; None for moments in
        floats on all leaves.
      b2: the decay rate of the optimizer's second moment.

    Returns:
      A count for each leaf, an int32 scalar.

    Raises:
      ValueError: if ``state`` does not hold the moments of these gradients.
      TypeError: if a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> grads = {"w": jnp.array([1.0, jnp.nan, -jnp.inf, 1e30])}
      >>> print(madax.diagnostics.count_skipped(grads)["w"])
      3
    """
    paths, leaves, _ = flatten(grads, "grads")
    by_path = dict(zip(paths, map(widen, leaves), strict=True))
    skipped = {path: ~jnp.isfinite(jnp.square(g)) for path, g in by_path.items()}
    second = ScaleBySecondMomentState, Moments
    kinds = (*second, ScaleByOrthogonalMomentumState)
    found, unnamed, expected = [], None, None
    nodes = nodes_of(state, (*kinds, FactoredMoments))
    for before, node in zip([None, *nodes], nodes, strict=False):
        if isinstance(node, FactoredMoments):
            continue
        tree = node.nu if isinstance(node, second) else node.mu
        # What a momentum is of may have been divided by second moments.
        divided = isinstance(before, FactoredMoments)
        squared = divided or isinstance(node, second)
        if tree is None:
            unnamed, expected = divided, len(before.pairs()) if divided else None
        names, moments, _ = flatten_named(tree)
        found += [(*x, node, squared) for x in zip(names, moments, strict=True)]
    shapes = {path: np.shape(moment) for path, moment, *_ in found}
    # Without a momentum, matrices are the leaves that the state does not name.
    others = by_path.keys() - shapes.keys()
    if unnamed is not None and expected in (None, len(others)):
        for path in others:
            shapes[path] = np.shape(by_path[path])
            if not unnamed:
                skipped[path] = ~jnp.isfinite(by_path[path])
    if state is not None and shapes != {k: np.shape(g) for k, g in by_path.items()}:
        raise ValueError(
            "state must hold a moment of an optimizer of madax for each leaf of grads, "
            f"got moments of the shapes {shapes}; pass the state that update returned."
        )
    for path, moment, node, squared in found:
        if not squared:
            skipped[path] = ~jnp.isfinite(by_path[path])
        elif isinstance(node, second) and node.window is not None:
            ((format, _),) = node.window.items()
            bits = int(format.removesuffix(")").partition("=")[2])
            # The max code stands for all values beyond the octaves.
            beyond = moment == SecondMomentCodec(MomentFormat(bits)).max_nu
            skipped[path] |= beyond & ~is_fast(decay_rate(b2))
    return {path: jnp.sum(x).astype(jnp.int32) for path, x in skipped.items()}


def _by_path(fn: Callable[..., jax.Array], params: Tree, *others: Tree) -> dict:
    """``{path: fn(leaf of params, leaf of another tree, ...)}``, float32 or wider."""
    paths, leaves, treedef = flatten(decoded(params))
    alike = [
        flatten_like(decoded(other), treedef, "params", paths, leaves)
        for other in others
    ]
    return {
        path: fn(*map(widen, same))
        for path, *same in zip(paths, leaves, *alike, strict=True)
    }


def _is_at_bound(w: Tree, bounds: Sequence[jax.Array]) -> jax.Array:
    if is_quantized(w):
        return jnp.abs(w.codes) == w.format.levels
    bound = reduce(jnp.minimum, bounds, max_weight(jnp.result_type(w)))
    return jnp.abs(widen(w)) >= (1 - 2**-6) * bound


def _relative_norm(u: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the norm of ``u`` over the norm of ``w``; 0/0 is 0."""
    (peak_u, u), (peak_w, w) = split_max(u), split_max(w)
    ratio = jnp.squeeze(peak_u / peak_w)
    zero = jnp.all(u == 0)
    return jnp.where(
        zero, 0, ratio * jnp.sqrt(jnp.sum(u * u)) / jnp.sqrt(jnp.sum(w * w))
    )
