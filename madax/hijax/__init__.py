"""Codes for training loops that call ``jax.grad`` and apply updates themselves.

.. warning::
   Experimental, like ``jax.experimental.hijax``, on which it is built. It needs JAX
   0.10.2 or newer, and is imported on first use.

``jax.grad`` has no derivatives for integers, so a trainer that calls it cannot train a
:class:`madax.QuantizedArray`. Lifted codes are a single leaf with a JAX type of its
own: its values are codes, and its tangents are floats. To a trainer the leaf is a
floating array with float gradients. The leaf takes one or two bytes per weight, and is
decoded where it is used.
"""

from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from madax.hijax._trees import decode, lift, lower, optimizer, put

__all__ = ["decode", "lift", "lower", "optimizer", "put"]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # With __getattr__, a type checker would accept any name.

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'madax.hijax' has no attribute {name!r}")
        if jax.__version_info__ < (0, 10, 2):
            raise ImportError(
                "madax.hijax needs jax.experimental.hijax of JAX 0.10.2 or newer, but "
                f"this is JAX {jax.__version__}; update JAX, or use "
                "madax.value_and_grad in a training loop of your own."
            )
        from madax.hijax import _trees

        return getattr(_trees, name)
