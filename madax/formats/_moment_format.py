"""Storage: the format of the optimizer's moments, small floats."""

import dataclasses

import jax.numpy as jnp

from madax._core.checks import check_bits


@dataclasses.dataclass(frozen=True)
class MomentFormat:
    r"""How moments are stored: as codes of ``bits`` bits, stochastically rounded.

    A code is a small float: some bits count octaves, which are powers of two, and the
    others are binary digits. The octaves follow the values of each leaf, so gradients
    of any scale are stored alike.

    :func:`with_quantized_state` stores the moments of any optimizer; its page says how.
    :func:`scale_by_second_moment`, and with it :func:`madam`, has a grid of its own:

    - A second moment ``nu`` has 64 octaves and no sign; a first moment ``mu`` has a
      sign and 32 octaves, which is the same range of gradients. The other bits are
      digits: two of them in 8 bits.
    - The octaves follow the max of ``nu`` in each leaf, up and down. They are moved in
      each of the first 8 steps, and in every 8th step after that. An element whose
      ``nu`` jumps above them, as by a gradient of 700 times the max of its leaf, is
      skipped until they have followed, like an element that is not finite. With a decay
      rate below 0.75 the octaves are moved in every step, and only elements that are
      not finite are skipped.
    - The decay of ``nu`` is exact. It goes into a scale that all leaves share, so
      ``nu`` is rounded only where a gradient adds to it.
    - No element is trapped at zero. The min code of ``nu`` is a number below the
      octaves, which stands for what gradients of up to 1e-8 of the max leave. An
      element that has had no gradient has this code, too, and does not move.
    - After many steps, rounding has given ``nu`` a relative variance of about
      :math:`0.36 / 2^{b}`, with :math:`b = \text{bits} - 6` digits, for any decay rate
      near 1. That would make :math:`1/\sqrt\nu` too large on average, by 3.4 % for 8
      bits, and is divided out.

    Attributes:
      bits: width of a code, 8 to 16; 8 takes one byte per moment, more takes two.
      octaves: the number of octaves of a moment with a sign: 2, 4, 8, 16 or 32. Half as
        many leave one more digit. With None the optimizer chooses: 8 for the momentum
        of :func:`muon_madam`, 32 elsewhere.

    Raises:
      ValueError: if ``bits`` or ``octaves`` is out of range.
      TypeError: if ``bits`` is not an int.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.madam(moment_format=madax.MomentFormat(bits=8))
      >>> print(tx.init(jnp.ones(1000))[0].v.nbytes)
      1000
    """

    bits: int = 8
    octaves: int | None = None

    def __post_init__(self) -> None:
        beyond = "narrower moments would have less than two binary digits"
        check_bits(self.bits, 8, 16, beyond)
        if self.octaves is not None and (
            type(self.octaves) is not int or self.octaves not in (2, 4, 8, 16, 32)
        ):
            raise ValueError(
                f"octaves must be 2, 4, 8, 16, 32 or None, got {self.octaves!r}."
            )

    def __repr__(self) -> str:
        octaves = "" if self.octaves is None else f", octaves={self.octaves}"
        return f"MomentFormat(bits={self.bits}{octaves})"

    @property
    def dtype(self) -> jnp.dtype:
        """The integer dtype of codes without a sign of their own: uint8 or uint16."""
        return jnp.dtype(jnp.uint8 if self.bits == 8 else jnp.uint16)
