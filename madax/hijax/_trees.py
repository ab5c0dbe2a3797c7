"""Functions of trees of lifted codes: lift, lower, decode, place and train."""

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from madax._core.checks import (
    check_float_dtype,
    check_transformation,
    is_lifted,
    leaf_name,
)
from madax._core.names import Tree, flatten_named
from madax.codes._array import (
    AFTER_IMPORT,
    QuantizedArray,
    is_quantized,
    notice_imports,
)
from madax.codes._quantize import split_module
from madax.hijax._operators import install
from madax.hijax._primitives import decode_array, lift_array, lower_array
from madax.hijax._shardings import of_scale


def _let_orbax_save(type_handlers: Tree) -> None:
    from madax.hijax._orbax import register

    register(type_handlers.get_type_handler, type_handlers.register_type_handler)


def _let_orbax_v1_save(compatibility: Tree) -> None:
    from madax.hijax._orbax import register_v1

    register_v1(compatibility)


def _let_variables_decode(nnx: Tree) -> None:
    """Lets ``jnp`` functions decode a variable of codes, as in ``codes._flax``."""
    jax_array = nnx.Variable.__jax_array__

    @wraps(jax_array)
    def decoded(self: Tree) -> Tree:
        value = jax_array(self)
        return decode_array(value) if is_lifted(value) else value

    nnx.Variable.__jax_array__ = decoded


class _IsLifted(type):
    def __instancecheck__(cls, x: object) -> bool:
        return is_lifted(x)


class _AnyLifted(metaclass=_IsLifted):
    """To ``isinstance``, the class of lifted codes, traced or not."""


def _let_filters_see_tracers(filters: Tree) -> None:
    """Lets filters of Equinox take traced codes for arrays, which to JAX they are not.

    They ask an instance of the first of these for its dtype.
    """
    for name in ("_NDARRAY_TYPES", "_ARRAY_TYPES"):
        setattr(filters, name, (*getattr(filters, name, ()), _AnyLifted))


install()
AFTER_IMPORT["equinox", "_filters"] = _let_filters_see_tracers
_ORBAX_V1 = "orbax.checkpoint.experimental.v1._src.serialization"
AFTER_IMPORT["orbax.checkpoint", "type_handlers"] = _let_orbax_save
AFTER_IMPORT[_ORBAX_V1, "compatibility"] = _let_orbax_v1_save
AFTER_IMPORT["flax", "nnx"] = _let_variables_decode


def lift(params: Tree, dtype: DTypeLike | None = None) -> Tree:
    """Makes each :class:`QuantizedArray` of a tree a leaf that has derivatives.

    To ``jax.grad``, ``optax`` and ``flax`` such a leaf is an array of floats: it has
    the shape and dtype of the decoded weights, its gradients are floats, and operations
    decode it. Models and trainers need no change. Their user changes two lines: lift
    the parameters, and wrap the optimizer in :func:`optimizer`.

    The lifted codes share their buffers with the codes in ``params``.

    Args:
      params: tree with :class:`QuantizedArray`, as from
        :func:`madax.quantize_params`, a state of ``flax.nnx``, or a module.
      dtype: floating dtype of decoded codes and of their gradients; None for the dtype
        of each leaf. Other leaves are not cast.

    Returns:
      The tree, or a new module, with lifted codes.

    Raises:
      ValueError: if there are no codes in ``params``.
      TypeError: if ``dtype`` is not floating.

    Example:
      >>> import jax, jax.numpy as jnp, optax, madax
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
      >>> params = madax.quantize_params(params, madax.SymlogFormat(bits=8))
      >>> params = madax.hijax.lift(params)
      >>> tx = madax.hijax.optimizer(madax.madam(0.05))
      >>> state = tx.init(params)
      >>> def loss(params):
      ...     return jnp.sum((params["kernel"] + params["bias"] - 2) ** 2)
      >>> for _ in range(30):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params['kernel'].codes.dtype} {loss(params):.1f}")
      int8 0.0
    """
    check_float_dtype(dtype)
    notice_imports()
    tree, merge = split_module(params)
    new = jax.tree.map(
        lambda w: lift_array(w, dtype or w.value_dtype) if is_quantized(w) else w,
        tree,
        is_leaf=is_quantized,
    )
    if not any(map(is_lifted, jax.tree.leaves(new))):
        raise ValueError(
            "params hold no codes to lift; call madax.quantize_params(params, format) "
            "first."
        )
    return merge(new)


def lower(params: Tree) -> Tree:
    """Turns lifted codes back into :class:`QuantizedArray`, on the same buffers.

    The rest of madax takes these: :func:`madax.value_and_grad`,
    :func:`madax.dequantize_params`, :func:`madax.to_flat_dict`, ``madax.diagnostics``,
    ``jax.shard_map``, and ``jax.device_put``.

    Args:
      params: tree, state or module with lifted codes.

    Returns:
      The tree, or a new module, without lifted codes.

    Raises:
      TypeError: if it is called on codes that are being differentiated.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> w = madax.quantize_params(jnp.ones((4, 4)), madax.UniformFormat(bits=8))
      >>> print(madax.hijax.lower(madax.hijax.lift(w)))
      QuantizedArray(shape=(4, 4), scale=3, UniformFormat(bits=8))
    """
    return _mapped(lower_array, params)


