"""Stacks of layers, and the optimizer states of them.

A stack is a tree whose leaves have a leading axis of layers. Its state has this axis,
too, but for scalars that belong to the step and not to a layer, such as counts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.checks import leaf_name
from madax._core.names import ENDS, LAYERS, flatten_named
from madax._core.tracing import depends_on
from madax.codes._quantize import dequantize_params


def depth_of(layers: Any) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def read(stack: Any, i: Any) -> Any:
    """Layer ``i`` of a stack."""
    at = jax.lax.dynamic_index_in_dim
    return jax.tree.map(lambda x: at(x, i, keepdims=False), stack)


def write(stack: Any, one: Any, i: Any) -> Any:
    """The stack with another layer ``i``, written in place if XLA may do so."""
    at = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, new: at(x, new, i, 0), stack, one)


def cut(batch: Any, parts: int) -> Any:
    """The batch as a stack of parts of equal size."""
    if parts == 1:
        return batch

    names, leaves, treedef = flatten_named(batch)
    split = []
    for name, x in zip(names, leaves, strict=True):
        shape = np.shape(x)
        if not shape or shape[0] % parts:
            raise ValueError(
                f"{leaf_name('batch', name)} has shape {shape}, whose leading axis "
                f"must be a multiple of microbatches={parts}."
            )
        # The examples of a part are not neighbours: where the axis is sharded, each
        # device has some of every part.
        x = jnp.reshape(x, (shape[0] // parts, parts, *shape[1:]))
        split.append(jnp.moveaxis(x, 1, 0))
    return treedef.unflatten(split)


def _one(layers: Any) -> Any:
    """The shapes of one layer of a stack."""
    shape = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: shape(x.shape[1:], jnp.result_type(x)), layers)


def splitter(tx: Any, layers: Any, stack: Any) -> tuple[Callable, Callable]:
    """Two functions that split a state into per-layer and shared parts, and join it.

    Both take the state of a layer or of a stack of layers.
    """
    one = jax.eval_shape(tx.init, {LAYERS: _one(layers)})
    treedef = jax.tree.structure(one)
    if jax.tree.structure(stack) != treedef:
        raise ValueError(
            "the state of the layers does not match that of tx, got "
            f"{jax.tree.structure(stack)}, expected {treedef}; call init again."
        )
    pairs = zip(jax.tree.leaves(stack), jax.tree.leaves(one), strict=True)
    owned = [np.ndim(x) > len(shape.shape) for x, shape in pairs]

    def split(state):
        leaves = list(zip(jax.tree.leaves(state), owned, strict=True))
        return [x for x, own in leaves if own], [x for x, own in leaves if not own]

    def join(own, common):
        parts = iter(own), iter(common)
        return treedef.unflatten([next(parts[not mine]) for mine in owned])

    return split, join


def init_stack(tx: Any, layers: Any) -> Any:
    """The states of all layers, with a leading axis but for what they share."""
    one = _one(layers)
    with_path, treedef = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(tx.init, {LAYERS: one})
    )
    from_values = depends_on(lambda layers, _: tx.init({LAYERS: layers}), one, ())
    # Each layer has random numbers of its own, so keys are never shared.
    keys = {i for i, (_, x) in enumerate(with_path) if _is_key(x)}
    shared = _shared(tx, one, from_values, keys)

    # Zeros of the shape of the stack are sharded like it, so those are kept. They are
    # found by path, as an optimizer may treat a stack, by its size or rank, in another
    # way.
    stack = dict(jax.tree_util.tree_leaves_with_path(tx.init({LAYERS: layers})))
    states, others = [], []
    for i, (path, shape) in enumerate(with_path):
        x, whole = stack.get(path), ((depth_of(layers), *shape.shape), shape.dtype)
        is_like = x is not None and (np.shape(x), jnp.result_type(x)) == whole
        if is_like and not from_values[i]:
            states.append(x)
        else:
            states.append(None)
            others.append(i)

    def init(layer):
        leaves = jax.tree.leaves(tx.init({LAYERS: layer}))
        return [leaves[i] for i in others]

    axes = [None if i in shared else 0 for i in others]
    for i, x in zip(others, jax.vmap(init, out_axes=axes)(layers), strict=True):
        states[i] = x
    of_layers = jax.vmap(_with_key_of, (0, 0))
    for i in keys:
        states[i] = of_layers(states[i], jnp.arange(depth_of(layers)))
    return treedef.unflatten(states)


def with_keys_of(state: Any, part: Any) -> Any:
    """A state with random keys, if it has any, for one part of the tree alone."""
    return jax.tree.map(lambda x: _with_key_of(x, part) if _is_key(x) else x, state)


def _with_key_of(key: Any, part: Any) -> Any:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jnp.vectorize(lambda key: jax.random.fold_in(key, part))(key)
    return jax.random.fold_in(key, part)


def _is_key(x: Any) -> bool:
    """Whether a leaf of a state is a random key; old ones are two numbers."""
    is_old = np.shape(x) == (2,) and x.dtype == jnp.uint32
    return is_old or jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _shared(tx: Any, one: Any, from_values: Sequence[bool], keys: set[int]) -> set[int]:
    """Which leaves of a layer's state are the same in all layers, at every step.

    Scalars that depend on no parameter, gradient or key, as counts and schedules do.
    """
    leaves, treedef = jax.tree.flatten(jax.eval_shape(tx.init, {LAYERS: one}))
    scalars = {i for i, x in enumerate(leaves) if x.shape == ()}
    shared = {i for i in scalars - keys if not from_values[i]}
    while True:
        own = {i: x for i, x in enumerate(leaves) if i not in shared}
        common = {i: x for i, x in enumerate(leaves) if i in shared}

        def new_state(mapped, common):
            grads, params, own = mapped
            state = treedef.unflatten([x for _, x in sorted({**own, **common}.items())])
            extra = {"madax_layer": jnp.int32(0)}
            return tx.update({LAYERS: grads}, state, {LAYERS: params}, **extra)[1]

        found = depends_on(new_state, (_gradients(one), one, own), common)
        left = {i for i in shared if not found[i]}
        if left == shared:
            return shared
        shared = left


def _gradients(params: Any) -> Any:
    """The shapes of the gradients of parameters."""
    return jax.eval_shape(dequantize_params, params)


def check_layer_by_layer(tx: Any, params: Any) -> None:
    """Raises if the update of one layer ever depends on the gradients of another.

    It does at once, as in a clip of the global norm, or in a later step, by way of a
    part of the state that all leaves share, as in D-Adaptation.
    """
    ends, one = jax.eval_shape(lambda x: x, params[ENDS]), _one(params[LAYERS])
    tree = {ENDS: ends, LAYERS: [one, one]}
    state = jax.eval_shape(tx.init, tree)
    leaves, treedef = jax.tree.flatten(state)
    shared = _not_of_the_last(tx, tree, {ENDS: ends, LAYERS: [one]})
    grads = _gradients(ends), _gradients(one)
    reached: set[int] = set()  # the shared parts that the last layer's gradients reach
    while True:
        rest = {i: x for i, x in enumerate(leaves) if i not in reached}

        def others(mapped, fixed):
            (last, reached), ((ends, first), rest, tree) = mapped, fixed
            grads = {ENDS: ends, LAYERS: [first, last]}
            state = [x for _, x in sorted((reached | rest).items())]
            updates, state = tx.update(grads, treedef.unflatten(state), tree)
            return (updates[ENDS], updates[LAYERS][0]), state

        mapped = grads[1], {i: leaves[i] for i in reached}
        found = depends_on(others, mapped, (grads, rest, tree))
        if any(found[: -len(leaves)] if leaves else found):
            how = (
                "a step before, as in optax.contrib.dadapt_adamw"
                if reached
                else "the same step, as in optax.clip_by_global_norm"
            )
            raise ValueError(
                "tx must update each layer from its own gradients, but here updates "
                f"depend on gradients of other layers in {how}, which are never there "
                "at once; use madam, which needs no clipping, optax.clip or "
                "optax.clip_by_block_rms, or train the whole model with "
                "madax.value_and_grad."
            )
        after = {i for i in shared if found[i - len(leaves)]}
        if after <= reached:
            return
        reached |= after


def _not_of_the_last(tx: Any, *trees: Any) -> set[int]:
    """Which leaves of the first tree's state do not belong to its last layer alone.

    They are there, and as large, in the state of the second tree, which lacks that
    layer. Vectors with an entry a leaf are shorter there.
    """
    more, fewer = (
        jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, tree))
        for tree in trees
    )
    shapes = {path: x.shape for path, x in fewer}
    return {i for i, (path, x) in enumerate(more) if shapes.get(path) == x.shape}
