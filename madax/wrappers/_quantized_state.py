"""Any optax optimizer with its moments stored as codes: decode, update, encode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._core.checks import (
    check_format,
    check_seed,
    check_state,
    check_transformation,
    check_where,
    is_float,
)
from madax._core.moved import by_name
from madax._core.names import Tree
from madax._core.numerics import incremented
from madax._core.rounding import Rounding, check_rounding, leaf_keys
from madax._core.shards import barrier
from madax._core.tracing import Shapes, shapes_of
from madax._core.vectors import shape_per_leaf, split_per_leaf
from madax.codes._array import is_quantized
from madax.formats._moment_codec import MomentCodec, stack_windows
from madax.formats._moment_format import (
    SIGNED_OCTAVES,
    MomentFormat,
    MomentWindow,
    check_made_for,
)
from madax.wrappers._state_roles import StateLeaves, reasons_for_floats, state_leaves

# Smaller leaves save little, and the noise of a few codes would hurt them.
_MIN_SIZE = 4096

# Tells which leaves of a state are stored, given their paths, shapes and dtypes.
Where = Callable[[str, jax.ShapeDtypeStruct], bool]


class WithQuantizedStateState(NamedTuple):
    """State of :func:`with_quantized_state`.

    Attributes:
      count: number of steps taken, int32 scalar.
      inner_state: state of the inner optimizer, with codes in place of the stored
        leaves: uint8, or uint16 for more than 8 bits.
      window: a dict from the name of the format to a ``MomentWindow``, the octaves of
        the codes. The key makes a checkpoint of another format an error. It ends with
        the dtypes of the moments, unless all are float32.
    """

    count: jax.Array
    inner_state: Tree
    window: dict[str, MomentWindow]


@by_name(
    "moment_format", octaves="write moment_format=madax.MomentFormat(bits, octaves)"
)
def with_quantized_state(
    inner: optax.GradientTransformation,
    *,
    moment_format: MomentFormat = MomentFormat(8),  # noqa: B008
    where: Where | None = None,
    rounding: Rounding = "stochastic",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the moments of an optimizer as codes of 8 to 16 bits.

    In each step the codes are decoded, the inner optimizer returns its update and new
    moments, and the moments are encoded. Adam then has two bytes of state per parameter
    instead of eight. For parameters that are codes, pass ``moment_format`` to
    :func:`with_quantized_params` instead: a parameter then takes three bytes in all.

    - A leaf of the state that has a negative value is stored with a sign and 32
      octaves, any other leaf without a sign and with 64. The other bits are binary
      digits: two of 8 bits. In SGD and Muon large elements of the momentum matter most:
      ``MomentFormat(8, octaves=8)`` gives them two more digits, and evenly spaced
      values below 1/64 of the max.
    - The octaves are placed below the max of the leaf in each step, so moments may grow
      or fall by any factor. They do not follow outliers: they reach 20 octaves above
      the mean of a leaf with a sign, 40 above the mean of other leaves, and rise by 4
      or 8 a step beyond. An element above them, or one that is not finite, keeps its
      old value in all moments of its parameter, including float moments. So a spike
      costs one step of one element, and a real rise a few steps.
    - In a leaf without negative values, a positive value stays positive, so Adam never
      divides by a zero that rounding made. Decay is exact: the factor that all elements
      share goes into a scale. Rounding gives :math:`\nu` the relative variance of
      :class:`MomentFormat`, which makes :math:`1/\sqrt\nu` too large by 3.4 % on
      average for 8 bits.

    Without ``where``, a leaf is stored if it is floating, has 4096 elements or more and
    belongs to a parameter, by path and shape, unless codes would ruin it. Centred
    RMSProp, for example, divides by the difference of two moments. ``init`` finds such
    leaves by tracing a step, and raises if ``where`` selects one.

    Moments keep the dtypes of ``init``, whatever dtype gradients have, so ``params``
    may be left out. A step calls the inner optimizer twice: the octaves depend on all
    new values of a leaf, and to keep those until they are encoded would take the memory
    that codes save. Compilers drop unused results of the first call, but not callbacks.
    An accumulator of gradients would count as a moment, so put ``optax.MultiSteps``
    around this.

    Args:
      inner: any optax optimizer.
      moment_format: the format of the codes.
      where: ``where(path, leaf)`` tells which leaves of the state are stored, given
        paths like ``"0/mu/Dense_0/kernel"`` and shapes, a ``jax.ShapeDtypeStruct``.
      rounding: "stochastic", or "nearest", with which slow averages stall.
      seed: seed of the stochastic rounding.

    Returns:
      An optimizer with the updates of the inner one.

    Raises:
      ValueError: if ``rounding`` is unknown, the state is not of this optimizer,
        ``where`` selects a leaf that codes would ruin, or there is no ``where`` and the
        update cannot be traced.
      TypeError: if an argument is of the wrong type, or ``where`` selects a leaf that
        is not floating.

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
    check_format("moment_format", moment_format, MomentFormat, or_none=False)
    check_where(where)
    check_rounding(rounding)
    check_seed(seed)

    choose = functools.partial(_chosen, inner, where)
    codec = MomentCodec(moment_format.bits, moment_format.octaves or SIGNED_OCTAVES)
    return quantized_state(inner, codec, choose, rounding=rounding, seed=seed)


def quantized_state(
    inner: optax.GradientTransformationExtraArgs,
    codec: MomentCodec,
    choose: Callable[[Tree, StateLeaves], Sequence[int]],
    *,
    rounding: Rounding = "stochastic",
    seed: jax.typing.ArrayLike = 0,
    known_as: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Like :func:`with_quantized_state`, with any codec and any choice of leaves.

    ``choose`` returns the indices of the leaves to store, from the shapes of parameters
    and the leaves of the state. Random bits depend on ``known_as`` instead of the path
    of the state, so that fields can be renamed.
    """

    # Cached, because eager steps would spend a quarter of their time on it.
    @functools.lru_cache(maxsize=16)
    def leaves_for(shapes: Shapes) -> StateLeaves:
        return state_leaves(inner, shapes.tree())

    def init_fn(params):
        shapes = shapes_of(params)
        like = leaves_for(shapes)
        values, windows = jax.tree.leaves(inner.init(params)), []
        chosen = choose(shapes.tree(), like)
        name = _window_name(codec, [values[i].dtype for i in chosen])
        for i in chosen:
            values[i], window = codec.start(values[i])
            windows.append(window)
        return WithQuantizedStateState(
            jnp.zeros([], jnp.int32),
            like.treedef.unflatten(values),
            {name: stack_windows(windows)},
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_state(state, WithQuantizedStateState)
        like = leaves_for(shapes_of(updates if params is None else params))
        leaves = jax.tree.leaves(state.inner_state)
        dtypes, (window,) = _stored_dtypes(codec, state, like), state.window.values()
        layer = extra_args.get("madax_layer")
        names = [_key_name(like, i, known_as, layer is not None) for i in dtypes]
        keys = leaf_keys(seed, state.count, names, layer)
        parts = split_per_leaf((window, keys), len(dtypes), separate_kernels=True)
        windows, keys = ([part[k] for part in parts] for k in (0, 1))

        def inner_step(codes: list[jax.Array], params: Tree) -> tuple[Tree, ...]:
            """Values of the codes, and updates and state of a step from them."""
            before = [codec.decode(*one) for one in zip(codes, windows, strict=True)]
            now = dict(enumerate(leaves))
            for (i, dtype), value in zip(dtypes.items(), before, strict=True):
                now[i] = value.astype(dtype)
            inner_state = like.treedef.unflatten(now.values())
            return before, *inner.update(updates, inner_state, params, **extra_args)

        # New codes need the new windows, which need all new values. To keep the values
        # until then would take more memory than codes save.
        codes = [leaves[i] for i in dtypes]
        before, _, inner_state = inner_step(codes, params)
        new = jax.tree.leaves(inner_state)
        following = map(codec.follow, [new[i] for i in dtypes], before, windows)
        # One barrier per leaf: a single barrier would make XLA finish the first step of
        # all leaves before the second.
        again = [_computed_again(one) for one in zip(codes, following, strict=True)]
        codes, following = ([one[k] for one in again] for k in (0, 1))
        # Codes of parameters are decoded again, too; otherwise XLA would keep the
        # values.
        params = jax.tree.map(
            lambda w: _computed_again(w) if is_quantized(w) else w,
            params,
            is_leaf=is_quantized,
        )
        before, inner_updates, inner_state = inner_step(codes, params)
        after, treedef = jax.tree.flatten(inner_state)
        stored = zip(dtypes, map(_Stored, before, following, keys), strict=True)
        after = _encoded(codec, like, leaves, after, dict(stored), rounding)
        return inner_updates, WithQuantizedStateState(
            incremented(state.count),
            treedef.unflatten(after),
            {_window_name(codec, [*dtypes.values()]): stack_windows(following)},
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Stored(NamedTuple):
    """What a new value of a leaf is stored by."""

    before: jax.Array  # the value before
    window: MomentWindow  # of the new codes
    key: jax.Array


def _encoded(
    codec: MomentCodec,
    like: StateLeaves,
    before: Sequence[jax.Array],
    after: Sequence[jax.Array],
    stored: dict[int, _Stored],
    rounding: Rounding,
) -> list[jax.Array]:
    """The leaves of the state after a step, of which the ``stored`` become codes.

    An element of a parameter keeps all of its new moments, or none, floats included: a
    momentum without its second moment would be a large step.
    """
    owners: dict[int, int | str] = {i: i for i in stored}
    for i, owner in enumerate(like.owners):
        owners |= {} if owner is None or like.copies[i] else {i: owner}
    fits: dict[int | str, jax.Array] = {}
    for i, leaf in stored.items():
        fit = codec.fits(after[i], leaf.window)
        fits[owners[i]] = fits.get(owners[i], True) & fit
    encoded = list(after)
    for i, owner in owners.items():
        if i in stored:
            value, window, key = stored[i]
            fit = fits[owner]
            encoded[i] = codec.encode(after[i], value, fit, window, key, rounding)
        elif owner in fits:
            encoded[i] = jnp.where(fits[owner], after[i], before[i])
    return encoded


def _computed_again(x: Tree) -> Tree:
    """Returns a tree of arrays from which XLA computes again, which saves memory.

    TPUs keep results, because arithmetic is their bottleneck.
    """
    return jax.lax.platform_dependent(x, tpu=lambda x: x, default=barrier)


# --- which leaves ---------------------------------------------------------------------


def _chosen(
    inner: optax.GradientTransformationExtraArgs,
    where: Where | None,
    params: Tree,
    leaves: StateLeaves,
) -> list[int]:
    """Returns the indices of the leaves of the state to store."""
    of_parameters = zip(leaves.paths, leaves.owners, strict=True)
    moments = {path for path, owner in of_parameters if owner is not None}
    choose = where or (lambda path, x: x.size >= _MIN_SIZE and path in moments)
    named = enumerate(zip(leaves.paths, leaves.shapes, strict=True))
    chosen = [i for i, leaf in named if choose(*leaf)]
    for i in chosen:
        if not is_float(leaves.shapes[i]):
            raise TypeError(
                f"where selects {leaves.paths[i]!r} of the state, of dtype "
                f"{leaves.shapes[i].dtype}, but only floating leaves can be stored as "
                "codes; leave it out."
            )
    try:
        reasons = reasons_for_floats(inner, params, leaves) if chosen else {}
    except Exception as error:
        if where is not None:
            return chosen
        raise ValueError(
            "with_quantized_state traces inner.update to find the leaves of its state "
            f"to store, but that failed: {error}; use where to select them."
        ) from error
    for i in chosen if where is not None else ():
        if i in reasons:
            raise ValueError(
                f"where selects {leaves.paths[i]!r} of the state, which codes would "
                f"ruin, since {reasons[i]}; leave it out."
            )
    return [i for i in chosen if i not in reasons]


def _window_name(codec: MomentCodec, dtypes: Sequence[jnp.dtype]) -> str:
    """Returns the name of the codes, with the dtypes of values if not all float32."""
    names = [jnp.dtype(dtype).name for dtype in dtypes]
    others = f", {' '.join(names)}" if set(names) - {"float32"} else ""
    return f"{codec.format}{others}"


def _stored_dtypes(
    codec: MomentCodec, state: WithQuantizedStateState, like: StateLeaves
) -> dict[int, jnp.dtype]:
    """Returns the dtypes of stored leaves for the optimizer, by index.

    They are the dtypes of ``init``, whatever parameters and gradients have now. Raises
    if the state is not of this optimizer.
    """
    ((name, window),) = state.window.items()
    wanted = repr(codec.format)
    check_made_for(wanted, name)
    leaves, found = jax.tree.flatten(state.inner_state)
    if found != like.treedef:
        raise ValueError(
            f"the optimizer state has the tree structure {found}, but inner has "
            f"{like.treedef}; call init again."
        )
    stored = [
        i
        for i, (leaf, shape) in enumerate(zip(leaves, like.shapes, strict=True))
        if is_float(shape) and jnp.result_type(leaf) == codec.format.dtype
    ]
    names = name[len(wanted) + 2 :].split() or ["float32"] * len(stored)
    windows = shape_per_leaf(len(stored))
    if np.shape(window.octave) != windows or len(names) != len(stored):
        raise ValueError(
            f"the optimizer state has {len(stored)} leaves of codes, but windows of "
            f"shape {np.shape(window.octave)}; call init again."
        )
    return dict(zip(stored, map(jnp.dtype, names), strict=True))


def _key_name(like: StateLeaves, i: int, known_as: str | None, is_layer: bool) -> str:
    """Returns the name of a leaf of the state that random bits depend on.

    Layer 3 of a stack has the bits of layer 3 of a list, because :func:`leaf_keys`
    reads the first index in a path as the layer. So if the path of the parameter has an
    index, indices of the state before it become text.
    """
    path, parameter = like.paths[i], like.parameters[i]
    if not parameter:
        return path
    of_state = f"{known_as}/" if known_as else path.removesuffix(parameter)
    if is_layer or any(part.isdecimal() for part in parameter.split("/")):
        of_state = f"/{of_state}"[:-1].replace("/", ".") + "/"
    return of_state + parameter
