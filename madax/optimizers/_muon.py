"""Muon for matrices, and Adam with fewer moments for the rest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import (
    check_learning_rate,
    check_non_negative,
    check_seed,
    check_state,
)
from madax._core.names import Tree
from madax._core.numerics import incremented, rounded
from madax._core.rounding import Rounding, check_rounding, keys_per_leaf
from madax.codes._array import Leaf, is_quantized
from madax.codes._leaves import compute_dtype, flatten_both
from madax.codes._quantize import decoded
from madax.codes._scales import check_code_scales, check_float_widths
from madax.codes._steps import as_steps, rounded_sum
from madax.formats._moment_format import MomentFormat
from madax.optimizers._chain import Rates, decayed_leaves, is_zero
from madax.optimizers._parts import directions
from madax.transforms._lns_quantize import rounded_update
from madax.transforms._matrices import Matrices
from madax.transforms._matrix_direction import MatrixDirection
from madax.transforms._weight_decay import Mask, decaying

# The root mean square of AdamW's steps, in learning rates, as arXiv 2502.16982 has it.
_RMS = 0.2


class MuonState(NamedTuple):
    """State of :func:`muon`.

    Attributes:
      count: number of steps taken, int32 scalar.
      direction: state of ``optax.partition`` by what leaves are: ``"matrix"``,
        ``"head"``, ``"vector"`` or ``"other"``.
    """

    count: jax.Array
    direction: Tree


def muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: ArrayLike | None = 0.95,
    b2: ArrayLike = 0.99,
    other_b1: ArrayLike | None = 0.9,
    direction: MatrixDirection = "orthogonal",
    matrices: Matrices | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: Mask | None = None,
    moment_format: MomentFormat | None = None,
    rounding: Rounding = "stochastic",
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with one moment for each weight, on floats or codes.

    This is the recommended optimizer, and its defaults are the recommendation: it needs
    no more than a schedule that decays from 0.02.

    .. math::

      w \leftarrow w - \eta\, (s\, \hat g + \lambda\, w), \qquad
        s = 0.2 \text{ for matrices, } 1 \text{ for other leaves}

    The direction :math:`\hat g` depends on what a leaf is, which is read from the names
    and shapes of the whole tree as for :func:`muon_madam`:

    - matrices have the direction of :func:`scale_by_orthogonal_momentum`;
    - last layers and routers have a momentum of gradients over the factored second
      moment of :func:`scale_by_factored_second_moment`, as in Adafactor;
    - vectors and norms have the direction of Adam, :func:`scale_by_second_moment` with
      ``b1``;
    - tables have the direction of :func:`scale_by_second_moment` without ``b1``. A step
      uses few rows of a table, and a first moment would move the others as well.

    So each leaf has one moment of its size, but for vectors, which have two. Steps are
    additive. Steps of matrices have the root mean square of AdamW's steps, so AdamW's
    rates carry over. Sums with codes, and with floats of 16 bits, are rounded
    stochastically, which keeps their mean, so no step is lost. A ``LogFormat`` has no
    code near zero and loses the steps across it: use a ``SymlogFormat``.

    With ``moment_format=MomentFormat(8)``, on leaves that are 8-bit codes, training
    keeps **two bytes** per parameter, and with ``b1=None`` **one byte** for matrices.
    Codes have no larger magnitudes than their max, which :func:`quantize_params` sets.

    Args:
      learning_rate: :math:`\eta`, or a schedule.
      other_learning_rate: :math:`\eta` of all leaves other than matrices; None for
        ``learning_rate``.
      b1: decay rate of the momentum of matrices, as for :func:`muon_madam`.
      b2: decay rate of the second moments.
      other_b1: decay rate of the first moment of last layers, routers and vectors; None
        for none, which leaves the directions of :func:`muon_madam`.
      direction: as for :func:`muon_madam`.
      matrices: as for :func:`muon_madam`.
      weight_decay: :math:`\lambda`, the fraction that a step of rate 1 takes.
      mask: which leaves decay, as for :func:`madam`.
      moment_format: how moments are stored, as for :func:`madam`.
      rounding: as for :func:`madam`.
      seed: seed of all stochastic rounding.

    Returns:
      The optimizer, a gradient transformation whose state is a :class:`MuonState`; its
      updates add to the parameters under ``optax.apply_updates``.

    Raises:
      ValueError: if an argument is out of range, ``matrices`` gives axes that a leaf
        does not have, codes have no scale, ``params`` are missing or do not match.
      TypeError: if an argument, or what ``matrices`` returns, is of the wrong type, a
        leaf is not real floating, or the state is of another optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, madax
      >>> w = jax.random.normal(jax.random.key(0), (512, 256))
      >>> params = madax.quantize_params({"w": w}, madax.SymlogFormat(8, 1 / 3))
      >>> tx = madax.muon(weight_decay=0.1, moment_format=madax.MomentFormat(8))
      >>> state = tx.init(params)
      >>> total = sum(x.nbytes for x in jax.tree.leaves((params, state)))
      >>> print(f"{total / w.size:.1f} bytes a parameter")
      2.0 bytes a parameter

    References:
      Jordan et al., `Muon: an optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.

      Liu et al., `Muon is scalable for LLM training
      <https://arxiv.org/abs/2502.16982>`_, 2025, for the size of a step.
    """
    learning_rate = check_learning_rate(learning_rate, 0.02)
    if other_learning_rate is not None:
        other_learning_rate = check_learning_rate(
            other_learning_rate, None, "other_learning_rate"
        )
    rates = Rates.of(learning_rate, other_learning_rate)
    weight_decay = check_non_negative("weight_decay", weight_decay, 0.0)
    check_rounding(rounding)
    check_seed(seed)
    parts = directions(
        b1,
        b2,
        direction,
        other_b1=other_b1,
        matrices=matrices,
        moment_format=moment_format,
        seed=seed,
    )

    def init_fn(params):
        check_float_widths(params)
        check_code_scales(params)
        decaying(mask, params)  # refuses a mask that does not fit
        return MuonState(jnp.zeros([], jnp.int32), parts.init(params))

    def update_fn(updates, state, params=None, *, madax_layer=None, **extra_args):
        del extra_args
        check_state(state, MuonState)
        count = state.count
        ds, new_direction = parts.update(
            updates, state.direction, params, count=count, madax_layer=madax_layer
        )
        paths, ws, ds, treedef = flatten_both(params, ds)
        others = parts.are_others(params)
        leaves = zip(ds, others, strict=True)
        ds = [d if other else rounded(_RMS * d) for d, other in leaves]
        if not is_zero(weight_decay):
            values = treedef.flatten_up_to(decoded(params))
            ds = decayed_leaves(weight_decay, mask, params, ds, values)
        us = rates.scaled(ds, others, count)
        keys = keys_per_leaf(seed, count, paths, madax_layer)
        leaves = zip(ws, us, keys, strict=True)
        us = treedef.unflatten([_sum_rounded(*leaf, rounding) for leaf in leaves])
        count = incremented(count)
        return us, MuonState(count, new_direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _sum_rounded(w: Leaf, u: jax.Array, key: jax.Array, rounding: Rounding) -> Leaf:
    """The update that takes a leaf to about ``w + u``."""
    if is_quantized(w):
        return as_steps(w, rounded_sum(w, u, key, rounding))
    return rounded_update(w, u.astype(compute_dtype(w)), key, rounding)
