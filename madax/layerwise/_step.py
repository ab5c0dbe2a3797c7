"""The public function :func:`layerwise`: each layer is updated in the backward pass."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax

from madax._core.checks import (
    Number,
    check_float_dtype,
    check_function,
    check_transformation,
    type_error,
)
from madax._core.names import Tree
from madax.layerwise._clip import ClipBy, checked_clip
from madax.layerwise._plan import REMEDY, Function, Layer, stacks_of
from madax.layerwise._run import Run
from madax.layerwise._setup import Setup


class Layerwise(NamedTuple):
    """The pair of pure functions that :func:`layerwise` returns."""

    init: Callable[[Tree], Tree]
    step: Callable[..., tuple[Tree, Tree, Tree]]


def layerwise(
    tx: optax.GradientTransformation,
    embed: Function | Mapping[str, Function],
    layer: Layer | Mapping[str, Layer],
    loss: Callable[[Tree, Tree, Tree], Tree],
    *,
    shared: Function | Mapping[str, Function] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    microbatches: int = 1,
    has_aux: bool = False,
    gather: Callable[[Tree], Tree] | None = None,
    max_norm: Number | None = None,
    clip_by: ClipBy = "last",
) -> Layerwise:
    r"""Makes a train step that decodes and updates one layer at a time.

    .. math::

      x_0 &= \mathrm{embed}(e), \qquad x_{i+1} = \mathrm{layer}(w_i, x_i), \qquad
        L = \mathrm{loss}(e, x_n) \\
      w_i &\leftarrow w_i + \mathrm{tx}(\partial L / \partial w_i), \qquad
        i = n - 1, \dots, 0, \text{ one after the other}

    A train step needs memory for the parameters, the optimizer state, the inputs
    :math:`x_i` of all layers, and the values, gradients and activations of one layer.
    With codes and moments of 8 bits, parameters and state take about two bytes per
    parameter.

    Parameters are ``{"ends": tree, "layers": tree}``. The leaves of the layers have a
    leading axis that counts layers; :func:`madax.split_layers` makes them from a Flax
    model. The ends are the parameters before and after the stack; ``embed`` and
    ``loss`` may both use them (tied embeddings). All may be floats or codes. The result
    equals ordinary training by ``tx`` of a list of the same layers, ``{"ends": ...,
    "layers": [...]}``, including the random bits of rounding.

    Several stacks may follow one another, such as dense layers and mixtures of experts,
    or an encoder and a decoder. ``layer`` is then a dict of functions by the names of
    the stacks, in their order, and ``"layers"`` a dict of stacks. ``embed`` and
    ``shared`` may be dicts, too. Of all stacks but the first they are called with the
    output of the stack before, ``embed(ends, batch, x)``; a stack without ``embed`` or
    ``shared`` has what the stack before it had.

    A random key in the state of ``tx``, such as ``optax.add_noise`` has, becomes one
    key per layer, with its index folded in, and one for the ends. Ordinary training
    draws different noise, because one key serves all leaves.

    Inside ``jax.shard_map`` (with ``check_vma=True``) a batch may be spread over the
    devices. Gradients of parameters that all devices share are summed over them: let
    ``loss`` take the mean, ``jax.lax.pmean(value, axis)``.

    With ``max_norm`` gradients are clipped before ``tx`` gets them. Layers are updated
    before the global norm is known, so ``clip_by`` says which norm counts:

    - ``"last"``: an estimate of the global norm of this step: the norm of this step's
      layers so far, from the last layer down, divided by the fraction of the global
      norm that it was in the last steps. So no layer passes on a gradient above
      ``max_norm``. The state has these fractions, ``"fractions"``, as root mean squares
      that decay by 0.9 a step, initially 0.
    - ``"exact"``: the global norm of this step, as in ``optax.clip_by_global_norm``. It
      takes a second backward pass, without updates, which comes first.
    - ``"layer"``: the norm of each layer, and of the ends, separately.

    Args:
      tx: the optimizer, ``madam`` or ``with_quantized_params(optax.adam(1e-3))``; its
        masks and labels, if any, must be functions of the tree. Integers in the
        parameters have gradients of zero: leave them out with ``optax.masked`` or
        ``optax.partition``.
      embed: ``embed(ends, batch)`` returns :math:`x_0`, an array or a tree of arrays,
        real or complex.
      layer: ``layer(one_layer, x, **shared)`` returns the next :math:`x`, of the same
        shapes and dtypes; ``layer(one_layer, x, key, **shared)`` if the step is given a
        key. For layers that differ, a list of functions: a pattern, repeated over the
        layers, or one for each. Each function is compiled once.
      loss: ``loss(ends, x, batch)`` returns a scalar, or (scalar, aux).
      shared: ``shared(ends, batch)`` returns a dict of keyword arguments for all
        layers: masks, positions, rotary tables, or the output of an encoder. It is kept
        once, whereas ``x`` is kept for each layer. Floats in it that depend on
        parameters have gradients. A layer that changes it is an error. None is the
        empty dict.
      dtype: floating dtype of the parameters that the functions get, and of gradients.
        None, the default, decodes codes to the dtype of their leaf and does not cast
        other leaves.
      microbatches: number of equal parts along the leading axis of every array of a
        batch; example ``k`` is in part ``k % microbatches``. Each layer runs over one
        part at a time; the loss, aux and gradients are float32 means over the parts.
      has_aux: whether ``loss`` returns (scalar, aux).
      gather: function of the stored parameters of one layer, or of the ends, applied
        before they are decoded, so that devices send each other codes and not values,
        such as ``lambda w: jax.lax.with_sharding_constraint(w, P())``.
      max_norm: max norm of the gradients, above 0; None for no clip.
      clip_by: "last", "exact" or "layer", as above.

    Returns:
      The functions ``init`` and ``step``. Put both into ``jax.jit``, the step with
      parameters and state donated. ``step(params, state, batch, key=None)`` returns the
      new parameters, the new state, and the loss. With ``has_aux`` the last is (loss,
      metrics): ``metrics["aux"]``, and ``metrics["grad_norm"]``, before the clip,
      float32, a scalar for the ``"ends"`` and shape (layers,) for the ``"layers"``. The
      state is a dict of the states of the ends and of the layers. The leaves of the
      latter have a leading axis, too, except scalars that belong to the step: counts,
      hyperparameters.

    Raises:
      ValueError: if ``tx`` needs the gradients of other layers, as a global norm does;
        parameters do not have that form; a batch cannot be divided; a pattern does not
        divide the layers; ``layer`` changes the shape or dtype of ``x``, or the shared
        dict; or gradients would not be summed, as in ``jax.pmap`` or ``jax.shard_map``
        with ``check_vma=False``.
      TypeError: if an argument is of the wrong type, or ``tx`` trains integers.

    Example:
      >>> import jax, jax.numpy as jnp, optax, madax
      >>> key = jax.random.key(0)
      >>> params = {
      ...     "ends": {"in": jax.random.normal(key, (4, 16)), "out": jnp.ones((16, 1))},
      ...     "layers": {"w": jax.random.normal(key, (8, 16, 16)) / 16},
      ... }
      >>> init, step = madax.layerwise(
      ...     madax.madam(0.02),
      ...     embed=lambda ends, batch: batch[0] @ ends["in"],
      ...     layer=lambda one, x: x + jnp.tanh(x @ one["w"]),
      ...     loss=lambda ends, x, batch: jnp.mean((x @ ends["out"] - batch[1]) ** 2),
      ... )
      >>> batch = jnp.eye(4), jnp.array([[1.0], [2.0], [-1.0], [0.5]])
      >>> state, step = init(params), jax.jit(step, donate_argnums=(0, 1))
      >>> for _ in range(100):
      ...     params, state, value = step(params, state, batch)
      >>> bool(value < 0.01)
      True

    References:
      Lv et al., `Full parameter fine-tuning for large language models with limited
      resources <https://arxiv.org/abs/2306.09782>`_, 2023, fuse the update of SGD with
      the backward pass.
    """
    check_transformation("tx", tx)
    check_function("loss", loss, REMEDY)
    check_float_dtype(dtype)
    if type(microbatches) is not int:
        remedy = "pass 1 to take each batch at once"
        raise type_error("microbatches", "an int", microbatches, remedy)
    if microbatches < 1:
        raise ValueError(
            f"microbatches must be 1 or more, got {microbatches}; pass 1 to take each "
            "batch at once."
        )
    tx = optax.with_extra_args_support(tx)
    gather = gather or (lambda stored: stored)
    clip = checked_clip(max_norm, clip_by)
    setup = Setup(tx, dtype, microbatches, has_aux, gather, clip)
    run = Run(setup, stacks_of(embed, layer, shared), loss)
    return Layerwise(run.init, run.step)
