"""What is static of an array of codes, and the dtypes that its parts may have."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from madax.formats._base import Format, parse_format


class Kind(NamedTuple):
    """What is static of codes: their format, and the dtype that they decode to.

    In text it is the format, after the dtype if it is another than float32.
    """

    format: Format
    value_dtype: jnp.dtype

    def __str__(self) -> str:
        if self.value_dtype == jnp.float32:
            return repr(self.format)
        return f"{self.value_dtype.name}:{self.format!r}"

    @classmethod
    def parse(cls, text: str) -> "Kind":
        """The kind that prints as ``text``; raises as :func:`parse_format`."""
        dtype, _, format = text.rpartition(":")
        return cls(parse_format(format), jnp.dtype(dtype or jnp.float32))

    def has_dtypes(self, codes: object, scale: object) -> bool:
        """Whether these are the dtypes of an array of codes, or of steps of codes.

        True also where there are no arrays of numbers, but masks, shapes or shardings.
        """
        if not isinstance(codes, np.dtype) or not jnp.issubdtype(codes, np.number):
            return True
        if scale in (bool, np.bool_):
            return codes == self.format.step_dtype
        number = isinstance(scale, np.dtype) or scale in (int, float)
        return not number or (
            codes == self.format.storage_dtype and scale in (np.float32, float)
        )
