"""LNS-Madam: weights on a multi-base logarithmic grid."""

import math

import optax
from jax.typing import ArrayLike

from madax._core.checks import check_format, check_learning_rate
from madax._core.moved import by_name
from madax.formats._base import Format
from madax.formats._log import LogFormat
from madax.optimizers._chain import map_rate
from madax.papers._grid import grid_madam
from madax.transforms._second_moment import second_moment

_UPDATE_GRID = LogFormat.from_gamma(bits=16, gamma=2048)


@by_name("format", "b2", "p_scale", "g_bound")
def lns_madam(
    learning_rate: optax.ScalarOrSchedule = 2**-7,
    *,
    format: Format = _UPDATE_GRID,
    b2: ArrayLike = 0.999,
    p_scale: ArrayLike | None = None,
    g_bound: ArrayLike = 10.0,
    zero_init_scale: ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""LNS-Madam: Madam in base 2, its weights kept on a multi-base log grid.

    .. math::

      \log_2 |w| \leftarrow Q_U\bigl(\log_2 |w| - \eta\,
        \mathrm{clip}(g / \sqrt{\hat v}, \pm g_\text{bound})\,
        \mathrm{sign}(w)\bigr)

    with the grid :math:`Q_U` of ``format`` and nearest rounding. The paper's
    forward and backward passes run on a coarser grid: put :func:`fake_quantize`
    with ``LogFormat.from_gamma(bits=8, gamma=8)`` into the network.

    Args:
      learning_rate: :math:`\eta`, in octaves (factors of 2) per step, or a schedule.
      format: the grid of the weight update :math:`Q_U`; by default
        ``LogFormat.from_gamma(bits=16, gamma=2048)``.
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
      >>> tx = madax.papers.lns_madam(learning_rate=0.5)
      >>> updates, _ = tx.update(jnp.array([[5.0, 5.0]]), tx.init(w), w)
      >>> print(jnp.log2(optax.apply_updates(w, updates) / w).round(2))
      [[-0.5  0.5]]

    References:
      Zhao et al., `LNS-Madam: low-precision training in logarithmic number system
      using multiplicative weight update <https://arxiv.org/abs/2106.13914>`_, 2022,
      Algorithm 1.
    """
    learning_rate = check_learning_rate(learning_rate, 2**-7)
    check_format("format", format, Format, or_none=False)
    return grid_madam(
        # The two factors become one, because XLA may or may not merge two: that depends
        # on how an array is sharded.
        map_rate(lambda octaves: math.log(2) * octaves, learning_rate),
        format,
        second_moment(b2),
        p_scale=p_scale,
        g_bound=g_bound,
        zero_init_scale=zero_init_scale,
        alias=lns_madam,
    )
