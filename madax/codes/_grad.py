"""Gradients of a loss with respect to parameters of which some are codes."""

import operator
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from madax._core.checks import check_float_dtype, check_function, type_error
from madax._core.names import Tree
from madax.codes._array import AFTER_IMPORT, is_quantized
from madax.codes._probes import probed, probes_of, without_probes
from madax.codes._residuals import value_and_gradient


def value_and_grad(
    fun: Callable[..., Any],
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    dtype: DTypeLike | None = None,
) -> Callable[..., tuple[Any, Tree]]:
    """``jax.value_and_grad`` for parameters of which some, or all, are codes.

    The gradient of a :class:`QuantizedArray` is a float array of its shape: the
    gradient with respect to the decoded weights. ``fun`` gets the codes, and each
    weight is decoded where ``fun`` uses it. So a block under ``jax.checkpoint``, or the
    body of a scan over stacked layers, holds no weights in floats except its own. Under
    jit the backward pass decodes weights again instead of keeping them in floats,
    except those that a scan decodes, unless the body of the scan is under
    ``jax.checkpoint``.

    An argument may be a ``flax.nnx.Module``, or a tree of modules; then this is
    ``nnx.value_and_grad``. Gradients are with respect to the ``nnx.Param`` of the
    modules that ``argnums`` names, as an ``nnx.State`` for ``nnx.Optimizer``. Other
    changes that ``fun`` makes to any module (statistics, counts of random numbers) are
    kept.

    In a module of Equinox, leaves other than codes and floating arrays, such as
    functions, have the gradient None, as in ``equinox.filter_value_and_grad``. So have
    functions and strings in other trees.

    Args:
      fun: function of which the first result is a real scalar.
      argnums: which positional arguments to differentiate with respect to, an int or a
        sequence of ints; for modules also ``nnx.DiffState``, to choose the variables.
      has_aux: whether ``fun`` returns a pair of the value and auxiliary data.
      dtype: floating dtype of decoded codes and of their gradients; None for the dtype
        of each leaf. Other leaves are not cast.

    Returns:
      A function of the arguments of ``fun`` that returns the value, or the pair, and
      the gradients: a tree like the argument, or a tuple of trees if ``argnums`` is a
      sequence.

    Raises:
      TypeError: if ``fun`` is not a function, ``dtype`` is not floating, or, when
        called, a leaf to differentiate with respect to is neither codes nor floating.
      ValueError: when called, if there is no such argument.

    Example:
      >>> import jax, jax.numpy as jnp, madax
      >>> fmt = madax.SymlogFormat(bits=8, linear_range=1 / 3)
      >>> kernel = jax.random.normal(jax.random.key(0), (4, 4))
      >>> params = madax.quantize_params({"kernel": kernel, "bias": jnp.ones(4)}, fmt)
      >>> def loss(params, x):
      ...     return jnp.sum((x @ params["kernel"] + params["bias"]) ** 2)
      >>> value, grads = jax.jit(madax.value_and_grad(loss))(params, jnp.ones(4))
      >>> decoded = madax.dequantize_params(params)
      >>> expected = jax.grad(loss)(decoded, jnp.ones(4))
      >>> print(bool(jnp.allclose(grads["kernel"], expected["kernel"])))
      True
    """
    check_function("fun", fun, "pass the loss, not its value")
    check_float_dtype(dtype)

    @wraps(fun)
    def value_and_grad_fun(*args, **kwargs):
        wrt = argnums if isinstance(argnums, Sequence) else (argnums,)
        positions = [_position(getattr(a, "argnum", a), args) for a in wrt]
        differentiate = _differentiate
        if hasattr(sys.modules.get("flax.nnx"), "Variable"):
            from madax.codes import _flax

            if _flax.holds_modules((args, kwargs)):
                differentiate = _flax.differentiate
        try:
            value, grads = differentiate(
                fun, wrt, positions, has_aux, dtype, args, kwargs
            )
        except (TypeError, ValueError) as error:
            # The rule returns one derivative, but JAX expects one for the codes and one
            # for the scale.
            if "custom vjp" not in str(error).lower():
                raise
            raise TypeError(
                "a function with a jax.custom_vjp got codes, for which its rule has no "
                "derivative; pass the array that they decode to, w[...]."
            ) from error
        return value, grads if isinstance(argnums, Sequence) else grads[0]

    return value_and_grad_fun


