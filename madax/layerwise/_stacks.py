"""Stacks of layers, and their optimizer states.

A stack is a tree whose leaves have a leading axis of layers. Its state has this axis,
too, except in scalars that belong to the step, such as counts.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._core.checks import leaf_name
from madax._core.names import ENDS, LAYERS, Tree, flatten_named
from madax._core.tracing import depends_on
from madax.codes._quantize import dequantize_params

Optimizer = optax.GradientTransformationExtraArgs


def depth_of(layers: Tree) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def read(stack: Tree, i: int | jax.Array) -> Tree:
    """Returns layer ``i`` of a stack."""
    at = jax.lax.dynamic_index_in_dim
    return jax.tree.map(lambda x: at(x, i, keepdims=False), stack)


def write(stack: Tree, one: Tree, i: int | jax.Array) -> Tree:
    """Returns the stack with a new layer ``i``, written in place if XLA can do so."""
    at = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, new: at(x, new, i, 0), stack, one)


def cut(batch: Tree, parts: int) -> Tree:
    """Returns the batch as a stack of parts of equal size."""
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
        # A part takes every n-th example, so that with a sharded axis each device has
        # some of every part.
        x = jnp.reshape(x, (shape[0] // parts, parts, *shape[1:]))
        split.append(jnp.moveaxis(x, 1, 0))
    return treedef.unflatten(split)


def _one(layers: Tree) -> Tree:
    """Returns the shapes of one layer of a stack."""
    shape = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: shape(x.shape[1:], jnp.result_type(x)), layers)


def splitter(tx: Optimizer, layers: Tree, stack: Tree) -> tuple[Callable, Callable]:
    """Returns functions that split a state into per-layer and shared parts, and back.

    Both take the state of a layer or of a stack of layers.
    """
    one = jax.eval_shape(tx.init, {LAYERS: _one(layers)})
    treedef = jax.tree.structure(one)
    if jax.tree.structure(stack) != treedef:
        raise ValueError(
            "the state of the layers does not match tx, got "
            f"{jax.tree.structure(stack)}, expected {treedef}; call init again."
        )
    owned = []
    for x, leaf in zip(jax.tree.leaves(stack), jax.tree.leaves(one), strict=True):
        owned.append(np.ndim(x) > len(leaf.shape))
        shape = (depth_of(layers),) * owned[-1] + leaf.shape
        if np.shape(x) != shape:
            raise ValueError(
                "the state of the layers does not match params, got an array of shape "
                f"{np.shape(x)}, expected {shape}; call init again."
            )

    def split(state):
        leaves = list(zip(jax.tree.leaves(state), owned, strict=True))
        return [x for x, own in leaves if own], [x for x, own in leaves if not own]

    def join(own, common):
        parts = iter(own), iter(common)
        return treedef.unflatten([next(parts[not mine]) for mine in owned])

    return split, join


def init_stack(tx: Optimizer, layers: Tree, first: int) -> Tree:
    """Returns the states of all layers, with a leading axis except in shared scalars.

    ``first`` is the number of layers in the stacks before, for the random numbers.
    """
    one = _one(layers)
    with_path, treedef = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(tx.init, {LAYERS: one})
    )
    from_values = depends_on(lambda layers, _: tx.init({LAYERS: layers}), one, ())
    # Each layer has random numbers of its own, so keys have the axis of layers.
    keys = {i for i, (_, x) in enumerate(with_path) if _is_key(x)}
    shared = _shared(tx, one, from_values, keys)

    # Zeros of the shape of the stack are kept, because they are sharded like the stack.
    # They are found by path, because an optimizer may treat a stack differently from a
    # layer, by size or rank.
    stack = dict(jax.tree_util.tree_leaves_with_path(tx.init({LAYERS: layers})))
    states: dict[int, jax.Array] = {}
    for i, (path, one_leaf) in enumerate(with_path):
        whole = (depth_of(layers), *one_leaf.shape), one_leaf.dtype
        x = stack.get(path, 0)
        if not from_values[i] and (np.shape(x), jnp.result_type(x)) == whole:
            states[i] = x
    others = [i for i in range(len(with_path)) if i not in states]

    def init(layer):
        leaves = jax.tree.leaves(tx.init({LAYERS: layer}))
        return [leaves[i] for i in others]

    axes = [None if i in shared else 0 for i in others]
    made = jax.vmap(init, out_axes=axes)(layers)
    states |= dict(zip(others, made, strict=True))
    of_layers = jax.vmap(_with_key_of, (0, 0))
    for i in keys:
        states[i] = of_layers(states[i], first + jnp.arange(depth_of(layers)))
    return treedef.unflatten([states[i] for i in range(len(states))])


def with_keys_of(state: Tree, part: int) -> Tree:
    """Folds the random keys of a state, if any, for one part of the tree."""
    return jax.tree.map(lambda x: _with_key_of(x, part) if _is_key(x) else x, state)


def _with_key_of(key: jax.Array, part: int | jax.Array) -> jax.Array:
    if is_typed_key(key):
        return jnp.vectorize(lambda key: jax.random.fold_in(key, part))(key)
    return jax.random.fold_in(key, part)


def _is_key(x: jax.Array) -> bool:
    """Returns whether a leaf is a random key, typed or two raw numbers."""
    is_old = np.shape(x) == (2,) and x.dtype == jnp.uint32
    return is_old or is_typed_key(x)


def is_typed_key(x: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _shared(tx: Optimizer, one: Tree, from_values: Sequence[bool], keys: set) -> set:
    """Returns which leaves of a layer's state are equal in all layers, at every step.

    They are scalars that depend on no parameter, gradient or key, such as counts.
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


