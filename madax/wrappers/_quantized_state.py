"""Any optax optimizer with its moments as codes: decode, update, encode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._core.checks import (
    check_instance,
    check_seed,
    check_state,
    check_transformation,
)
from madax._core.names import ENDS, LAYERS
from madax._core.rounding import Rounding, check_rounding, leaf_keys
from madax._core.vectors import entries, one_a_leaf
from madax.codes._array import is_quantized
from madax.formats._moment_codec import (
    Codec,
    StateWindow,
    computed_again,
    decoded,
    encoded,
    fitting,
    followed,
    stack_windows,
    started,
)
from madax.formats._moments import MomentFormat
from madax.wrappers._state_roles import StateLeaves, is_float, state_leaves, unfit

# Smaller leaves save little, and the noise of a few codes would hurt them.
_LEAST_SIZE = 4096


class WithQuantizedStateState(NamedTuple):
    """State of :func:`with_quantized_state`.

    Attributes:
      count: number of steps taken, int32 scalar.
      inner_state: state of the inner optimizer, with codes in the place of the
        leaves that are stored: uint8, or uint16 for more than 8 bits.
      window: ``{format of the codes: where they lie}``, a :class:`StateWindow`. The key
        is there so that a checkpoint of other codes does not fit. It ends with the
        dtypes of the moments, unless all are float32.
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
    r"""Stores the moments of an optimizer as codes of 8 to 16 bits.

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
    - The octaves do not follow a few elements that are far too large: they reach 20
      above the mean of a leaf with a sign, 40 above the mean of other leaves, and rise
      by 4 or 8 a step beyond. An element above them, or one that is not finite, keeps
      its former value in all moments of its parameter, float moments included. So a
      finite spike costs the momentum of one element, and a real rise a few steps.

    Without ``where``, a leaf is stored if it is floating, has 4096 elements or more and
    belongs to a parameter, by path and shape; but not if codes would ruin it. ``init``
    finds out by tracing a step, and refuses a ``where`` that selects such a leaf:

    - one that starts from parameters, or is made of them without the gradient;
    - two of which a step takes the difference or the maximum, as in centred RMSProp
      and AMSGrad;
    - a sum that never decays and may be negative, and so stands for a weight;
    - one that a step only multiplies, or makes of the factors of a matrix;
    - a momentum that decays more slowly than the root of the moment that divides it,
      and this moment;
    - all moments, if a step puts sums of them into a number, as in Prodigy;
    - one on which no update depends, so that it is there for others to read.

    A step makes the floats of a leaf when it updates that leaf; ``init`` makes the
    floats of all leaves at once, unless it is compiled. Moments keep the dtypes that
    they were made with, whatever dtype gradients have; so ``params`` may be left out.

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
      ValueError: if ``octaves`` or ``rounding`` is none of those, the state is not of
        this optimizer, ``where`` selects a leaf that codes ruin, or there is no
        ``where`` and the update cannot be traced.
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
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
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

    def choose(params, leaves):
        return _chosen(inner, params, leaves, where)

    return quantized_state(
        inner, Codec(moment_format, octaves), choose, rounding=rounding, seed=seed
    )


def quantized_state(
    inner: optax.GradientTransformationExtraArgs,
    codec: Codec,
    choose: Callable[[Any, StateLeaves], Sequence[int]],
    *,
    rounding: Rounding = "stochastic",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """As :func:`with_quantized_state`, of the leaves of the state that are chosen.

    Args:
      inner: the optimizer.
      codec: how values become codes.
      choose: a function of the parameters and the leaves of the state to the indices
        of those that are stored.
      rounding: the rounding of codes.
      seed: seed of the stochastic rounding.
    """

    def init_fn(params):
        leaves = state_leaves(inner, params)
        values, windows = jax.tree.leaves(inner.init(params)), []
        chosen = choose(params, leaves)
        name = _window_name(codec, [values[i].dtype for i in chosen])
        for i in chosen:
            values[i], window = started(codec, values[i])
            windows.append(window)
        count = jnp.zeros([], jnp.int32)
        inner_state = leaves.treedef.unflatten(values)
        return WithQuantizedStateState(
            count, inner_state, {name: stack_windows(windows)}
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_state(state, WithQuantizedStateState)
        like = state_leaves(inner, updates if params is None else params)
        leaves = jax.tree.leaves(state.inner_state)
        name, dtypes = _stored_dtypes(codec, state, like)
        names = [_name(like.paths[i]) for i in dtypes]
        keys = leaf_keys(seed, state.count, names, extra_args.get("madax_layer"))
        parts = one_a_leaf((state.window[name], keys), len(dtypes), apart=True)
        windows = [window for window, _ in parts]
        codes = [leaves[i] for i in dtypes]

        def inner_step(codes, params):
            """The inner step; the stored leaves before it, and all leaves after."""
            stored = zip(codes, windows, strict=True)
            before = [decoded(codec, *one) for one in stored]
            now = list(leaves)
            for (i, dtype), value in zip(dtypes.items(), before, strict=True):
                now[i] = value.astype(dtype)
            inner_updates, inner_state = inner.update(
                updates, like.treedef.unflatten(now), params, **extra_args
            )
            return inner_updates, before, *jax.tree.flatten(inner_state)

        # New codes need the new windows, and those need all of the new values. To keep
        # the values until then would take more memory than codes save.
        _, before, after, _ = inner_step(codes, params)
        new = [after[i] for i in dtypes]
        following = [
            followed(codec, *one) for one in zip(new, before, windows, strict=True)
        ]
        # Leaf by leaf, or all of the first step would come before the second.
        again = [computed_again(one) for one in zip(codes, following, strict=True)]
        following = [window for _, window in again]
        # Codes of parameters are decoded again, too, or their values would be kept.
        params = jax.tree.map(
            lambda w: computed_again(w) if is_quantized(w) else w,
            params,
            is_leaf=is_quantized,
        )
        inner_updates, before, after, treedef = inner_step(
            [one for one, _ in again], params
        )
        fits = _fit_together(
            codec, like, after, dict(zip(dtypes, following, strict=True))
        )
        stored = dict(
            zip(dtypes, zip(before, following, parts, strict=True), strict=True)
        )
        for i, fit in fits.items():
            if i in stored:
                value, window, (_, key) = stored[i]
                after[i] = encoded(codec, after[i], value, fit, window, key, rounding)
            else:
                after[i] = jnp.where(fit, after[i], leaves[i])
        count = jnp.asarray(optax.safe_increment(state.count))
        inner_state = treedef.unflatten(after)
        window = {name: stack_windows(following)}
        return inner_updates, WithQuantizedStateState(count, inner_state, window)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- which leaves ---------------------------------------------------------------------


def _chosen(
    inner: optax.GradientTransformationExtraArgs,
    params: Any,
    leaves: StateLeaves,
    where: Callable[[str, Any], bool] | None,
) -> list[int]:
    """The indices of the leaves of the state to be stored."""
    named = list(zip(leaves.paths, leaves.shapes, strict=True))
    if where is not None:
        chosen = [i for i, (path, leaf) in enumerate(named) if where(path, leaf)]
    else:
        chosen = [
            i
            for i, (_, leaf) in enumerate(named)
            if leaf.size >= _LEAST_SIZE and leaves.owner[i] is not None
        ]
    for i in chosen:
        path, leaf = named[i]
        if not is_float(leaf):
            raise TypeError(
                f"where chooses {path!r} of the state, of dtype {leaf.dtype}, but only "
                "floating leaves can be stored as codes; leave it out."
            )
    if not chosen:
        return []
    try:
        reasons = unfit(inner, params, leaves)
    except Exception as error:
        if where is not None:
            return chosen
        raise ValueError(
            "with_quantized_state tells by tracing inner.update which leaves of its "
            f"state it may store, but that failed: {error}; use where to name them."
        ) from error
    if where is None:
        return [i for i in chosen if i not in reasons]
    for i in chosen:
        if i in reasons:
            raise ValueError(
                f"where chooses {leaves.paths[i]!r} of the state, which codes would "
                f"ruin, since {reasons[i]}; leave it out."
            )
    return chosen


def _fit_together(
    codec: Codec, like: StateLeaves, new: Sequence[Any], windows: dict[int, StateWindow]
) -> dict[int, jax.Array]:
    """By the indices of leaves of the state, which of their new elements are kept.

    Of a parameter with a stored moment, an element keeps all of its new moments, or
    none, floats included: a momentum without its second moment would be a large step.
    """
    fits: dict[Any, jax.Array] = {}
    owners = {
        i: owner
        for i, (owner, copy) in enumerate(zip(like.owner, like.copies, strict=True))
        if owner is not None and not copy
    }
    # Leaves of no parameter are on their own, under a negative index.
    owners |= {i: -1 - i for i in windows if i not in owners}
    for i, window in windows.items():
        fit, owner = fitting(codec, new[i], window), owners[i]
        fits[owner] = fits[owner] & fit if owner in fits else fit
    return {i: fits[owner] for i, owner in owners.items() if owner in fits}


def _window_name(codec: Codec, dtypes: Sequence[Any]) -> str:
    """The name of the codes, with the dtypes of the values if not all are float32."""
    name = f"{codec.format!r}, octaves={codec.octaves}"
    names = [jnp.dtype(dtype).name for dtype in dtypes]
    if set(names) <= {"float32"}:
        return name
    return f"{name}, {' '.join(names)}"


def _stored_dtypes(
    codec: Codec, state: WithQuantizedStateState, like: StateLeaves
) -> tuple[str, dict[int, Any]]:
    """The name of the codes; by indices of leaves, their dtypes for the optimizer.

    The state was made with these dtypes, whatever parameters and gradients have now.

    Args:
      codec: of the optimizer.
      state: the state, which must be of this optimizer.
      like: the leaves of the state of the inner optimizer.
    """
    name, wanted = next(iter(state.window)), _window_name(codec, ())
    *made_for, dtypes = f"{name}, ".split(", ", 2)
    if ", ".join(made_for) != wanted:
        raise ValueError(
            f"moment_format is {wanted}, but the optimizer state was made for "
            f"{name}; call init again, or use the format of the state."
        )
    found = jax.tree.structure(state.inner_state)
    if found != like.treedef:
        raise ValueError(
            f"the optimizer state has the tree structure {found}, but that of inner is "
            f"{like.treedef}; call init again."
        )
    pairs = zip(jax.tree.leaves(state.inner_state), like.shapes, strict=True)
    stored = [
        i
        for i, (leaf, shape) in enumerate(pairs)
        if is_float(shape) and jnp.result_type(leaf) == codec.format.v_dtype
    ]
    names = dtypes.rstrip(", ").split() or ["float32"] * len(stored)
    window = state.window[name]
    if np.shape(window.octave) != entries(len(stored)) or len(names) != len(stored):
        raise ValueError(
            f"the optimizer state has {len(stored)} leaves of codes, but windows of "
            f"shape {np.shape(window.octave)}; call init again."
        )
    return name, dict(zip(stored, map(jnp.dtype, names), strict=True))


def _name(path: str) -> str:
    """What random bits know a leaf by; of a layer in a list, as of one in a stack.

    Only its index is one: those before it are of the state.
    """
    for part in (ENDS, LAYERS):
        before, found, after = f"/{path}".partition(f"/{part}/")
        if found:
            return f"{before.replace('/', '.')}/{part}/{after}"
    return path