def grad(
    fun: Callable[..., Any],
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    dtype: DTypeLike | None = None,
) -> Callable[..., Tree]:
    """``jax.grad`` for parameters of which some, or all, are codes.

    Returns the gradients of :func:`value_and_grad`, with its arguments and errors.

    Args:
      fun: function of which the first result is a real scalar.
      argnums: which positional arguments to differentiate with respect to.
      has_aux: whether ``fun`` returns a pair of the value and auxiliary data.
      dtype: floating dtype of decoded codes and of their gradients; None for the dtype
        of each leaf.

    Returns:
      A function of the arguments of ``fun`` that returns the gradients; with
      ``has_aux`` a pair of the gradients and the auxiliary data.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> w = madax.quantize_params(jnp.ones((4, 4)), madax.UniformFormat(bits=8))
      >>> print(madax.grad(lambda w: jnp.sum(3 * w))(w)[0])
      [3. 3. 3. 3.]
    """
    both = value_and_grad(fun, argnums, has_aux=has_aux, dtype=dtype)

    @wraps(fun)
    def grad_fun(*args, **kwargs):
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fun


def _differentiate(fun, wrt, positions, has_aux, dtype, args, kwargs):
    """Returns the value and gradients of a function of pytrees."""
    del wrt
    chosen = tuple(args[i] for i in positions)
    leaves, treedef = jax.tree.flatten(chosen, is_leaf=is_quantized)
    has_gradient = _of_equinox if _holds_equinox(chosen) else _is_numeric
    places = [i for i, leaf in enumerate(leaves) if has_gradient(leaf)]
    weights = [leaves[i] for i in places]

    def merged(new, others):
        new = dict(zip(places, new, strict=True))
        return treedef.unflatten([new.get(i, x) for i, x in enumerate(others)])

    def loss(probes):
        given = list(args)
        arrays = merged(probed(weights, probes), leaves)
        for i, array in zip(positions, arrays, strict=True):
            given[i] = array
        return without_probes(fun(*given, **kwargs), weights)

    value, grads = value_and_gradient(loss, probes_of(weights, dtype), has_aux)
    return value, merged(grads, [None] * len(leaves))


def _is_numeric(leaf: Tree) -> bool:
    """Returns whether a leaf goes to JAX, which decides if it has a gradient."""
    return (
        is_quantized(leaf)
        or isinstance(leaf, (int, float, complex))
        or hasattr(leaf, "dtype")
    )


def _of_equinox(leaf: Tree) -> bool:
    """Returns whether a leaf of an Equinox module is codes or floats."""
    is_array = isinstance(leaf, (jax.Array, np.ndarray))
    return is_quantized(leaf) or (is_array and jnp.issubdtype(leaf.dtype, jnp.inexact))


def _holds_equinox(tree: Tree) -> bool:
    """Returns whether a tree holds modules of Equinox."""
    module = getattr(sys.modules.get("equinox"), "Module", ())
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, module))
    return any(isinstance(x, module) for x in nodes)


def _position(argnum: int, args: Sequence[Tree]) -> int:
    """Returns the position of an argument, counted from the end if negative."""
    try:
        i = operator.index(argnum)
    except TypeError as error:
        remedy = "pass the positions of the arguments to differentiate"
        wanted = "an int or a sequence of ints"
        raise type_error("argnums", wanted, argnum, remedy) from error
    if not -len(args) <= i < len(args):
        raise ValueError(
            f"argnums names argument {i}, but {len(args)} positional arguments were "
            "passed; pass the arguments to differentiate by position."
        )
    return i % len(args)


def _decode_variables(variable: type) -> None:
    from madax.codes._flax import decode_variables

    decode_variables(variable)


AFTER_IMPORT["flax.nnx", "Variable"] = _decode_variables
