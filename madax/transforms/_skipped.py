"""Which elements of a gradient an optimizer skipped, as its state tells.

Public as :func:`madax.diagnostics.count_skipped`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.names import Tree, flatten_named
from madax._core.numerics import decay_rate
from madax.codes._leaves import flatten, nodes_of, widen
from madax.formats._moment_format import MomentFormat
from madax.formats._second_moment_codec import SecondMomentCodec, is_fast
from madax.transforms._orthogonal import ScaleByOrthogonalMomentumState
from madax.transforms._second_moment import Moments, ScaleBySecondMomentState


def count_skipped(
    grads: Tree, state: Tree = None, *, b2: jax.typing.ArrayLike = 0.999
) -> dict[str, jax.Array]:
    r"""How many elements of the gradients madam or muon_madam skips, leaf by leaf.

    ``scale_by_second_moment`` skips an element that is not finite, or whose square
    overflows: neither its moments nor its weight change in that step. With a
    ``moment_format`` it also skips one whose second moment is beyond the octaves,
    unless ``b2`` is below 0.75.
    ``scale_by_orthogonal_momentum`` keeps an element that is not finite out of its
    momentum. The state tells which of the two transforms a leaf has, and which elements
    were beyond the octaves.

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
    found = []
    for node in nodes_of(state, kinds):
        tree = node.nu if isinstance(node, second) else node.mu
        names, moments, _ = flatten_named(tree)
        found += [(*leaf, node) for leaf in zip(names, moments, strict=True)]
    shapes = {path: np.shape(moment) for path, moment, _ in found}
    if state is not None and shapes != {k: np.shape(g) for k, g in by_path.items()}:
        raise ValueError(
            "state must hold a moment of madam or muon_madam for each leaf of grads, "
            f"got moments of the shapes {shapes}; pass the state that update returned."
        )
    for path, moment, node in found:
        if isinstance(node, ScaleByOrthogonalMomentumState):
            skipped[path] = ~jnp.isfinite(by_path[path])
        elif node.window is not None:
            ((format, _),) = node.window.items()
            bits = int(format.removesuffix(")").partition("=")[2])
            # The max code stands for all values beyond the octaves.
            beyond = moment == SecondMomentCodec(MomentFormat(bits)).max_nu
            skipped[path] |= beyond & ~is_fast(decay_rate(b2))
    return {path: jnp.sum(x).astype(jnp.int32) for path, x in skipped.items()}