def decode(params: Tree) -> Tree:
    """Decodes lifted codes to floats, with derivatives.

    Lifted codes decode themselves in operators, methods, indexing, ``jnp`` functions
    and layers of Flax. ``jax.lax`` functions refuse them, and so do layers that call
    ``jax.lax`` directly, such as the convolutions of Haiku and Equinox. A loss of
    decoded parameters works with all of them:

    .. code-block:: python

        loss = lambda params, x: their_loss(madax.hijax.decode(params), x)

    The gradients are the same. All weights are in floats at once, unless the compiler
    moves the decoding to where a weight is used.

    Args:
      params: tree, state or module with lifted codes.

    Returns:
      The tree, or a new module, with arrays of floats.

    Example:
      >>> import jax, jax.numpy as jnp, madax
      >>> w = madax.quantize_params(jnp.ones((4, 4)), madax.UniformFormat(bits=8))
      >>> w = madax.hijax.lift(w)
      >>> def loss(w):
      ...     return jax.lax.integer_pow(madax.hijax.decode(w), 2).sum() / 2
      >>> print(bool(jnp.all(jax.grad(loss)(w) == madax.hijax.decode(w))))
      True
    """
    return _mapped(decode_array, params)


def put(params: Tree, shardings: Tree) -> Tree:
    """``jax.device_put`` for trees with codes, lifted or not.

    Codes are placed like an array of their shape. Their scale is sharded along the axes
    where it has several values, and replicated along the others.

    Args:
      params: tree of arrays, lifted codes and :class:`QuantizedArray`.
      shardings: a sharding or a device for all leaves, or a tree of them with the
        structure of ``params`` or a prefix of it; codes are one leaf.

    Returns:
      The tree on those devices.

    Example:
      >>> import jax, jax.numpy as jnp, madax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> w = madax.quantize_params(jnp.ones((4, 4)), madax.UniformFormat(bits=8))
      >>> w = madax.hijax.put(madax.hijax.lift(w), NamedSharding(mesh, P("data")))
      >>> print(w.sharding.spec == P("data"))
      True
    """

    def place(w, on):
        if is_lifted(w):
            return lift_array(place(lower_array(w), on), w.dtype)
        if not is_quantized(w):
            return jax.device_put(w, on)
        scale = jax.device_put(w.scale, of_scale(on, w.scale))
        return w.like(jax.device_put(w.codes, on), scale)

    whole = jax.tree.map(lambda _: 0, params, is_leaf=is_quantized)
    shardings = jax.tree.broadcast(shardings, whole)
    return jax.tree.map(place, params, shardings, is_leaf=is_quantized)


def optimizer(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer of codes train lifted codes.

    ``tx`` sees each lifted leaf as a :class:`QuantizedArray`, and so takes the same
    steps, to the bit. The update of a lifted leaf is an int32 array of code steps, of
    the shape of the leaf. ``optax.apply_updates``, ``equinox.apply_updates`` or ``p +
    u`` adds it.

    Transforms of gradients (clipping, noise, accumulation by ``optax.MultiSteps``) may
    go before it, around it or inside ``tx``. No transform that turns its updates into
    floats may follow it: adding floats to lifted codes in ``apply_updates`` is an
    error.

    Args:
      tx: :func:`madax.muon`, :func:`madax.madam`, any other optimizer within
        :func:`madax.with_quantized_params`, or a chain with one of them.

    Returns:
      An optimizer for trees with lifted codes.

    Raises:
      TypeError: if ``tx`` is not an optimizer, or, when called, its updates of codes
        are floats, or a gradient is missing.
      ValueError: when called, if ``params`` hold no codes.

    Example:
      >>> import optax, madax
      >>> tx = madax.hijax.optimizer(
      ...     madax.with_quantized_params(optax.adamw(1e-3, weight_decay=0.1))
      ... )
      >>> tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), tx), 4)
    """
    check_transformation("tx", tx)
    inner = optax.with_extra_args_support(tx)

    def init_fn(params):
        _check_codes(params)
        return inner.init(lower(params))

    def update_fn(updates, state, params: Tree = None, **extra_args):
        _check_all_there(updates, params)
        _check_codes(params)
        # Outside jit, the result of a plain p + u is still a _Stepped node.
        params = jax.tree.map(lambda w: w, params)
        updates, state = inner.update(updates, state, lower(params), **extra_args)
        paths, leaves, treedef = flatten_named(params)
        us = treedef.flatten_up_to(updates)
        steps = [
            _steps(path, u) if is_lifted(p) else u
            for path, p, u in zip(paths, leaves, us, strict=True)
        ]
        return treedef.unflatten(steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_codes(params: Tree) -> None:
    leaves = jax.tree.leaves(params, is_leaf=_is_code_or_masked)
    if leaves and not any(is_lifted(x) or _is_code_or_masked(x) for x in leaves):
        raise ValueError(
            "params hold no lifted codes; pass those that madax.hijax.lift returned, "
            "to a filter of arrays also."
        )


def _is_code_or_masked(x: object) -> bool:
    return isinstance(x, (QuantizedArray, optax.MaskedNode))


def _mapped(function: Callable, params: Tree) -> Tree:
    tree, merge = split_module(params)
    return merge(jax.tree.map(lambda w: function(w) if is_lifted(w) else w, tree))


def _steps(path: str, u: Tree) -> jax.Array:
    """Returns the update of lifted codes."""
    if not is_quantized(u):
        raise TypeError(
            f"{leaf_name('updates', path)} is {jnp.result_type(u)}, but the leaf is "
            "codes, which take steps; wrap the optimizer in "
            "madax.with_quantized_params, inside madax.hijax.optimizer."
        )
    return u.codes


def _check_all_there(updates: Tree, params: Tree) -> None:
    missing = [
        sum(x is None for x in jax.tree.leaves(tree, is_leaf=lambda x: x is None))
        for tree in (updates, params)
    ]
    if missing[0] > missing[1]:
        raise TypeError(
            "a gradient is None where params have a leaf; differentiate with respect "
            "to all of params, and import Equinox before madax.hijax.lift is called, "
            "or its filters take traced codes for no arrays."
        )
