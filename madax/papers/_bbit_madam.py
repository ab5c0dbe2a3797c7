"""B-bit Madam: weights on a grid of log-spaced magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_bits, check_learning_rate
from madax._core.moved import by_name
from madax.formats._log import LogFormat
from madax.optimizers._chain import map_rate
from madax.papers._grid import grid_madam
from madax.transforms._second_moment import second_moment


@by_name("bits", base_precision="write base_step")
def bbit_madam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    *,
    bits: int = 12,
    base_step: float = 0.001,
    b2: ArrayLike = 0.999,
    p_scale: ArrayLike | None = None,
    g_bound: ArrayLike = 10.0,
    zero_init_scale: ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""B-bit Madam: Madam on a grid of log-spaced weights, with nearest rounding.

    .. math::

      |w| &= w_\text{max}\, e^{-n \beta}, \qquad
        n \in \{0, \dots, 2^B - 2\} \\
      n &\leftarrow n + \mathrm{round}(k\, \mathrm{clip}(g / \sqrt{\hat v},
        \pm g_\text{bound}))\, \mathrm{sign}(w), \qquad k = \eta / \beta

    with the max magnitude :math:`w_\text{max}` of the grid, its spacing :math:`\beta`,
    which the paper calls base precision, and the rate :math:`k` a whole number of
    codes, 1 at least: the rates of a schedule are rounded to whole codes.

    Float leaves stay float arrays, whose values are on the grid from the first step on.
    To store codes, use ``quantize_params(params, LogFormat(bits + 1, base_step))``: the
    extra bit is the sign. The paper has one magnitude more, because its codes have no
    zero, and starts from random magnitudes, where this starts from the nearest.

    Args:
      learning_rate: :math:`\eta`, in nats per step, or a schedule.
      bits: :math:`B`, bits of a magnitude; the sign is one more. 1 to 15.
      base_step: :math:`\beta`, spacing of the grid, in nats.
      b2: as for :func:`madax.madam`.
      p_scale: scale of the grid, as for :func:`quantize_to_grid`.
      g_bound: as for :func:`madax.madam`.
      zero_init_scale: as for :func:`madax.madam`.

    Returns:
      The optimizer, a gradient transformation.

    Raises:
      ValueError, TypeError: as :func:`madax.madam`.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> w = jnp.array([[1.0, -2.0]])
      >>> tx = madax.papers.bbit_madam(learning_rate=0.01, bits=12, base_step=0.001)
      >>> updates, _ = tx.update(jnp.array([[5.0, 5.0]]), tx.init(w), w)
      >>> print(jnp.log(optax.apply_updates(w, updates) / w).round(3))
      [[-0.01  0.01]]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Section 5.
    """
    learning_rate = check_learning_rate(learning_rate, 0.01)
    check_bits(bits, 1, 15, "with the sign, a code has 16 bits at most")
    format = LogFormat(bits + 1, base_step)

    def whole_codes(rate):
        # jnp would initialise the backend before users call
        # jax.distributed.initialize.
        xp = jnp if isinstance(rate, jax.Array) else np
        codes = xp.maximum(xp.round(xp.abs(rate) / base_step), 1)
        rate = xp.sign(rate) * base_step * codes
        return rate if xp is jnp else float(rate)

    return grid_madam(
        map_rate(whole_codes, learning_rate),
        format,
        second_moment(b2),
        p_scale=p_scale,
        g_bound=g_bound,
        zero_init_scale=zero_init_scale,
        alias=bbit_madam,
    )
