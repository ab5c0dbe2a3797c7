"""Directions of matrices: orthogonal, or with rows and columns of equal size."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from madax._core.checks import check_choice, check_decay, check_state
from madax._core.leaf_names import Axes
from madax._core.names import Tree, flatten_named
from madax._core.numerics import decay_rate, divided_or_same, moving_average
from madax.codes._leaves import flatten, flatten_like, widen, zeros_like
from madax.codes._scales import root_mean_square
from madax.transforms._matrices import Matrices, all_axes, as_matrices
from madax.transforms._orthogonal import orthogonalized

# The names of the directions of matrices.
MatrixDirection = Literal["orthogonal", "factored", "sinkhorn", "columns"]
_ROUNDS = 5  # of SinkGD


class ScaleByOrthogonalMomentumState(NamedTuple):
    """State of :func:`scale_by_orthogonal_momentum`.

    Attributes:
      mu: momentum, a tree like the parameters, float32 or wider; None without one.
    """

    mu: Tree


def scale_by_orthogonal_momentum(
    b1: ArrayLike | None = 0.95, *, matrices: Matrices | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of Muon: an orthogonalised momentum.

    .. math::

      \mu_t &= b_1 \mu_{t-1} + (1 - b_1) g_t, \qquad
        X_0 = \frac{b_1 \mu_t + (1 - b_1) g_t}{\lVert \cdot \rVert_F} \\
      A_k &= X_k X_k^\top, \qquad
        X_{k+1} = 3.4445 X_k + (-4.7750 A_k + 2.0315 A_k^2) X_k, \qquad
        k = 0, \dots, 4 \\
      \hat g_t &= X_5 / \mathrm{rms}(X_5), \qquad 0/0 := 0

    Five Newton-Schulz steps bring those singular values of a matrix that are above a
    hundredth of its norm to between 0.7 and 1.2, and keep its singular vectors. Like
    the direction of :func:`scale_by_second_moment`, this one has a root mean square of
    1 and does not depend on the gradient's scale, so that rates carry over.

    It may be followed by :func:`scale_by_sign_log`, or by the learning rate of an
    additive optimizer. Leaves may be floats or codes.

    By default names and shapes tell which axes of a leaf are the rows and columns, as
    :func:`madax.diagnostics.matrices` shows. A gradient element that is not finite does
    not enter the momentum; without a momentum, it counts as zero.

    Args:
      b1: decay rate of the momentum, in [0, 1), or None: the gradient itself is made
        orthogonal, and the state has no arrays.
      matrices: ``matrices(path, leaf)`` is a :class:`MatrixDimensionNumbers`, for paths
        like ``"Dense_0/kernel"`` and leaves with a shape and a dtype; None to read
        axes from names and shapes.

    Returns:
      A gradient transformation from gradients to directions, float32 or wider. All
      leaves must be matrices; :func:`muon_madam` has others, too.

    Raises:
      ValueError: if ``b1`` is out of range, a leaf is not a matrix, or gradients do not
        match.
      TypeError: if an argument is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.transforms.scale_by_orthogonal_momentum()
      >>> w = jnp.ones((2, 2))
      >>> g = jnp.array([[1e-6, 0.0], [0.0, -3e-6]])
      >>> direction, _ = tx.update(g, tx.init(w))
      >>> print(jnp.sign(direction), f"{jnp.mean(direction**2):.2f}")
      [[ 1.  0.]
       [ 0. -1.]] 1.00

    References:
      Jordan et al., `Muon: an optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    b1 = check_decay("b1", b1, 0.95, or_none=True)
    return matrix_direction(b1, all_axes(matrices), "orthogonal")


def scale_by_sinkhorn(
    *, matrices: Matrices | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of SinkGD: normalises rows and columns of a matrix in turn.

    .. math::

      X_0 &= g, \qquad
        Y_k = X_k / \mathrm{rms}_\text{out}(X_k), \qquad
        X_{k+1} = Y_k / \mathrm{rms}_\text{in}(Y_k), \qquad k = 0, \dots, 4 \\
      \hat g &= X_5, \qquad 0/0 := 0

    where :math:`\mathrm{rms}_\text{out}` is the root mean square over the output axes,
    one for each input, and :math:`\mathrm{rms}_\text{in}` is the root mean square over
    the input axes. It takes a few passes over the gradient instead of the matrix
    products of :func:`scale_by_orthogonal_momentum`, and has no state. Gradient
    elements that are not finite count as zero.

    Args:
      matrices: as for :func:`scale_by_orthogonal_momentum`.

    Returns:
      A gradient transformation without a state, as
      :func:`scale_by_orthogonal_momentum` otherwise.

    Raises:
      ValueError: if a leaf is not a matrix.
      TypeError: if ``matrices`` is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.transforms.scale_by_sinkhorn()
      >>> g = jnp.array([[1e-6, 2e-6], [-3e-6, 4e-6]])
      >>> direction, _ = tx.update(g, tx.init(g))
      >>> print(jnp.round(jnp.mean(direction**2, 0), 2))
      [1. 1.]

    References:
      Scetbon et al., `Gradient multi-normalization for stateless and scalable LLM
      training <https://arxiv.org/abs/2502.06742>`_, 2025.
    """
    return matrix_direction(None, all_axes(matrices), "sinkhorn")


