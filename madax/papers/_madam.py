"""Madam as it was published."""

import optax
from jax.typing import ArrayLike

from madax.optimizers._chain import from_direction
from madax.transforms._second_moment import second_moment


def madam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    *,
    b2: ArrayLike = 0.999,
    p_scale: ArrayLike = 3.0,
    g_bound: ArrayLike = 10.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Madam to the letter: the rule and the constants of the paper.

    .. math::

      \nu &\leftarrow b_2 \nu + (1 - b_2) g^2, \qquad
        \hat g = \mathrm{clip}(g / \sqrt{\nu / (1 - b_2^t)}, \pm g_\text{bound}) \\
      w &\leftarrow \mathrm{clip}(w\, e^{-\eta\, \mathrm{sign}(w)\, \hat g},
        \pm p_\text{scale}\, \mathrm{rms}_0)

    Unlike :func:`madax.madam`, it bounds every leaf, vectors and gains included, and
    the first step clips weights beyond the bound; a weight of zero never moves, not
    even in a leaf that is all zeros at init; there is no first moment, floor, weight
    decay or format of moments; and rounding is to nearest. As in :func:`madax.madam`,
    and not as published, an element is skipped whose gradient is not finite, whose
    square overflows, or whose second moment underflows to zero.

    Args:
      learning_rate: :math:`\eta`, in nats per step, or a schedule; the authors decay
        it from 0.01.
      b2: decay rate of the second moment, in [0, 1).
      p_scale: bound on the weights of every float leaf, relative to its root mean
        square at init; the authors choose 1, 2 or 3. It does nothing on codes.
      g_bound: bound on the normalised gradient.

    Returns:
      The optimizer, a gradient transformation.

    Raises:
      ValueError, TypeError: as :func:`madax.madam`.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> w = jnp.array([1.0, -1.0, 0.0])
      >>> tx = madax.papers.madam(learning_rate=jnp.log(2))
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates).round(3))
      [ 0.5 -2.   0. ]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    return from_direction(
        second_moment(b2),
        learning_rate,
        p_scale=p_scale,
        g_bound=g_bound,
        floor=0.0,
        zero_init_scale=0.0,
        rounding="nearest",
        alias=madam,
    )
