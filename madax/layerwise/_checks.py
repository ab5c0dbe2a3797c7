"""Checks of the arguments, parameters and functions of :func:`madax.layerwise`."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from madax._core.checks import leaf_name
from madax._core.names import ENDS, LAYERS, Tree, flatten_named
from madax._core.shards import manual_axes, types_tell
from madax.codes._array import is_quantized
from madax.layerwise._floats import is_inexact
from madax.layerwise._plan import Stack


def check_devices() -> None:
    """Raises where gradients would not be summed over devices."""
    if manual_axes() and not types_tell():
        raise ValueError(
            "layerwise inside jax.shard_map needs check_vma=True, by which JAX knows "
            "which gradients to sum over devices; it is False, or this is jax.pmap: "
            "leave check_vma out, or use jax.jit with sharded arrays."
        )


def check_params(params: Tree, stacks: Sequence[Stack]) -> None:
    """Raises unless parameters are a dict of ends and of stacked layers."""
    if not isinstance(params, Mapping) or set(params) != {ENDS, LAYERS}:
        found = list(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f'params must be a dict of "ends" and "layers", got {found}; pass '
            '{"ends": tree, "layers": tree of leaves with a leading axis of layers}.'
        )
    layers, names = params[LAYERS], [stack.name for stack in stacks]
    is_dict = isinstance(layers, Mapping)
    if None not in names and not (is_dict and set(layers) == set(names)):
        found = list(layers) if is_dict else type(layers).__name__
        raise ValueError(
            f"params['layers'] must be a dict of stacks {names}, as layer has "
            f"a function for each, got {found}; give both the same names."
        )
    for stack in stacks:
        _check_stack(stack, layers if stack.name is None else layers[stack.name])


def check_stacks_of_state(state: Tree, stacks: Sequence[Stack]) -> None:
    """Raises unless a state has the ends and the stacks of the parameters."""
    names = [stack.name for stack in stacks if stack.name is not None]
    if isinstance(state, Mapping) and {ENDS, LAYERS} <= set(state):
        layers = state[LAYERS]
        if not names or (isinstance(layers, Mapping) and set(layers) == set(names)):
            return
    raise ValueError(
        f"state must have the states of the ends and of the layers {names}, got "
        f"{jax.tree.structure(state)}; call the init that layerwise returned."
    )


def _check_stack(stack: Stack, layers: Tree) -> None:
    """Raises unless all leaves have an axis of layers that the pattern divides."""
    path = LAYERS if stack.name is None else f"{LAYERS}/{stack.name}"
    names, leaves, _ = flatten_named(layers)
    shapes = [np.shape(leaf) for leaf in leaves]
    if not shapes or not shapes[0] or not shapes[0][0]:
        found = f"shape {shapes[0]} at {names[0]!r}" if shapes else "no leaves"
        raise ValueError(
            f"{leaf_name('params', path)} must be a tree of arrays with a leading axis "
            f"of layers, not empty, got {found}; stack layers with jnp.stack, or train "
            "a model without layers by madax.value_and_grad."
        )
    for name, shape in zip(names, shapes, strict=True):
        if shape[:1] != shapes[0][:1]:
            raise ValueError(
                f"{leaf_name('params', f'{path}/{name}')} has shape {shape}, but the "
                f"first leaf of the layers has a leading axis of {shapes[0][0]}; all "
                "must have the same. Codes must have scales of each layer: use "
                "quantize_params(..., channel_axis=0)."
            )
    if shapes[0][0] % len(stack.pattern):
        raise ValueError(
            f"layer is a pattern of {len(stack.pattern)} functions, which does not "
            f"divide the {shapes[0][0]} layers of {leaf_name('params', path)}; pass a "
            "list with a function for each layer."
        )


def check_layer_output(x: Tree, out: Tree, shared: Tree, seen: Tree) -> None:
    """Raises if a layer changes the shapes or dtypes of ``x``, or the shared tree.

    ``seen`` is the copy of the shared tree that the layer got, and may have changed.
    """
    before, after = (
        jax.tree.map(lambda x: (np.shape(x), str(jnp.result_type(x))), tree)
        for tree in (x, out)
    )
    old, new = map(jax.tree.leaves, (shared, seen))
    if len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True)):
        raise ValueError(
            f"layer changes the shared dict of {sorted(shared)}; pass on in x what a "
            "layer changes, and return its first value from embed."
        )
    if before != after:
        more = f" The shared {sorted(shared)} are not part of x." if shared else ""
        raise ValueError(
            "layer must return x with its shapes and dtypes, got "
            f"{after} from {before}; cast x, or pass another dtype to layerwise.{more}"
        )


def check_loss(value: jax.typing.ArrayLike) -> None:
    """Raises unless a loss is a floating scalar."""
    dtype = jnp.result_type(value)
    if np.shape(value) != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"loss must return a floating scalar, got {dtype} of shape "
            f"{np.shape(value)}; take its mean, and pass has_aux=True if it returns "
            "(loss, aux)."
        )


def check_updates(params: Tree, updates: Tree) -> None:
    """Raises if an optimizer changes leaves without a gradient, such as integers."""
    names, leaves, treedef = flatten_named(params, is_leaf=is_quantized)
    for name, leaf, u in zip(
        names, leaves, treedef.flatten_up_to(updates), strict=True
    ):
        if not is_quantized(leaf) and not is_inexact(leaf) and is_inexact(u):
            raise TypeError(
                f"{leaf_name('params', name)} has dtype {jnp.result_type(leaf)}, which "
                "has no gradient, but tx would train it; leave it out by optax.masked "
                "or optax.partition."
            )
