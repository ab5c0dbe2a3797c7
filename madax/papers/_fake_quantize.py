"""Simulated low precision in a network: values and gradients put on a grid."""

from functools import partial

import jax
import jax.numpy as jnp

from madax._core.checks import check_float_leaf, check_format
from madax._core.numerics import straight_through
from madax.codes._leaves import widen
from madax.formats._base import Format


def fake_quantize(
    x: jax.Array, format: Format | None, *, backward_format: Format | None = None
) -> jax.Array:
    r"""Rounds an array to the grid of a format, and its gradient to another grid.

    A straight-through quantiser: the forward pass rounds ``x`` to the nearest code
    of ``format``, with the max magnitude of the array as the scale; the
    backward pass treats that as the identity, and rounds the gradient likewise, to
    ``backward_format``. Applied to the weights, activations and outputs of a layer
    it simulates the low-precision matrix products of LNS-Madam. One value that is not
    finite has no scale, and makes all of the array, or of the gradient, NaN.

    Args:
      x: floating-point array, any shape.
      format: number format of the forward pass; None to leave values alone.
      backward_format: number format of the backward pass; None to leave gradients
        alone.

    Returns:
      The values on the grid, in the dtype of ``x``.

    Raises:
      TypeError: if ``x`` is not real floating, or a format is not a format.

    Example:
      >>> import jax, jax.numpy as jnp, madax
      >>> fmt = madax.LogFormat.from_gamma(bits=8, gamma=2)
      >>> print(madax.papers.fake_quantize(jnp.array([1.0, 0.26, 0.0]), fmt))
      [1.   0.25 0.  ]
      >>> print(jax.grad(lambda x: madax.papers.fake_quantize(x, fmt) ** 2)(0.7))
      1.4

    References:
      Zhao et al., `LNS-Madam: low-precision training in logarithmic number system
      using multiplicative weight update <https://arxiv.org/abs/2106.13914>`_, 2022,
      quantised forward and backward propagation.
    """
    check_float_leaf("x", "", x)
    check_format("format", format, Format)
    check_format("backward_format", backward_format, Format)
    x = jnp.asarray(x)
    on_grid = straight_through(x, _round_to_grid(x, format))
    is_free = backward_format is None
    return on_grid if is_free else _with_gradient_on_grid(backward_format, on_grid)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient_on_grid(format, x):
    return x


# The backward pass calls the function itself, so that it has a derivative, too.
_with_gradient_on_grid.defvjp(
    lambda format, x: (x, None),
    lambda format, residuals, g: (fake_quantize(g, format),),
)


def _round_to_grid(x: jax.Array, format: Format | None) -> jax.Array:
    if format is None:
        return x
    wide = widen(x)
    scale = jnp.max(jnp.abs(wide), initial=0)
    code = format.nearest(wide / jnp.where(scale > 0, scale, 1))
    return (scale * format.decode(code)).astype(x.dtype)
