"""Madam as it was published."""

import jax
import optax

from madax.optimizers._madam import madam as safe_madam


def madam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    *,
    b2: jax.typing.ArrayLike = 0.999,
    p_scale: jax.typing.ArrayLike = 3.0,
    g_bound: jax.typing.ArrayLike = 10.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Madam to the letter: the rule and the constants of its authors.

    .. math::

      \nu &\leftarrow b_2 \nu + (1 - b_2) g^2, \qquad
        \hat g = \mathrm{clip}(g / \sqrt{\nu / (1 - b_2^t)}, \pm g_\text{bound}) \\
      w &\leftarrow \mathrm{clip}(w\, e^{-\eta\, \mathrm{sign}(w)\, \hat g},
        \pm p_\text{scale}\, \mathrm{rms}_0)

    What differs from :func:`madax.madam`: every leaf has a bound, also vectors and
    gains, and the first step clips weights that are beyond it; a weight of zero never
    moves, not even in a leaf that is all zeros at init, of which ``init`` warns; no
    argument adds a first moment, a floor, weight decay or a format of moments; and
    rounding is to nearest.

    What is as in :func:`madax.madam`, and not as published: a gradient element that is
    not finite, or whose square overflows, is skipped, and an element whose second
    moment underflows to zero does not move, where the authors' code takes the largest
    step.

    Args:
      learning_rate: :math:`\eta`, in nats per step, or a schedule; the authors decay
        it from 0.01.
      b2: decay rate of the second moment, in [0, 1).
      p_scale: bound on the weights of every float leaf, relative to its root mean
        square at init; the authors choose among 1, 2 and 3. It does nothing on codes.
      g_bound: bound on the normalised gradient.

    Returns:
      The optimizer, a gradient transformation.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> w = jnp.array([1.0, -2.0, 0.0])
      >>> tx = madax.papers.madam(learning_rate=0.1)
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates).round(3))
      [ 0.905 -2.21   0.   ]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    return safe_madam(
        learning_rate,
        b2=b2,
        p_scale=p_scale,
        g_bound=g_bound,
        zero_init_scale=0.0,
        rounding="nearest",
    )
