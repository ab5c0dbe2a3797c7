"""Madam: multiplicative steps along the gradient over the root of its second moment."""

import optax
from jax.typing import ArrayLike

from madax._core.moved import by_name
from madax._core.rounding import Rounding
from madax.formats._moment_format import MomentFormat
from madax.optimizers._chain import from_direction
from madax.transforms._second_moment import second_moment
from madax.transforms._weight_decay import Mask


@by_name("b2", "p_scale", "g_bound")
def madam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    *,
    b1: ArrayLike | None = None,
    b2: ArrayLike = 0.999,
    p_scale: ArrayLike | None = None,
    g_bound: ArrayLike = 10.0,
    floor: ArrayLike = 0.0,
    zero_init_scale: ArrayLike = 0.1,
    weight_decay: ArrayLike = 0.0,
    mask: Mask | None = None,
    moment_format: MomentFormat | None = None,
    rounding: Rounding = "stochastic",
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Madam, the paper's multiplicative rule made safe for any network.

    .. math::

      \nu &\leftarrow b_2 \nu + (1 - b_2) g^2 \\
      d &= -\eta\, (\mathrm{clip}(g / \sqrt{\hat\nu}, \pm g_\text{bound})
        + \lambda\, \mathrm{sign}(w)) \\
      w &\leftarrow \mathrm{clip}(w\, e^{\mathrm{sign}(w)\, d}, \pm w_\text{max})

    A typical step multiplies a weight by :math:`e^{\pm\eta}`, and no step by more than
    :math:`e^{\pm g_\text{bound}\eta}`, whatever the scale of weights or gradients.
    So one learning rate suits very different networks: start at 0.01, and decay it.

    Two things differ from the paper, whose rule is :func:`madax.papers.madam`, and make
    networks train that start with zeros or large gains. Leaves that are all zeros at
    init, such as biases, are trained additively up to ``zero_init_scale``. And only
    matrices have a bound :math:`w_\text{max}`, which is
    :math:`\max(3\, \mathrm{rms}_0, \max|w_0|)`, so that no weight exceeds it at init,
    pretrained or not: see :func:`clip_log_weights`.

    Leaves that are codes, from :func:`quantize_params`, are trained natively, by
    additions of integers. An ``optax.chain`` of ``scale_by_second_moment``,
    ``optax.clip``, perhaps ``add_decayed_log_weights``,
    ``optax.scale_by_learning_rate``, ``scale_by_sign_log``, ``clip_log_weights`` and
    ``lns_quantize`` gives the same updates.

    .. warning::
      Transforms of the gradient, such as clipping, go before ``madam`` in a chain. But
      not weight decay: what ``optax.add_decayed_weights`` adds to a gradient is
      normalised with the gradient. Nothing that rescales the updates may come after
      ``madam``.

    Args:
      learning_rate: :math:`\eta`, in nats per step, or a schedule.
      b1: decay rate of a first moment, in [0, 1); None, the paper, for none.
      b2: decay rate of the second moment, in [0, 1).
      p_scale: bound on the weights of every float leaf, relative to its root mean
        square at init; the paper has 1 to 3. None for a bound on matrices alone;
        ``inf`` for no bound. It does nothing on codes: see :func:`quantize_params`.
      g_bound: bound on the normalised gradient.
      floor: magnitude below which steps are additive, relative to the root mean
        square of the leaf at init; 0, the paper, for none. Above 0, weights near zero
        may change sign. It does nothing on codes: their format decides.
      zero_init_scale: scale given to float leaves that are all zeros at init, such as
        biases, which are trained additively up to that size; with 0, the paper, they
        stay at zero. It does nothing on codes.
      weight_decay: :math:`\lambda` of decoupled weight decay, as in AdamW: every step
        takes the fraction :math:`\eta\lambda` off a weight.
      mask: which leaves decay, as in optax: a tree of booleans like the parameters,
        or a function from them to such a tree, to be named in the ``static_args`` of
        ``optax.inject_hyperparams``; None for all.
      moment_format: how moments are stored, such as ``MomentFormat(bits=8)``; None
        for float32 or wider.
      rounding: how codes, and weights in bfloat16 and float16, are rounded:
        "stochastic", or "nearest" (halves to even). Moments in ``moment_format`` are
        always rounded stochastically.
      seed: seed of all stochastic rounding.

    Returns:
      The optimizer, a gradient transformation whose state is a :class:`MadamState`; its
      updates have the dtype of the parameters and add to them under
      ``optax.apply_updates``.

    Raises:
      ValueError: if an argument is out of range, a float leaf is not finite, codes have
        no scale, ``params`` are missing or do not match. Traced arguments and the rates
        of a schedule cannot be checked: out of range, they make float weights NaN, and
        do not change codes.
      TypeError: if an argument is not a number, a decay rate has less than 32 bits, a
        leaf is not real floating, or the state is of another optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, madax
      >>> params = {"w": jnp.array([0.5, -2.0]), "b": jnp.zeros(2)}
      >>> loss = lambda p: jnp.sum((p["w"] + p["b"] - jnp.array([1.0, -1.0])) ** 2)
      >>> tx = madax.madam(0.01)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> print(f"{loss(params):.3f}")
      0.000

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    return from_direction(
        second_moment(b2, b1=b1, moment_format=moment_format, seed=seed),
        learning_rate,
        p_scale=p_scale,
        g_bound=g_bound,
        floor=floor,
        zero_init_scale=zero_init_scale,
        weight_decay=weight_decay,
        mask=mask,
        rounding=rounding,
        seed=seed,
        alias=madam,
    )
