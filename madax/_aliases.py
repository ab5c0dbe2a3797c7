"""The optimizers: chains of the transforms, one screen long each."""

import jax
import optax

from madax._checks import check_learning_rate, check_positive
from madax._clip import clip_log_weights
from madax._second_moment import scale_by_second_moment
from madax._sign_log import scale_by_sign_log


def madam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    b2: jax.typing.ArrayLike = 0.999,
    p_scale: jax.typing.ArrayLike = 3.0,
    g_bound: jax.typing.ArrayLike = 10.0,
    *,
    b1: jax.typing.ArrayLike | None = None,
    floor: jax.typing.ArrayLike = 0.0,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Madam, the multiplicative adaptive moments optimizer.

    .. math::

      v &\leftarrow b_2 v + (1 - b_2) g^2 \\
      d &= -\eta\, \mathrm{clip}(g / \sqrt{\hat v}, \pm g_\text{bound}) \\
      w &\leftarrow \mathrm{clip}(w\, e^{\mathrm{sign}(w)\, d},
        \pm p_\text{scale} \mathrm{rms}_0)

    A typical step multiplies a weight by :math:`e^{\pm\eta}`, the largest by
    :math:`e^{\pm g_\text{bound}\eta}`, whatever the scale of weights or gradients.
    So one learning rate suits very different networks: start at 0.01, and decay it.

    The chain is ``scale_by_second_moment``, ``optax.clip``,
    ``optax.scale_by_learning_rate``, ``scale_by_sign_log``, ``clip_log_weights``.

    .. warning::
      Transforms of the gradient (clipping, weight decay) go before ``madam`` in a
      chain. Nothing that rescales the updates may come after it.

    Args:
      learning_rate: :math:`\eta`, in nats a step, or a schedule of it.
      b2: decay rate of the second moment, in [0, 1).
      p_scale: bound on a weight, relative to the root mean square of its leaf at
        init, frozen there.
      g_bound: bound on the normalised gradient.
      b1: decay rate of a first moment, in [0, 1); None, the paper, for none.
      floor: magnitude below which steps are additive, relative to the root mean
        square of the leaf at init; 0, the paper, for none. Above 0, weights near
        zero may change sign.
      zero_init_scale: scale given to leaves that are all zeros at init, such as
        biases, which are trained additively up to that size; 0, the paper, leaves
        them at zero for good.

    Returns:
      The optimizer, a gradient transformation; its updates have the dtype of the
      parameters and add to them under ``optax.apply_updates``.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax, jax.numpy as jnp, optax, madax
      >>> params = {"w": jnp.array([0.5, -2.0]), "b": jnp.zeros(2)}
      >>> loss = lambda p: jnp.sum((p["w"] + p["b"] - jnp.array([1.0, -1.0])) ** 2)
      >>> tx = madax.madam(0.01)
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.3f}")
      0.000

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Algorithm 1.
    """
    check_learning_rate(learning_rate, 0.01)
    check_positive("g_bound", g_bound, 10.0)
    return optax.chain(
        scale_by_second_moment(b2, b1=b1),
        optax.clip(g_bound),
        optax.scale_by_learning_rate(learning_rate),
        scale_by_sign_log(floor=floor, zero_init_scale=zero_init_scale),
        clip_log_weights(p_scale, zero_init_scale=zero_init_scale),
    )
