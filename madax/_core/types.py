"""Words for types that JAX and NumPy have no word for."""

from typing import Any

# A pytree: of arrays, of their shapes, or a state. Type checkers cannot tell what is
# in it, and optax's aliases (``optax.Params``) name a type that
# ``typing.get_type_hints`` does not find, so public functions cannot have them.
Tree = Any
