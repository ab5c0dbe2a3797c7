"""The optimizers: chains of the transforms, one screen long each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._checks import (
    check_format_field,
    check_instance,
    check_learning_rate,
    check_positive,
    check_state,
)
from madax._clip import clip_log_weights
from madax._format import Format
from madax._formats import LogFormat, base_step_range
from madax._lns_quantize import lns_quantize
from madax._moments import MomentFormat
from madax._rounding import Rounding
from madax._second_moment import ScaleBySecondMomentState, scale_by_second_moment
from madax._sign_log import sign_log
from madax._weight_decay import add_decayed_log_weights

_UPDATE_GRID = LogFormat.from_gamma(bits=16, gamma=2048)


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


def from_direction(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    p_scale: jax.typing.ArrayLike | None,
    g_bound: jax.typing.ArrayLike,
    *,
    floor: jax.typing.ArrayLike,
    zero_init_scale: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike | None,
    mask: Any,
    rounding: Rounding,
    seed: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of multiplicative steps in a direction; arguments as for madam."""
    learning_rate = check_learning_rate(learning_rate, 0.01)
    g_bound = check_positive("g_bound", g_bound, 10.0)
    geometry = {"floor": floor, "zero_init_scale": zero_init_scale}
    decay = (
        []
        if weight_decay is None
        else [add_decayed_log_weights(weight_decay, mask, **geometry)]
    )
    return optax.chain(
        direction,
        optax.clip(g_bound),
        *decay,
        optax.scale_by_learning_rate(learning_rate),
        sign_log(**geometry, skips=False),
        clip_log_weights(p_scale, zero_init_scale=zero_init_scale),
        lns_quantize(rounding=rounding, seed=seed),
    )