def _gradients(params: Tree) -> Tree:
    """Returns the shapes of the gradients of parameters."""
    return jax.eval_shape(dequantize_params, params)


def check_layer_by_layer(
    tx: Optimizer, params: Tree, names: Sequence[str | None]
) -> None:
    """Raises if the update of a layer ever depends on the gradients of another layer.

    It may depend on them in the same step, as in a clip of the global norm, or in a
    later step, through state that all leaves share, as in D-Adaptation. ``names`` are
    the names of the stacks; None stands for a single stack.
    """
    layers = params[LAYERS]
    ends, stacks = jax.eval_shape(lambda x: x, (params[ENDS], layers))
    ones = {name: _one(stacks if name is None else stacks[name]) for name in names}
    for name in names:
        _check_last(tx, ends, ones, name)


def _check_last(tx: Optimizer, ends: Tree, ones: dict, name: str | None) -> None:
    """Raises if gradients of a stack's last layer affect any other update."""

    def listed(ends, ones, *last):
        lists = {k: [one, *last] if k == name else [one] for k, one in ones.items()}
        return {ENDS: ends, LAYERS: lists.get(None, lists)}

    tree = listed(ends, ones, ones[name])
    leaves, treedef = jax.tree.flatten(jax.eval_shape(tx.init, tree))
    shared = _not_of_the_last(tx, tree, listed(ends, ones))
    grads, last_grads = (_gradients(ends), _gradients(ones)), _gradients(ones[name])
    reached: set[int] = (
        set()
    )  # shared state that depends on gradients of the last layer
    while True:
        rest = {i: x for i, x in enumerate(leaves) if i not in reached}

        def others(mapped, fixed):
            (last, reached), (grads, rest, tree) = mapped, fixed
            state = [x for _, x in sorted((reached | rest).items())]
            state = treedef.unflatten(state)
            updates, state = tx.update(listed(*grads, last), state, tree)
            new: Tree = updates
            lists: dict = {None: new[LAYERS]} if name is None else dict(new[LAYERS])
            lists[name] = lists[name][:-1]
            return (new[ENDS], list(lists.values())), state

        mapped = last_grads, {i: leaves[i] for i in reached}
        found = depends_on(others, mapped, (grads, rest, tree))
        if any(found[: -len(leaves)] if leaves else found):
            how = "the same step, as in optax.clip_by_global_norm"
            if reached:
                how = "a step before, as in optax.contrib.dadapt_adamw"
            raise ValueError(
                "tx must update each layer from its own gradients, but its updates "
                f"depend on gradients of other layers in {how}; to clip, pass "
                "max_norm= to layerwise, or use optax.clip or optax.clip_by_block_rms; "
                "or train the whole model with madax.value_and_grad."
            )
        after = {i for i in shared if found[i - len(leaves)]}
        if after <= reached:
            return
        reached |= after


def _not_of_the_last(tx: Optimizer, *trees: Tree) -> set[int]:
    """Returns which leaves of a state do not belong to the last layer alone.

    These have the same path and size in the state of a second tree, which lacks that
    layer. Vectors with an entry per leaf are shorter there.
    """
    more, fewer = (
        jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, tree))
        for tree in trees
    )
    shapes = {path: x.shape for path, x in fewer}
    return {i for i, (path, x) in enumerate(more) if shapes.get(path) == x.shape}
