"""Lets a direction of optax compute with the values of codes."""

import optax

from madax._core.checks import check_transformation
from madax.codes._leaves import flatten_both, widened_for_codes
from madax.codes._quantize import decoded


def with_dequantized_params(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives a transform the values of parameters instead of codes.

    The inner transform gets and returns floats. So any direction of optax, or a
    partition of several, may stand before :func:`scale_by_sign_log` and
    :func:`lns_quantize`, and train codes natively. Without this wrapper its state would
    be made of codes.

    Args:
      inner: a gradient transformation of gradients to gradients.

    Returns:
      The transformation for trees that mix arrays and :class:`QuantizedArray`.

    Raises:
      TypeError: if ``inner`` is not a gradient transformation.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> adam = madax.transforms.with_dequantized_params(optax.adam(0.1))
      >>> tx = optax.chain(adam, madax.scale_by_sign_log(), madax.lns_quantize())
      >>> w = madax.quantize_params(jnp.ones((4, 4)), madax.LogFormat(8))
      >>> updates, state = tx.update(jnp.ones((4, 4)), tx.init(w), w)
      >>> bool(jnp.all(optax.apply_updates(w, updates) < w))
      True
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return inner.init(decoded(params))

    def update_fn(updates, state, params=None, **extra_args):
        if params is not None:
            _, ws, gs, treedef = flatten_both(params, updates)
            updates = treedef.unflatten(widened_for_codes(ws, gs))
            params = decoded(params)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