def bbit_madam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    bits: int = 12,
    base_precision: float = 0.001,
    b2: jax.typing.ArrayLike = 0.999,
    p_scale: jax.typing.ArrayLike | None = None,
    g_bound: jax.typing.ArrayLike = 10.0,
    *,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""B-bit Madam: Madam on a grid of log-spaced weights, with nearest rounding.

    .. math::

      |w| &= w_\text{max}\, e^{-n \beta}, \qquad
        n \in \{0, \dots, 2^B - 2\} \\
      n &\leftarrow n + \mathrm{round}(k\, \mathrm{clip}(g / \sqrt{\hat v},
        \pm g_\text{bound}))\, \mathrm{sign}(w), \qquad k = \eta / \beta

    with the largest magnitude :math:`w_\text{max}` of the grid, the base precision
    :math:`\beta`, and the rate :math:`k` a whole number of codes, 1 at least: a
    schedule that decays the rate is rounded to it.

    Float leaves stay float arrays, whose values are on the grid; no leaf, vectors
    included, grows beyond it. To store codes,
    use ``quantize_params(params, LogFormat(bits + 1, base_precision))``: the extra
    bit is the sign. The paper has one magnitude more, as its codes have no zero, and
    starts from random magnitudes; here codes start at the nearest, and a float weight
    is put on the grid by its first step.

    Args:
      learning_rate: :math:`\eta`, in nats per step, or a schedule of it.
      bits: :math:`B`, bits of a magnitude; the sign is one more. 1 to 15.
      base_precision: :math:`\beta`, spacing of the grid, in nats.
      b2: decay rate of the second moment, in [0, 1).
      p_scale: largest magnitude, relative to the root mean square of its leaf at
        init; None for three times that, or the largest weight at init.
      g_bound: bound on the normalised gradient.
      zero_init_scale: scale given to leaves that are all zeros at init.

    Returns:
      The optimizer, a gradient transformation.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match.
      TypeError: if an argument is not a number, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> w = jnp.array([[1.0, -2.0]])
      >>> tx = madax.bbit_madam(learning_rate=0.01, bits=12, base_precision=0.001)
      >>> updates, _ = tx.update(jnp.array([[5.0, 5.0]]), tx.init(w), w)
      >>> print(jnp.log(optax.apply_updates(w, updates) / w).round(3))
      [[-0.01  0.01]]

    References:
      Bernstein et al., `Learning compositional functions via multiplicative
      weight updates <https://arxiv.org/abs/2006.14560>`_, 2020, Section 5.
    """
    learning_rate = check_learning_rate(learning_rate, 0.01)
    g_bound = check_positive("g_bound", g_bound, 10.0)
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 15:
        raise ValueError(
            f"bits must be an int in 1 to 15, got {bits!r} (default: 12); formats are "
            "static, name it in the static_args of optax.inject_hyperparams."
        )
    lowest, highest = base_step_range(bits + 1)
    check_format_field("base_precision", base_precision, lowest, highest, "nats")
    format = LogFormat(bits + 1, base_precision)

    def whole_codes(rate):
        # These constants are NumPy's: jnp would start the backend, too early for users
        # who call jax.distributed.initialize afterwards.
        xp = jnp if isinstance(rate, jax.Array) else np
        codes = xp.maximum(xp.round(xp.abs(rate) / base_precision), 1)
        rate = xp.sign(rate) * base_precision * codes
        return rate if xp is jnp else float(rate)

    rate = (
        (lambda count: whole_codes(learning_rate(count)))
        if callable(learning_rate)
        else whole_codes(learning_rate)
    )
    return optax.chain(
        scale_by_second_moment(b2),
        optax.clip(g_bound),
        optax.scale_by_learning_rate(rate),
        sign_log(0.0, zero_init_scale, skips=False),
        clip_log_weights(p_scale, zero_init_scale=zero_init_scale),
        lns_quantize(
            format,
            rounding="nearest",
            p_scale=p_scale,
            zero_init_scale=zero_init_scale,
        ),
    )


def lns_madam(
    learning_rate: optax.ScalarOrSchedule = 2**-7,
    format: Format = _UPDATE_GRID,
    b2: jax.typing.ArrayLike = 0.999,
    p_scale: jax.typing.ArrayLike | None = None,
    g_bound: jax.typing.ArrayLike = 10.0,
    *,
    zero_init_scale: jax.typing.ArrayLike = 0.1,
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
      b2: decay rate of the second moment, in [0, 1).
      p_scale: largest magnitude, relative to the root mean square of its leaf at
        init; None for three times that, or the largest weight at init.
      g_bound: bound on the normalised gradient.
      zero_init_scale: scale given to leaves that are all zeros at init.

    Returns:
      The optimizer, a gradient transformation.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing or do not
        match.
      TypeError: if an argument is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, optax, madax
      >>> w = jnp.array([[1.0, -2.0]])
      >>> tx = madax.lns_madam(learning_rate=0.5)
      >>> updates, _ = tx.update(jnp.array([[5.0, 5.0]]), tx.init(w), w)
      >>> print(jnp.log2(optax.apply_updates(w, updates) / w).round(2))
      [[-0.5  0.5]]

    References:
      Zhao et al., `LNS-Madam: low-precision training in logarithmic number system
      using multiplicative weight update <https://arxiv.org/abs/2106.13914>`_, 2022,
      Algorithm 1.
    """
    learning_rate = check_learning_rate(learning_rate, 2**-7)
    g_bound = check_positive("g_bound", g_bound, 10.0)
    check_instance("format", format, Format, or_none=False)
    # The two factors are one, as XLA may or may not merge two: that depends on how an
    # array is sharded.
    in_nats = (
        (lambda count: learning_rate(count) * math.log(2))
        if callable(learning_rate)
        else learning_rate * math.log(2)
    )
    return optax.chain(
        scale_by_second_moment(b2),
        optax.clip(g_bound),
        optax.scale_by_learning_rate(in_nats),
        sign_log(0.0, zero_init_scale, skips=False),
        clip_log_weights(p_scale, zero_init_scale=zero_init_scale),
        lns_quantize(
            format,
            rounding="nearest",
            p_scale=p_scale,
            zero_init_scale=zero_init_scale,
        ),
    )
