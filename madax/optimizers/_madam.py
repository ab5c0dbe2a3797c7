"""Madam: multiplicative steps along the gradient over the root of its second moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from madax._core.checks import check_state
from madax._core.rounding import Rounding
from madax.formats._moment_format import MomentFormat
from madax.optimizers._chain import from_direction
from madax.transforms._second_moment import (
    ScaleBySecondMomentState,
    scale_by_second_moment,
)


def madam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    b2: jax.typing.ArrayLike = 0.999,
    p_scale: jax.typing.ArrayLike | None = None,
    g_bound: jax.typing.ArrayLike = 10.0,
    *,
    b1: jax.typing.ArrayLike | None = None,
    floor: jax.typing.ArrayLike = 0.0,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
    weight_decay: jax.typing.ArrayLike | None = None,
    mask: Any | Callable[[Any], Any] | None = None,
    moment_format: MomentFormat | None = None,
    rounding: Rounding = "stochastic",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Madam, the multiplicative adaptive moments optimizer.

    .. math::

      v &\leftarrow b_2 v + (1 - b_2) g^2 \\
      d &= -\eta\, (\mathrm{clip}(g / \sqrt{\hat v}, \pm g_\text{bound})
        + \lambda\, \mathrm{sign}(w)) \\
      w &\leftarrow \mathrm{clip}(w\, e^{\mathrm{sign}(w)\, d}, \pm w_\text{max})

    A typical step multiplies a weight by :math:`e^{\pm\eta}`, the largest by
    :math:`e^{\pm g_\text{bound}\eta}`, whatever the scale of weights or gradients.
    So one learning rate suits very different networks: start at 0.01, and decay it.
    By default the bound :math:`w_\text{max}` of a matrix is
    :math:`\max(3\, \mathrm{rms}_0, \max|w_0|)`, which no weight exceeds at init,
    pretrained or not. Vectors, gains and leaves that are all zeros at init have no
    bound: see :func:`clip_log_weights`.

    The chain is ``scale_by_second_moment``, ``optax.clip``, with a weight decay
    ``add_decayed_log_weights``, ``optax.scale_by_learning_rate``,
    ``scale_by_sign_log``, ``clip_log_weights``, ``lns_quantize``.

    Leaves that are codes, from :func:`quantize_params`, are trained natively, by
    additions of integers. Float leaves beside them are trained as usual.

    .. warning::
      Transforms of the gradient, such as clipping, go before ``madam`` in a chain. But
      not weight decay: whatever ``optax.add_decayed_weights`` adds to a gradient is
      normalised with it. Nothing that rescales the updates may come after ``madam``.

    Args:
      learning_rate: :math:`\eta`, in nats per step, or a schedule of it.
      b2: decay rate of the second moment, in [0, 1).
      p_scale: bound on the weights of every leaf, relative to its root mean square at
        init, frozen there; the paper has 1 to 3. None for a bound on matrices alone,
        three times that or the largest weight at init; ``inf`` for no bound.
      g_bound: bound on the normalised gradient.
      b1: decay rate of a first moment, in [0, 1); None, the paper, for none.
      floor: magnitude below which steps are additive, relative to the root mean
        square of the leaf at init; 0, the paper, for none. Above 0, weights near
        zero may change sign.
      zero_init_scale: scale given to leaves that are all zeros at init, such as
        biases, which are trained additively up to that size; 0, the paper, leaves
        them at zero for good.
      weight_decay: :math:`\lambda` of decoupled weight decay, as of AdamW: every step
        takes the share :math:`\eta\lambda` off a weight; None for none.
      mask: which leaves decay, as in optax: a tree of booleans like the parameters,
        or a function from them to one, to be named in the ``static_args`` of
        ``optax.inject_hyperparams``; None for all.
      moment_format: how moments are stored, such as ``MomentFormat(bits=8)``; None
        for float32 or wider.
      rounding: rounding of code steps, "stochastic" or "nearest".
      seed: seed of the stochastic rounding.

    Returns:
      The optimizer, a gradient transformation; its updates have the dtype of the
      parameters and add to them under ``optax.apply_updates``.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match. Traced arguments and the rates of a schedule cannot be checked: out of
        range, they make float weights NaN, and leave codes where they are.
      TypeError: if an argument is not a number, a decay rate has less than 32 bits, or
        a leaf is not real floating.

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
    chain = from_direction(
        scale_by_second_moment(b2, b1=b1, moment_format=moment_format, seed=seed),
        learning_rate,
        p_scale,
        g_bound,
        floor=floor,
        zero_init_scale=zero_init_scale,
        weight_decay=weight_decay,
        mask=mask,
        rounding=rounding,
        seed=seed,
    )

    def update_fn(updates, state, params=None, **extra_args):
        check_state(state[0], ScaleBySecondMomentState)
        # Both roundings share one count, so that XLA sees that they hash the same
        # numbers.
        count = {"count": state[0].count}
        return chain.update(updates, state, params, **(count | extra_args))

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)
