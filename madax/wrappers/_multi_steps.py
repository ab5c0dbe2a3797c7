"""Accumulation of gradients in front of an optimizer that trains codes."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_state, check_transformation, type_error
from madax._core.names import Tree
from madax.codes._array import is_quantized
from madax.codes._leaves import flatten_both, widened_for_codes, zeros_like
from madax.codes._steps import as_steps


def multi_steps(
    inner: optax.GradientTransformation,
    every_k_schedule: int | Callable[[ArrayLike], ArrayLike],
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``optax.MultiSteps`` for parameters of which some, or all, are codes.

    It accumulates gradients, in a float32 array for each leaf of codes. Every ``k``
    steps ``inner`` gets their mean, and its steps of codes are returned unchanged; in
    the other steps the update is zero. ``optax.MultiSteps`` itself would make its
    accumulator of codes, which is an error.

    Args:
      inner: an optimizer that trains codes natively, such as :func:`muon_madam`, or
        within :func:`with_quantized_params`.
      every_k_schedule: ``k``, or a function of the number of steps of ``inner``.
      use_grad_mean: whether ``inner`` gets the mean of gradients, or their sum.
      should_skip_update_fn: as for ``optax.MultiSteps``, such as
        ``optax.skip_not_finite``.

    Returns:
      An optimizer whose state is an ``optax.MultiStepsState``.

    Raises:
      ValueError: if ``every_k_schedule`` is less than 1; when called, if ``params`` are
        missing or do not match.
      TypeError: if ``inner`` is not an optimizer, ``every_k_schedule`` is neither an
        int nor a function, or the state is of another optimizer.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> params = madax.quantize_params(jnp.ones((4, 4)), madax.SymlogFormat(bits=8))
      >>> tx = madax.wrappers.multi_steps(madax.madam(0.1), 2)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jnp.ones((4, 4)), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{state.gradient_step} {params.dequantize().mean():.1f}")
      0 1.0
      1 0.9
      1 0.9
      2 0.7
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    if not callable(every_k_schedule):
        every_k_schedule = _checked(every_k_schedule)

    def accumulated(init_fn: optax.TransformInitFn) -> optax.MultiSteps:
        # optax.MultiSteps computes with updates, so updates of codes become arrays.
        def update_fn(updates, state, params=None, **extra_args):
            updates, state = inner.update(updates, state, params, **extra_args)
            return _arrays(updates), state

        tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
        return optax.MultiSteps(
            tx, every_k_schedule, use_grad_mean, should_skip_update_fn
        )

    def init_fn(params):
        # inner must see codes, but MultiSteps makes its accumulator like this tree.
        like_gradients = jax.tree.map(
            lambda w: zeros_like(w) if is_quantized(w) else w,
            params,
            is_leaf=is_quantized,
        )
        state = inner.init(params)
        return accumulated(lambda params: state).init(like_gradients)

    def update_fn(updates, state, params: Tree = None, **extra_args):
        check_state(state, optax.MultiStepsState)
        _, ws, gs, treedef = flatten_both(params, updates)
        updates, state = accumulated(inner.init).update(
            treedef.unflatten(widened_for_codes(ws, gs)), state, params, **extra_args
        )
        # optax multiplies what does not count by 0, which keeps an element that is not
        # finite.
        is_empty = state.mini_step == 0
        sums = jax.tree.map(lambda x: jnp.where(is_empty, 0, x), state.acc_grads)
        state = state._replace(acc_grads=sums)
        us = treedef.flatten_up_to(updates)
        us = [jnp.where(is_empty, u, 0) for u in us]
        return treedef.unflatten(map(as_steps, ws, us)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(every_k_schedule: int) -> int:
    """Returns a number of steps as a Python int; raises unless it is 1 or more."""
    remedy = "pass the number of gradients in a step, or a function that returns it"
    try:
        k = operator.index(every_k_schedule)
    except TypeError as error:
        name, wanted = "every_k_schedule", "an int or a function"
        raise type_error(name, wanted, every_k_schedule, remedy) from error
    if k < 1:
        raise ValueError(f"every_k_schedule must be 1 or more, got {k}; {remedy}.")
    return k


def _arrays(updates: Tree) -> Tree:
    # Steps are exact in float32. Before 0.2.7 optax cast gradients to the dtype of
    # updates.
    return jax.tree.map(
        lambda u: u.codes.astype(jnp.float32) if is_quantized(u) else u,
        updates,
        is_leaf=is_quantized,
    )
