"""Gradients of a loss with respect to parameters of which some are codes."""

import operator
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from madax.codes._array import is_quantized
from madax.codes._leaves import zeros_like
from madax.codes._probes import ProbedArray


def value_and_grad(
    fun: Callable[..., Any],
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    dtype: Any = jnp.float32,
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` for parameters of which some, or all, are codes.

    In the gradients, an array of its shape takes the place of a
    :class:`QuantizedArray`: the gradient with respect to the decoded weights. Nothing
    is decoded beforehand: ``fun`` gets the codes, and each weight is decoded where it
    is used. So a block under ``jax.checkpoint``, or the body of a scan over stacked
    layers, has its own weights in floats, and no others.

    An argument may be a ``flax.nnx.Module``, or a tree of them; then this is
    ``nnx.value_and_grad``. Gradients are with respect to the ``nnx.Param`` of those
    that ``argnums`` names, as an ``nnx.State`` for ``nnx.Optimizer``, and what ``fun``
    changes in any module (statistics, random number counters) is changed there.

    Args:
      fun: function of which the first result is a real scalar.
      argnums: which positional arguments to differentiate with respect to, an int or a
        sequence of them; for modules also ``nnx.DiffState``, to choose the variables.
      has_aux: whether ``fun`` returns a pair of the value and something else.
      dtype: floating dtype that codes are decoded to, and of the gradients of codes.

    Returns:
      A function of the arguments of ``fun`` that returns the value, or the pair, and
      the gradients: a tree like the argument, or a tuple of them if ``argnums`` is a
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
    if not callable(fun):
        raise TypeError(
            f"fun must be a function, got {fun!r} of type {type(fun).__name__}; pass "
            "the loss, not its value."
        )
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be a floating dtype, got {dtype!r}; pass jnp.float32 or "
            "jnp.bfloat16."
        )

    @wraps(fun)
    def value_and_grad_fun(*args, **kwargs):
        chosen = argnums if isinstance(argnums, Sequence) else (argnums,)
        if _holds_modules((args, kwargs)):
            from madax.codes._flax import differentiate
        else:
            differentiate = _differentiate
        value, grads = differentiate(fun, chosen, has_aux, dtype, args, kwargs)
        return value, grads if isinstance(argnums, Sequence) else grads[0]

    return value_and_grad_fun


def grad(
    fun: Callable[..., Any],
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    dtype: Any = jnp.float32,
) -> Callable[..., Any]:
    """``jax.grad`` for parameters of which some, or all, are codes.

    The gradients of :func:`value_and_grad`, with the same arguments and errors.

    Args:
      fun: function of which the first result is a real scalar.
      argnums: which positional arguments to differentiate with respect to.
      has_aux: whether ``fun`` returns a pair of the value and something else.
      dtype: floating dtype that codes are decoded to, and of the gradients of codes.

    Returns:
      A function of the arguments of ``fun`` that returns the gradients; with
      ``has_aux`` a pair of them and the something else.

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


def _differentiate(fun, argnums, has_aux, dtype, args, kwargs):
    """The value and gradients of a function of pytrees."""
    positions = [position(i, args) for i in argnums]
    chosen = tuple(args[i] for i in positions)
    weights, treedef = jax.tree.flatten(chosen, is_leaf=is_quantized)

    def loss(floats):
        given = list(args)
        arrays = treedef.unflatten(probed(weights, floats))
        for i, array in zip(positions, arrays, strict=True):
            given[i] = array
        return without_probes(fun(*given, **kwargs), weights)

    gradient = jax.value_and_grad(loss, has_aux=has_aux)
    with about_rules():
        value, grads = gradient(differentiable(weights, dtype))
    return value, treedef.unflatten(grads)


@contextmanager
def about_rules() -> Generator[None]:
    """Says what to do where a ``jax.custom_vjp`` got codes.

    Its rule returns a derivative for one array, and JAX wants one for codes and scale.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if "custom vjp" not in str(error).lower():
            raise
        raise TypeError(
            "a function with a jax.custom_vjp got codes, for which its rule has no "
            "derivative; pass the array that they decode to, w[...]."
        ) from error


def position(argnum: Any, args: Sequence[Any]) -> int:
    """The place of an argument, counted from the end if negative."""
    i = operator.index(argnum)
    if not -len(args) <= i < len(args):
        raise ValueError(
            f"argnums names argument {i}, but {len(args)} positional arguments were "
            "passed; pass what is to be differentiated by position."
        )
    return i % len(args)


def differentiable(weights: Sequence[Any], dtype: Any) -> list[Any]:
    """The leaves, with a probe of zeros in the place of every QuantizedArray."""
    return [zeros_like(w, dtype) if is_quantized(w) else w for w in weights]


def probed(weights: Sequence[Any], floats: Sequence[Any]) -> list[Any]:
    """The leaves as the loss gets them, of what they are differentiated with."""
    return [
        ProbedArray.of(w, x) if is_quantized(w) else x
        for w, x in zip(weights, floats, strict=True)
    ]


def without_probes(
    tree: Any, weights: Sequence[Any], is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """The results of a loss of ``weights``: codes, without the probes made here."""
    if any(isinstance(w, ProbedArray) for w in weights):
        return tree  # a loss within a loss
    return jax.tree.map(
        lambda x: x.without_probe() if isinstance(x, ProbedArray) else x,
        tree,
        is_leaf=lambda x: is_quantized(x) or (is_leaf is not None and is_leaf(x)),
    )


def _holds_modules(tree: Any) -> bool:
    """Whether there is a Flax nnx module, or a variable of one, in a tree."""
    if "flax.nnx" not in sys.modules:
        return False
    from madax.codes._flax import holds_modules

    return holds_modules(tree)