def scale_by_column_norm(
    *, matrices: Matrices | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of SCALE: normalises the outgoing weights of each input.

    .. math::

      \hat g = g / \mathrm{rms}_\text{out}(g), \qquad 0/0 := 0

    where :math:`\mathrm{rms}_\text{out}` is the root mean square over the output axes,
    one for each input: the columns of a matrix that is multiplied from the left. This
    is the first half of the first round of :func:`scale_by_sinkhorn`. The momentum of
    SCALE's last layer is not included; in :func:`muon_madam` last layers have the
    second moment of Madam.

    Args:
      matrices: as for :func:`scale_by_orthogonal_momentum`.

    Returns:
      A gradient transformation without a state, as
      :func:`scale_by_orthogonal_momentum` otherwise.

    Raises:
      ValueError: if a leaf is not a matrix.
      TypeError: if ``matrices`` is of the wrong type, or a leaf is not real floating.

    Example:
      >>> import jax.numpy as jnp, madax
      >>> tx = madax.transforms.scale_by_column_norm()
      >>> g = jnp.array([[1e-6, -1e-6], [3e-6, 4e-6]])
      >>> direction, _ = tx.update(g, tx.init(g))
      >>> print(jnp.round(jnp.mean(direction**2, 1), 2))
      [1. 1.]

    References:
      Glentis et al., `A minimalist optimizer design for LLM pretraining
      <https://arxiv.org/abs/2506.16659>`_, 2025.
    """
    return matrix_direction(None, all_axes(matrices), "columns")


def check_direction(direction: object) -> None:
    """Raises unless ``direction`` is a :data:`MatrixDirection`."""
    why = 'the default is "orthogonal", the others cost less.'
    check_choice("direction", direction, get_args(MatrixDirection), why)


def matrix_direction(
    b1: ArrayLike | None,
    axes_of: Callable[..., Sequence[Tree]],
    direction: MatrixDirection,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transform to directions of gradients, or of a momentum.

    The direction "factored" is the gradient or momentum itself, because its caller
    divides the gradient before this.
    """
    normalized = _DIRECTIONS[direction]

    def init_fn(params):
        paths, leaves, treedef = flatten(params)
        axes_of(paths, leaves)
        if b1 is None:
            return ScaleByOrthogonalMomentumState(None)
        mu = treedef.unflatten([zeros_like(leaf) for leaf in leaves])
        return ScaleByOrthogonalMomentumState(mu)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state(state, ScaleByOrthogonalMomentumState)
        if b1 is None:
            if state.mu is not None:
                raise ValueError(
                    "the optimizer state has a momentum, which b1=None would lose; "
                    "call init again, or pass the b1 that it was made with."
                )
            paths, gs, treedef = flatten(updates, "updates")
            ahead = [widen(jnp.where(jnp.isfinite(g), g, 0)) for g in gs]
            new_state = state
        else:
            paths, ms, treedef = flatten_named(state.mu)
            gs = flatten_like(updates, treedef, "state.mu", paths, ms)
            ahead, rate = [], decay_rate(b1)
            for i, g in enumerate(gs):
                g = jnp.asarray(g).astype(ms[i].dtype)
                g = jnp.where(jnp.isfinite(g), g, ms[i])
                ms[i] = moving_average(ms[i], g, rate)
                ahead.append(moving_average(ms[i], g, rate))
            new_state = ScaleByOrthogonalMomentumState(treedef.unflatten(ms))
        found = zip(ahead, axes_of(paths, ahead), strict=True)
        return treedef.unflatten([normalized(*leaf) for leaf in found]), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _column_normalized(x: jax.Array, axes: Axes) -> jax.Array:
    _, outputs = axes
    return divided_or_same(x, root_mean_square(x, outputs, keepdims=True))


def _sinkhorn_normalized(x: jax.Array, axes: Axes) -> jax.Array:
    inputs, outputs = axes
    for _ in range(_ROUNDS):
        x = _column_normalized(x, (inputs, outputs))
        x = _column_normalized(x, (outputs, inputs))
    return x


_DIRECTIONS: dict[MatrixDirection, Callable[[jax.Array, Axes], jax.Array]] = {
    "orthogonal": partial(as_matrices, orthogonalized),
    "factored": lambda x, axes: x,
    "sinkhorn": _sinkhorn_normalized,
    "columns": _column_normalized,
}
