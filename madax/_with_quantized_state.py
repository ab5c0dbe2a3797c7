"""Any optax optimizer with its moments as codes: decode, update, encode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._checks import check_instance, check_seed, check_state
from madax._leaves import entries, flatten_named, one_a_leaf
from madax._moments import MomentFormat
from madax._quantized_array import is_quantized
from madax._rounding import Rounding, check_rounding, leaf_keys
from madax._stacks import ENDS, LAYERS, depends_on
from madax._state_codes import (
    Codec,
    computed_again,
    decoded,
    encoded,
    followed,
    stack_windows,
    started,
)
from madax._with_quantized_params import check_inner

# Smaller leaves save little, and the noise of a few codes would hurt them.
_LEAST_SIZE = 4096


class WithQuantizedStateState(NamedTuple):
    """State of :func:`with_quantized_state`.

    Attributes:
      count: number of steps taken, int32 scalar.
      inner_state: state of the inner optimizer, with codes in the place of the
        leaves that are stored: uint8, or uint16 for more than 8 bits.
      window: ``{format of the codes: where they lie}``, a :class:`StateWindow`. The key
        is there so that a checkpoint of other codes does not fit.
    """

    count: jax.Array
    inner_state: Any
    window: Any


def with_quantized_state(
    inner: optax.GradientTransformation,
    moment_format: MomentFormat = MomentFormat(8),  # noqa: B008
    *,
    octaves: int = 32,
    where: Callable[[str, Any], bool] | None = None,
    rounding: Rounding = "stochastic",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the moments of any optimizer as codes of 8 to 16 bits.

    In every step the codes are decoded, the inner optimizer makes its update from the
    values and makes new values, and these are encoded. Adam then has two bytes of state
    per parameter instead of eight. On codes, by :func:`with_quantized_params`, a
    parameter takes three bytes in all; with error feedback, that is the inner one.

    - A leaf of the state that has a negative value is stored with a sign and 32
      octaves, any other without a sign and with 64. So nothing depends on the name of
      :math:`\nu`. The other bits are binary digits: two of them in 8 bits.
    - The octaves are placed below the largest value of the leaf in every step, so
      moments may grow or fall by any factor.
    - Adam divides each element by its own size, so small ones need their digits, too.
      Momentum that is used as a whole, as of SGD and Muon, has two digits more with
      ``octaves=8``: values are spaced evenly below a 64th of the largest.
    - In a leaf without negative values, a positive value stays positive: below the
      octaves, as from gradients of 1e-9 of the largest, it counts as the least code. So
      Adam never divides by a zero that was positive before.
    - The decay of such a leaf is exact: the factor that all its elements have in common
      goes into a scale. Then :math:`\nu` has a relative variance of about
      :math:`0.36 / 2^{\text{bits} - 6}`, as in :class:`MomentFormat`, which makes
      :math:`1/\sqrt\nu` too large by 3.4 % on average for 8 bits.
    - A value that is not finite is not stored; what was there before stays.

    Without ``where``, those leaves are stored that are floating, have 4096 elements or
    more and the shape of a parameter, and do not start as a copy of parameters: a slow
    or an averaged weight wants more digits. Counts and factored moments stay what they
    are. A step makes the floats of a leaf when that leaf is updated; ``init`` makes
    those of all leaves at once, unless it is compiled.

    A step calls the inner optimizer twice: where codes lie depends on all new values of
    a leaf, and to keep those for the second time would take the memory that codes save.
    Compilers drop what the first call computes in vain, but not a callback.

    :func:`madam` needs no such wrapper: it has a ``moment_format`` of its own. An
    accumulator of gradients is a moment, too: ``optax.MultiSteps`` goes around this.

    Args:
      inner: any optax optimizer.
      moment_format: the format of the codes.
      octaves: how many a leaf with negative values has: 2, 4, 8, 16 or 32.
      where: ``where(path, leaf)`` tells which leaves of the state are stored, given
        paths like ``"0/mu/Dense_0/kernel"`` and shapes, a ``jax.ShapeDtypeStruct``.
      rounding: "stochastic", or "nearest", with which slow averages stand still.
      seed: seed of the stochastic rounding.

    Returns:
      An optimizer, whose updates are those of the inner one.

    Raises:
      ValueError: if ``octaves`` or ``rounding`` is none of those, or the state is not
        of this optimizer.
      TypeError: if an argument is of the wrong type, or ``where`` chooses what is not
        floating.

    Example:
      >>> import jax, jax.numpy as jnp, optax, madax
      >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
      >>> tx = madax.with_quantized_state(optax.adam(0.1))
      >>> mu = tx.init(params).inner_state[0].mu
      >>> print(mu["w"].dtype, mu["b"].dtype)
      uint8 float32
    """
    inner = check_inner(inner)
    check_instance("moment_format", moment_format, MomentFormat, or_none=False)
    if where is not None and not callable(where):
        raise TypeError(
            f"where must be a function of (path, leaf), got {where!r} of type "
            f"{type(where).__name__}."
        )
    if octaves not in (2, 4, 8, 16, 32):
        raise ValueError(f"octaves must be 2, 4, 8, 16 or 32, got {octaves!r}.")
    check_rounding(rounding)
    check_seed(seed)
    codec = Codec(moment_format, octaves)
    name = f"{moment_format!r}, octaves={octaves}"

    def init_fn(params):
        paths, leaves, treedef = flatten_named(inner.init(params))
        windows = []
        for i in _chosen(inner, params, paths, where):
            leaves[i], window = started(codec, leaves[i])
            windows.append(window)
        count = jnp.zeros([], jnp.int32)
        inner_state = treedef.unflatten(leaves)
        return WithQuantizedStateState(
            count, inner_state, {name: stack_windows(windows)}
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_state(state, WithQuantizedStateState)
        like = jax.eval_shape(inner.init, updates if params is None else params)
        paths, leaves, treedef = flatten_named(state.inner_state)
        dtypes = _stored_dtypes(name, moment_format.v_dtype, state, like)
        names, layer = [_name(paths[i]) for i in dtypes], extra_args.get("layer")
        keys = leaf_keys(seed, state.count, names, layer)
        parts = one_a_leaf((state.window[name], keys), len(dtypes), apart=True)
        windows = [window for window, _ in parts]
        codes = [leaves[i] for i in dtypes]

        def inner_step(codes):
            """The inner step; the stored leaves before it, and all leaves after."""
            stored = zip(codes, windows, strict=True)
            before = [decoded(codec, *one) for one in stored]
            now = list(leaves)
            for (i, dtype), value in zip(dtypes.items(), before, strict=True):
                now[i] = value.astype(dtype)
            inner_updates, inner_state = inner.update(
                updates, treedef.unflatten(now), params, **extra_args
            )
            return inner_updates, before, *jax.tree.flatten(inner_state)

        # New codes need the new windows, and those need all of the new values. To keep
        # the values until then would take more memory than codes save.
        _, before, after, _ = inner_step(codes)
        new = [after[i] for i in dtypes]
        following = [
            followed(codec, *one) for one in zip(new, before, windows, strict=True)
        ]
        # Leaf by leaf, or all of the first step would come before the second.
        again = [computed_again(one) for one in zip(codes, following, strict=True)]
        inner_updates, before, leaves, treedef = inner_step([one for one, _ in again])
        following = [window for _, window in again]
        stored = zip(dtypes, before, following, parts, strict=True)
        for i, value, window, (_, key) in stored:
            leaves[i] = encoded(codec, leaves[i], value, window, key, rounding)
        count = jnp.asarray(optax.safe_increment(state.count))
        inner_state = treedef.unflatten(leaves)
        window = {name: stack_windows(following)}
        return inner_updates, WithQuantizedStateState(count, inner_state, window)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- which leaves ---------------------------------------------------------------------


def _chosen(
    inner: optax.GradientTransformationExtraArgs,
    params: Any,
    paths: Sequence[str],
    where: Callable[[str, Any], bool] | None,
) -> list[int]:
    """The indices of the leaves of the state to be stored."""
    params = jax.eval_shape(lambda params: params, params)
    leaves = jax.tree.leaves(jax.eval_shape(inner.init, params))
    if where is None:
        shapes = {w.shape for w in jax.tree.leaves(params, is_leaf=is_quantized)}
        copies = depends_on(lambda params, _: inner.init(params), params, ())
        return [
            i
            for i, (leaf, copy) in enumerate(zip(leaves, copies, strict=True))
            if _is_float(leaf)
            and leaf.size >= _LEAST_SIZE
            and leaf.shape in shapes
            and not copy
        ]
    chosen = [i for i, leaf in enumerate(leaves) if where(paths[i], leaf)]
    for i in chosen:
        if not _is_float(leaves[i]):
            raise TypeError(
                f"where chooses {paths[i]!r} of the state, of dtype {leaves[i].dtype}, "
                "but only floating leaves can be stored as codes; leave it out."
            )
    return chosen


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _stored_dtypes(
    wanted: str, codes_dtype: Any, state: WithQuantizedStateState, like: Any
) -> dict[int, Any]:
    """By the indices of the stored leaves, the dtypes they have for the optimizer.

    Args:
      wanted: the name of the format of the codes.
      codes_dtype: their dtype.
      state: the state, which must be of this optimizer.
      like: the state of the inner optimizer, its shapes.
    """
    made_for = next(iter(state.window))
    if made_for != wanted:
        raise ValueError(
            f"moment_format is {wanted}, but the optimizer state was made for "
            f"{made_for}; call init again, or use the format of the state."
        )
    found = jax.tree.structure(state.inner_state)
    if found != jax.tree.structure(like):
        raise ValueError(
            f"the optimizer state has the tree structure {found}, but that of inner is "
            f"{jax.tree.structure(like)}; call init again."
        )
    pairs = zip(jax.tree.leaves(state.inner_state), jax.tree.leaves(like), strict=True)
    stored = {
        i: shape.dtype
        for i, (leaf, shape) in enumerate(pairs)
        if _is_float(shape) and jnp.result_type(leaf) == codes_dtype
    }
    window = state.window[wanted]
    if np.shape(window.octave) != entries(len(stored)):
        raise ValueError(
            f"the optimizer state has {len(stored)} leaves of codes, but windows of "
            f"shape {np.shape(window.octave)}; call init again."
        )
    return stored


def _name(path: str) -> str:
    """What random bits know a leaf by; of a layer in a list, as of one in a stack.

    Only its index is one: those before it are of the state.
    """
    for part in (ENDS, LAYERS):
        before, found, after = f"/{path}".partition(f"/{part}/")
        if found:
            return f"{before.replace('/', '.')}/{part}/{after}"
    return path
