"""Muon's direction for matrices, Madam's for the rest; multiplicative steps for all."""

import optax
from jax.typing import ArrayLike

from madax._core.checks import check_learning_rate
from madax._core.moved import by_name
from madax._core.rounding import Rounding
from madax.formats._moment_format import MomentFormat
from madax.optimizers._chain import from_direction
from madax.optimizers._parts import directions
from madax.transforms._matrices import Matrices
from madax.transforms._matrix_direction import MatrixDirection
from madax.transforms._second_moment import Direction
from madax.transforms._weight_decay import Mask


@by_name("b1", "b2", "p_scale", "g_bound")
def muon_madam(
    learning_rate: optax.ScalarOrSchedule = 0.03,
    *,
    madam_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: ArrayLike | None = 0.95,
    b2: ArrayLike = 0.999,
    p_scale: ArrayLike | None = None,
    g_bound: ArrayLike = 10.0,
    direction: MatrixDirection = "orthogonal",
    matrices: Matrices | None = None,
    floor: ArrayLike = 1.0,
    zero_init_scale: ArrayLike = 0.1,
    weight_decay: ArrayLike = 0.0,
    mask: Mask | None = None,
    moment_format: MomentFormat | None = None,
    rounding: Rounding = "stochastic",
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for matrices, Madam for everything else, with multiplicative steps.

    Its defaults are the recommendation: it needs no more than a schedule that decays
    from 0.03. With one rate for many networks it is as good as :func:`muon`, whose
    steps add, and with tuned rates mostly behind.

    .. math::

      d &= -\eta\, (\mathrm{clip}(\hat g, \pm g_\text{bound})
        + \lambda\, \mathrm{sign}(w)) \\
      w &\leftarrow \mathrm{clip}(w\, e^{\mathrm{sign}(w)\, d}, \pm w_\text{max})

    where :math:`\hat g` is the direction of :func:`scale_by_orthogonal_momentum` for
    matrices and the direction of :func:`scale_by_second_moment` for all other leaves.
    Both have a root mean square of about 1, so one rate may serve both.

    Which leaves are matrices, in which of their axes, is read from the names and shapes
    of the whole tree; :func:`madax.diagnostics.matrices` shows how. Vectors, norms,
    tables, routers and last layers take the direction of Madam: a step uses few rows of
    a table, and an orthogonal direction would move all of them. So do leaves of three
    axes or more whose names and shapes are not clear; ``init`` warns of such leaves.

    Each leaf has one moment. With ``moment_format=MomentFormat(8)``, on leaves that are
    8-bit codes, training keeps two bytes per parameter. Codes are trained natively, and
    :func:`layerwise` trains them one layer at a time.

    With ``b1=None`` as well, training keeps **one byte** per parameter: matrices have
    no momentum. Their gradient is divided by second moments of its rows and columns,
    which are two vectors, as in :func:`scale_by_factored_second_moment`, and made
    orthogonal.

    Args:
      learning_rate: :math:`\eta`, in nats per step, or a schedule.
      madam_learning_rate: :math:`\eta` of all leaves that take the direction of Madam;
        None for ``learning_rate``.
      b1: decay rate of the momentum of matrices, in [0, 1), or None for no momentum.
      b2: decay rate of the second moment of other leaves, and of the factored second
        moments of matrices, in [0, 1).
      p_scale: bound on float weights, as for :func:`madam`; it does nothing on codes.
      g_bound: bound on the direction.
      direction: direction of matrices: "orthogonal", or without matrix products:
        "factored" (:func:`scale_by_factored_second_moment`), "sinkhorn"
        (:func:`scale_by_sinkhorn`) or "columns" (:func:`scale_by_column_norm`).
        "factored" divides the gradient, before the momentum; the others apply to the
        momentum, or to the gradient if ``b1`` is None.
      matrices: ``matrices(path, leaf)`` is a :class:`MatrixDimensionNumbers`, or None
        for a leaf that takes the direction of Madam, given paths like
        ``"Dense_0/kernel"`` and leaves with a shape and a dtype.
      floor: as for :func:`madam`; it does nothing on codes.
      zero_init_scale: as for :func:`madam`; it does nothing on codes.
      weight_decay: :math:`\lambda`, as for :func:`madam`.
      mask: which leaves decay, as for :func:`madam`.
      moment_format: how moments are stored, as for :func:`madam`.
      rounding: as for :func:`madam`.
      seed: seed of all stochastic rounding.

    Returns:
      The optimizer, a gradient transformation whose state is a :class:`MadamState`; its
      updates add to the parameters under ``optax.apply_updates``.

    Raises:
      ValueError: if an argument is out of range, ``matrices`` gives axes that a leaf
        does not have, a float leaf is not finite, codes have no scale, ``params`` are
        missing or do not match.
      TypeError: if an argument, or what ``matrices`` returns, is of the wrong type, a
        leaf is not real floating, or the state is of another optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, madax
      >>> w = jax.random.normal(jax.random.key(0), (512, 256))
      >>> params = madax.quantize_params({"w": w}, madax.SymlogFormat(8, 1 / 3))
      >>> tx = madax.muon_madam(moment_format=madax.MomentFormat(8))
      >>> state = tx.init(params)
      >>> total = sum(x.nbytes for x in jax.tree.leaves((params, state)))
      >>> print(f"{total / w.size:.1f} bytes a parameter")
      2.0 bytes a parameter

      In one byte, but for the few leaves that take the direction of Madam:

      >>> tx = madax.muon_madam(b1=None, moment_format=madax.MomentFormat(8))
      >>> total = sum(x.nbytes for x in jax.tree.leaves((params, tx.init(params))))
      >>> print(f"{total / w.size:.1f} bytes a parameter")
      1.0 bytes a parameter

    References:
      Jordan et al., `Muon: an optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.

      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020.
    """
    if madam_learning_rate is not None:
        madam_learning_rate = check_learning_rate(
            madam_learning_rate, None, "madam_learning_rate"
        )
    parts = directions(
        b1, b2, direction, matrices=matrices, moment_format=moment_format, seed=seed
    )
    second_rate = None
    if madam_learning_rate is not None:
        second_rate = madam_learning_rate, parts.are_others
    return from_direction(
        Direction(parts.init, parts.update),
        learning_rate,
        p_scale=p_scale,
        g_bound=g_bound,
        floor=floor,
        zero_init_scale=zero_init_scale,
        weight_decay=weight_decay,
        mask=mask,
        rounding=rounding,
        seed=seed,
        alias=muon_madam,
        second_rate=second_rate,
    )
