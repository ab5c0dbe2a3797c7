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
import optax

from madax._core.names import ENDS, LAYERS
from madax._core.shards import (
    axes_returned,
    barrier,
    manual_axes,
    over_shards,
    spread,
    varying,
)
from madax.codes._quantize import dequantize_params
from madax.layerwise._checks import (
    check_arguments,
    check_devices,
    check_layer_output,
    check_loss,
    check_updates,
    is_inexact,
    parts_of,
)
from madax.layerwise._stacks import (
    check_layer_by_layer,
    cut,
    depth_of,
    init_stack,
    read,
    splitter,
    with_keys_of,
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

    The update of a layer must not need the gradient of another one, of this step or of
    a step before. A global norm, for example, is not known yet when the first layer
    takes its step. Madam needs none.

    A random key in the state of ``tx``, such as ``optax.add_noise`` has, becomes a key
    for each layer, with its index folded in, and one for the ends. Ordinary training
    draws different noise, because one key serves all leaves.

    Inside ``jax.shard_map`` (with ``check_vma=True``) a batch may be spread over the
    devices. Gradients of parameters that all devices share are summed over them: let
    ``loss`` take the mean, ``jax.lax.pmean(value, axis)``.

    Args:
      tx: the optimizer, ``madam`` or ``with_quantized_params(optax.adam(1e-3))``;
        its masks and labels, if any, must be functions of the tree. Integers in the
        parameters have gradients of zero: leave them out with ``optax.masked`` or
        ``optax.partition``.
      embed: ``embed(ends, batch)`` returns :math:`x_0`, an array or a tree of arrays,
        real or complex; integers in it, such as positions, are passed on by the layers.
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
      ValueError: if ``tx`` needs the gradients of other layers, as far as traces of
        its update tell; parameters are not of that form; a batch cannot be cut so;
        ``layer`` changes the shape or dtype of ``x``; or, in ``jax.shard_map`` with
        ``check_vma=False`` and in ``jax.pmap``, gradients would not be summed.
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
        # No two parts draw the same random numbers.
        ends_state = with_keys_of(self.tx.init({ENDS: ends}), depth_of(layers))
        return {ENDS: ends_state, LAYERS: init_stack(self.tx, layers)}

    def step(self, params: Any, state: Any, batch: Any, key: Any = None) -> Any:
        """Parameters, state, and the loss (and metrics) of the parameters before."""
        check_devices()
        ends, layers = parts_of(params)
        batches = cut(batch, self.microbatches)
        weights = self.decode(ends)
        _, merge = _floats(weights)
        embed = self.embedding(weights, layers, batches, key)
        x = self.each(lambda _, batch: embed(weights, batch), batches)
        x, kept = self.up(layers, x, key)
        (value, g_ends, aux), g = self.finish(weights, x, batches)
        layers, stack, g, norms = self.down(layers, state[LAYERS], kept, g, key)
        # XLA is to decode the ends again, not to keep them for all that time.
        ends, g = barrier((ends, g))
        g_ends = jax.tree.map(jnp.add, g_ends, self.begin(embed, ends, g, batches))
        if self.has_aux:
            norms = {ENDS: _norm(g_ends), LAYERS: norms}
            value = (value, {"aux": aux, "grad_norm": norms})
        g_ends = merge(g_ends, jnp.zeros_like)
        ends, ends_state = self.update({ENDS: ends}, g_ends, state[ENDS])
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
        return jax.tree.map(lambda x, out: spread(out, varying(x)), x, out)

    def embedding(self, weights: Any, layers: Any, batches: Any, key: Any) -> Any:
        """``embed``, with types that hold for all layers inside ``jax.shard_map``.

        A loop needs the same types in all layers. A sum that starts as zeros, say,
        varies from device to device only after the first layer.
        """
        if not manual_axes():
            return self.embed
        batch = batches if self.microbatches == 1 else read(batches, 0)
        _, axes = axes_returned(lambda: self.embed(weights, batch))
        while True:

            def embed(weights, batch, axes=axes):
                return jax.tree.map(spread, self.embed(weights, batch), axes)

            def first(embed=embed):
                x = embed(weights, batch)
                return self.apply(self.decode(read(layers, 0)), x, key, 0, 0)

            _, after = axes_returned(first)
            if after == axes:
                return embed
            axes = after

    def up(self, layers: Any, x: Any, key: Any) -> tuple[Any, Any]:
        """The output of the last layer, and the inputs of all."""

        def one(x, now):
            i, stored = now
            weights = self.decode(stored)
            return self.each(lambda p, x: self.apply(weights, x, key, i, p), x), x

        return jax.lax.scan(one, x, (jnp.arange(depth_of(layers)), layers))

    def finish(self, weights: Any, x: Any, batches: Any) -> tuple[Any, Any]:
        """The loss, its gradients for the ends and aux; and those for ``x``."""
        values, whole = _floats(weights)

        def one(_, now):
            x, batch = now
            floats, merge = _floats(x)

            def loss(values, floats):
                out = self.loss(whole(values), merge(floats), batch)
                value, aux = out if self.has_aux else (out, None)
                check_loss(value)
                return value, aux

            value, pull, aux = jax.vjp(loss, values, floats, has_aux=True)
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
            values, whole = _floats(self.decode(stored))

            def pull(part, now):
                x, g = now
                floats, merge = _floats(x)

                def forward(values, floats):
                    x = merge(floats)
                    return _floats(self.apply(whole(values), x, key, i, part))[0]

                return jax.vjp(forward, values, floats)[1](g)

            grads, g = self.average(pull, (read(kept, i), g))
            norms = norms.at[i].set(_norm(grads)) if self.has_aux else norms
            grads, before = whole(grads, jnp.zeros_like), join(mine, common)
            stored, after = self.update({LAYERS: stored}, grads, before, madax_layer=i)
            mine, after = split(after)
            return write(layers, stored, i), own, mine, after, g, norms

        norms = jnp.zeros(depth, jnp.float32)
        carry = (layers, own, read(own, depth - 1), common, g, norms)
        carry = jax.lax.fori_loop(0, depth, one, carry)
        layers, own, first, common, g, norms = carry
        return layers, join(write(own, first, 0), common), g, norms

    def begin(self, embed: Any, ends: Any, g: Any, batches: Any) -> Any:
        """The gradients for the ends that come through the layers."""
        values, whole = _floats(self.decode(ends))

        def one(_, now):
            g, batch = now

            def start(values):
                return _floats(embed(whole(values), batch))[0]

            return jax.vjp(start, values)[1](g)[0], ()

        return self.average(one, (g, batches))[0]

    def update(self, params: Any, grads: Any, state: Any, **extra: Any) -> Any:
        """A part of the parameters, and its state, after a step of the optimizer.

        It is a dict of one entry, so that paths are those in the whole tree.
        """
        ((name, _),) = params.items()
        updates, state = self.tx.update({name: grads}, state, params, **extra)
        check_updates(params, updates)
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

        def zeros(x, axes):
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            return spread(jnp.zeros(x.shape, dtype), axes)

        first, axes = axes_returned(lambda *now: fn(*now)[0], 0, read(xs, 0))
        parts = jnp.arange(self.microbatches)
        total, out = jax.lax.scan(add, jax.tree.map(zeros, first, axes), (parts, xs))
        return jax.tree.map(lambda x: x / self.microbatches, total), out


def _norm(tree: Any) -> jax.Array:
    """The root of the sum of squares of a tree, float32."""
    squares = [jnp.sum(jnp.float32(jnp.abs(x)) ** 2) for x in jax.tree.leaves(tree)]
    squares = [over_shards(jax.lax.psum, x) for x in squares]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def _floats(tree: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The leaves that have a derivative, real or complex; a function replaces them.

    It also takes a function to apply to all other leaves, such as integers.
    """
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def merge(floats: Sequence[Any], rest: Callable[[Any], Any] = lambda x: x) -> Any:
        new = dict(zip(where, floats, strict=True))
        out = [new[i] if i in new else rest(old) for i, old in enumerate(leaves)]
        return treedef.unflatten(out)

    return [leaves[i] for i in where], merge
