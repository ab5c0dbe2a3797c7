"""Training a layer at a time: its update is made inside the backward pass.

Layers of one shape are stacked. The way up keeps the input of each. The way down is a
loop whose carry holds the stacked parameters and optimizer states; they are updated in
place, a layer in its turn, so that no more than one layer is ever decoded or has a
gradient.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madax._checks import leaf_name
from madax._layerwise_checks import (
    check_arguments,
    check_layer_output,
    check_loss,
    is_float,
    parts_of,
)
from madax._leaves import flatten_named
from madax._quantize_params import dequantize_params
from madax._stacks import (
    ENDS,
    LAYERS,
    check_layer_by_layer,
    depth_of,
    init_stack,
    read,
    splitter,
    write,
)


class Layerwise(NamedTuple):
    """Training a layer at a time: a pair of pure functions, from :func:`layerwise`.

    Attributes:
      init: ``state = init(params)``.
      step: ``params, state, value = step(params, state, batch)``.
    """

    init: Callable[[Any], Any]
    step: Callable[..., Any]


def layerwise(
    tx: optax.GradientTransformation,
    embed: Callable[[Any, Any], Any],
    layer: Callable[..., Any],
    loss: Callable[[Any, Any, Any], Any],
    *,
    dtype: Any = jnp.bfloat16,
    microbatches: int = 1,
    has_aux: bool = False,
    gather: Callable[[Any], Any] | None = None,
) -> Layerwise:
    r"""Trains a stack of layers with one of them decoded, and one gradient, at a time.

    .. math::

      x_0 &= \mathrm{embed}(e), \qquad x_{i+1} = \mathrm{layer}(w_i, x_i), \qquad
        L = \mathrm{loss}(e, x_n) \\
      w_i &\leftarrow w_i + \mathrm{tx}(\partial L / \partial w_i), \qquad
        i = n - 1, \dots, 0, \text{ each in its turn}

    A train step takes the memory of the parameters and the optimizer state, of one
    layer's values and gradients, of the layers' inputs :math:`x_i`, and of one layer's
    activations, as with ``jax.checkpoint`` around it. On codes of 8 bits, with moments
    of 8 bits, that is little more than two bytes per parameter.

    Parameters are ``{"ends": tree, "layers": tree}``. The leaves of the layers have a
    leading axis that counts layers; :func:`split_layers` makes them from a Flax model.
    The ends are what comes before and after, and both may use them (tied embeddings).
    All may be floats or codes. The result is that of the same parameters with a list
    of layers, ``{"ends": ..., "layers": [...]}``, trained by ``tx`` as usual,
    random bits of the rounding included.

    The update of a layer must not need the gradient of another one. A global norm, for
    example, is not known yet when the first layer takes its step. Madam needs none.

    Args:
      tx: the optimizer, ``madam`` or ``with_quantized_params(optax.adam(1e-3))``;
        its masks and labels, if any, are to be functions of the tree.
      embed: ``embed(ends, batch)`` returns :math:`x_0`, an array or a tree of arrays;
        integers in it, such as positions, are passed on by the layers.
      layer: ``layer(one_layer, x)`` returns the next :math:`x`, of the same shapes and
        dtypes; ``layer(one_layer, x, key)`` if the step is given a key.
      loss: ``loss(ends, x, batch)`` returns a scalar, or (scalar, aux).
      dtype: floating dtype of the values that the functions are given for parameters,
        and of gradients; None for float32 in the place of codes and others as they are.
      microbatches: into how many parts of equal size the leading axis of every array of
        a batch is cut, example ``k`` into part ``k % microbatches``. Each layer runs
        over them in its turn; the loss, aux and gradients are their means, float32.
      has_aux: whether ``loss`` returns (scalar, aux).
      gather: function of the parameters of one layer, or of the ends, as they are
        stored, applied to them before they are decoded; where they are sharded, such as
        ``lambda w: jax.lax.with_sharding_constraint(w, P())``, so that it is codes that
        devices send each other, not their values.

    Returns:
      The functions ``init`` and ``step``, to be jitted, the step with parameters and
      state donated. ``step(params, state, batch, key=None)`` returns the new
      parameters, the new state, and the loss. With ``has_aux`` it returns, in the place
      of the loss, (loss, metrics): ``metrics["aux"]``, and ``metrics["grad_norm"]``,
      float32, of the ``"ends"``, and of the ``"layers"`` one each. The state is a dict
      of that of the ends and that of the layers, whose leaves have a leading axis, too,
      but for scalars that belong to the step: counts, hyperparameters.

    Raises:
      ValueError: if ``tx`` needs the gradients of all layers at once, as far as that
        can be told from one step; parameters are not of that form; a batch cannot be
        cut so; or ``layer`` changes the shape or dtype of ``x``.
      TypeError: if an argument is of the wrong type.

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
      ...     dtype=jnp.float32,
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
    check_arguments(tx, dtype, microbatches, embed=embed, layer=layer, loss=loss)
    tx = optax.with_extra_args_support(tx)
    gather = gather or (lambda stored: stored)
    run = _Run(tx, embed, layer, loss, dtype, microbatches, has_aux, gather)
    return Layerwise(run.init, run.step)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The arguments of :func:`layerwise`, and what it returns as methods."""

    tx: optax.GradientTransformationExtraArgs
    embed: Callable[[Any, Any], Any]
    layer: Callable[..., Any]
    loss: Callable[[Any, Any, Any], Any]
    dtype: Any
    microbatches: int
    has_aux: bool
    gather: Callable[[Any], Any]

    def init(self, params: Any) -> Any:
        """The state of the ends, and that of the layers."""
        ends, layers = parts_of(params)
        check_layer_by_layer(self.tx, params)
        return {ENDS: self.tx.init({ENDS: ends}), LAYERS: init_stack(self.tx, layers)}

    def step(self, params: Any, state: Any, batch: Any, key: Any = None) -> Any:
        """Parameters, state, and the loss (and metrics) of the parameters before."""
        ends, layers = parts_of(params)
        batches = _cut(batch, self.microbatches)
        weights = self.decode(ends)
        x = self.each(lambda _, batch: self.embed(weights, batch), batches)
        x, kept = self.up(layers, x, key)
        (value, g_ends, aux), g = self.finish(weights, x, batches)
        layers, stack, g, norms = self.down(layers, state[LAYERS], kept, g, key)
        # The barrier makes XLA decode the ends again, rather than keep them for all
        # that time.
        ends, g = jax.lax.optimization_barrier((ends, g))
        g_ends = jax.tree.map(jnp.add, g_ends, self.begin(ends, g, batches))
        ends, ends_state = self.update({ENDS: ends}, g_ends, state[ENDS])
        if self.has_aux:
            norms = {ENDS: _norm(g_ends), LAYERS: norms}
            value = (value, {"aux": aux, "grad_norm": norms})
        params = {ENDS: ends, LAYERS: layers}
        return params, {ENDS: ends_state, LAYERS: stack}, value

    def decode(self, stored: Any) -> Any:
        """The values of parameters, which the functions are given."""
        return dequantize_params(self.gather(stored), self.dtype)

    def apply(self, weights: Any, x: Any, key: Any, i: Any, part: Any) -> Any:
        """What a layer, of values ``weights``, makes of ``x``."""
        if key is None:
            out = self.layer(weights, x)
        else:
            key = jax.random.fold_in(jax.random.fold_in(key, i), part)
            out = self.layer(weights, x, key)
        check_layer_output(x, out)
        return out

    def up(self, layers: Any, x: Any, key: Any) -> tuple[Any, Any]:
        """The output of the last layer, and the inputs of all."""

        def one(x, now):
            i, stored = now
            weights = self.decode(stored)
            return self.each(lambda p, x: self.apply(weights, x, key, i, p), x), x

        return jax.lax.scan(one, x, (jnp.arange(depth_of(layers)), layers))

    def finish(self, weights: Any, x: Any, batches: Any) -> tuple[Any, Any]:
        """The loss, its gradients for the ends and aux; and those for ``x``."""

        def one(_, now):
            x, batch = now
            floats, merge = _floats(x)

            def loss(weights, floats):
                out = self.loss(weights, merge(floats), batch)
                value, aux = out if self.has_aux else (out, None)
                check_loss(value)
                return value, aux

            value, pull, aux = jax.vjp(loss, weights, floats, has_aux=True)
            g_ends, g = pull(jnp.ones_like(value))
            return (value, g_ends, aux), g

        return self.average(one, (x, batches))

    def down(self, layers: Any, stack: Any, kept: Any, g: Any, key: Any) -> Any:
        """Layers and their states after the step, the gradients for the first input.

        The norms of the layers' gradients come along if they are asked for.
        """
        depth = depth_of(layers)
        split, join = splitter(self.tx, layers, stack)
        own, common = split(stack)

        def one(t, carry):
            layers, own, above, _, g, norms = carry
            i = depth - 1 - t
            # The state of the layer above is written only now, in place. XLA would copy
            # a stack that is written while it may still be read, and a state is read
            # twice: for the new state and for the step.
            own = write(own, above, jnp.minimum(i + 1, depth - 1))
            stored, mine = read(layers, i), read(own, i)
            weights = self.decode(stored)

            def pull(part, now):
                x, g = now
                floats, merge = _floats(x)

                def forward(weights, floats):
                    x = merge(floats)
                    return _floats(self.apply(weights, x, key, i, part))[0]

                return jax.vjp(forward, weights, floats)[1](g)

            grads, g = self.average(pull, (read(kept, i), g))
            before = join(mine, common)
            stored, after = self.update({LAYERS: stored}, grads, before, layer=i)
            mine, after = split(after)
            norms = norms.at[i].set(_norm(grads)) if self.has_aux else norms
            return write(layers, stored, i), own, mine, after, g, norms

        norms = jnp.zeros(depth, jnp.float32)
        carry = (layers, own, read(own, depth - 1), common, g, norms)
        carry = jax.lax.fori_loop(0, depth, one, carry)
        layers, own, first, common, g, norms = carry
        return layers, join(write(own, first, 0), common), g, norms

    def begin(self, ends: Any, g: Any, batches: Any) -> Any:
        """The gradients for the ends that come through the layers."""
        weights = self.decode(ends)

        def one(_, now):
            g, batch = now
            _, pull = jax.vjp(lambda w: _floats(self.embed(w, batch))[0], weights)
            return pull(g)[0], ()

        return self.average(one, (g, batches))[0]

    def update(self, params: Any, grads: Any, state: Any, **extra: Any) -> Any:
        """A part of the parameters, and its state, after a step of the optimizer.

        It is a dict of one entry, so that paths are those in the whole tree.
        """
        ((name, _),) = params.items()
        updates, state = self.tx.update({name: grads}, state, params, **extra)
        new: Any = optax.apply_updates(params, updates)
        return new[name], state

    def each(self, fn: Callable[[Any, Any], Any], xs: Any) -> Any:
        """``fn(part, x)`` of every microbatch."""
        if self.microbatches == 1:
            return fn(0, xs)
        parts = jnp.arange(self.microbatches)
        return jax.lax.map(lambda now: fn(*now), (parts, xs))

    def average(self, fn: Callable[[Any, Any], Any], xs: Any) -> tuple[Any, Any]:
        """As :meth:`each`, of a pair: the mean of the first, and all of the second."""
        if self.microbatches == 1:
            return fn(0, xs)

        def add(total, now):
            x, out = fn(*now)
            return jax.tree.map(lambda t, x: t + jnp.asarray(x, t.dtype), total, x), out

        def zeros(x):
            return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

        first = jax.eval_shape(fn, 0, jax.tree.map(lambda x: x[0], xs))[0]
        parts = jnp.arange(self.microbatches)
        total, out = jax.lax.scan(add, jax.tree.map(zeros, first), (parts, xs))
        return jax.tree.map(lambda x: x / self.microbatches, total), out


def _norm(tree: Any) -> jax.Array:
    """The root of the sum of squares of a tree, float32."""
    squares = [jnp.sum(jnp.float32(x) ** 2) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def _floats(x: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The floating leaves of a tree, and a function that replaces them."""
    leaves, treedef = jax.tree.flatten(x)
    where = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def merge(floats: Sequence[Any]) -> Any:
        new = dict(zip(where, floats, strict=True))
        return treedef.unflatten([new.get(i, old) for i, old in enumerate(leaves)])

    return [leaves[i] for i in where], merge


def _cut(batch: Any, parts: int) -> Any:
    """The batch in parts, along a new leading axis."""
    if parts == 1:
        return batch

    names, leaves, treedef = flatten_named(batch)
    split = []
    for name, x in zip(names, leaves, strict=True):
        shape = np.shape(x)
        if not shape or shape[0] % parts:
            raise ValueError(
                f"{leaf_name('batch', name)} has shape {shape}, whose leading axis "
                f"must be a multiple of microbatches={parts}."
            )
        # The examples of a part are not neighbours: where the axis is sharded, each
        # device has some of every part.
        x = jnp.reshape(x, (shape[0] // parts, parts, *shape[1:]))
        split.append(jnp.moveaxis(x, 1, 0))
    return treedef.unflatten(split)
