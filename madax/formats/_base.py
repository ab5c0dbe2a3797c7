"""The base class of number formats: grids of signed integer codes.

Formats map values in [-1, 1], relative to the scale, to codes in [-levels, levels]. The
map is odd and monotone, and code 0 is exactly zero. Formats know nothing about
rounding, trees or optimizers.
"""

import ast
import dataclasses
from abc import ABC, abstractmethod

import jax
import jax.numpy as jnp

from madax._core.checks import check_bits


def check_format_bits(bits: object, min: int = 2) -> None:
    """Raises unless codes of a format may have this number of bits."""
    reason = (
        "wider codes would be finer than the float32 they are decoded to, narrower "
        "ones have too few levels"
    )
    check_bits(bits, min, 16, reason)


def levels_of(bits: int) -> int:
    """The number of codes of each sign."""
    return 2 ** (bits - 1) - 1


@dataclasses.dataclass(frozen=True)
class Format(ABC):
    """A grid of ``2 * levels + 1`` codes; the base of all number formats.

    Attributes:
      bits: width of a code, sign included.
    """

    bits: int

    # The integer dtype of a step between two codes; no field, as it has no annotation.
    step_dtype = jnp.dtype(jnp.int32)
    # Whether log-steps move a code of zero; no field, either.
    moves_zeros = True

    def __post_init__(self) -> None:
        check_format_bits(self.bits)

    @property
    def levels(self) -> int:
        """Number of codes of each sign, ``2**(bits-1) - 1``."""
        return levels_of(self.bits)

    @property
    def storage_dtype(self) -> jnp.dtype:
        """The dtype that holds a code, int8 or int16."""
        return jnp.dtype(jnp.int8 if self.bits <= 8 else jnp.int16)

    @property
    @abstractmethod
    def dynamic_range(self) -> float:
        """Ratio of the max to the min non-zero magnitude."""

    @property
    def is_coarse(self) -> bool:
        """Whether neighbouring spacings of values differ by more than a half."""
        return getattr(self, "base_step", 0.0) > 0.5

    @abstractmethod
    def encode(self, x: jax.Array) -> jax.Array:
        """The real-valued code of a value relative to the scale."""

    @abstractmethod
    def decode(self, code: jax.Array) -> jax.Array:
        """The value of a code, relative to the scale, float32.

        The result is not a plain product with a constant: XLA would multiply the
        constant by the scale first, and flush a subnormal result to zero.
        """

    @abstractmethod
    def log_step(self, code: jax.Array, d: jax.Array) -> jax.Array:
        """The real-valued codes of a log-step of ``d`` nats; keeps NaN and infinity."""

    @abstractmethod
    def relative_step(self, code: jax.Array) -> jax.Array:
        """The log-step that grows a value by a small fraction, over that fraction.

        It is the value over its derivative by the log-step, in [-1, 1]; float32.
        """

    @abstractmethod
    def add_step(self, code: jax.Array, u: jax.Array) -> jax.Array:
        """The real-valued codes of adding ``u``, relative to the scale.

        It is ``encode(decode(code) + u) - code``, but also accurate for small ``u``.
        """

    @abstractmethod
    def curvature(self, code: jax.Array) -> jax.Array:
        """The relative change of the spacing of values per code; float32.

        It is the second derivative of the value with respect to the code, over the
        first.
        """

    def nearest(self, x: jax.Array) -> jax.Array:
        """The codes nearest to values relative to the scale; float32, NaN for NaN."""
        return self.saturate(jnp.round(self.encode(x)), jnp.sign(x))

    def saturate(self, code: jax.Array, sign: jax.Array) -> jax.Array:
        """Clamps an integer to the codes in range, for a value of that sign."""
        del sign
        return jnp.clip(code, -self.levels, self.levels)


def parse_format(text: str) -> Format:
    """The number format that prints as ``text``.

    Raises:
      ValueError: if there is no such format.
    """
    kinds = {kind.__name__: kind for kind in Format.__subclasses__()}
    name, _, fields = text.removesuffix(")").partition("(")
    try:
        pairs = (field.split("=") for field in fields.split(", "))
        return kinds[name](**{key: ast.literal_eval(value) for key, value in pairs})
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{text!r} is not a number format of this version of madax, which has "
            f"{', '.join(kinds)}; use the version that wrote it."
        ) from error
