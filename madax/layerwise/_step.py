"""The train step that updates each layer of a stack inside the backward pass.

Layers of one shape are stacked. The forward pass keeps the input of each layer. The
backward pass is a loop whose carry holds the stacked parameters and optimizer states
and updates them in place, one layer at a time. So no more than one layer is ever
decoded or has a gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from madax._core.checks import (
    Number,
    check_float_dtype,
    check_function,
    check_transformation,
)
from madax._core.names import ENDS, LAYERS, Tree
from madax._core.shards import axes_returned, barrier, manual_axes, spread, varying
from madax.codes._quantize import dequantize_params
from madax.layerwise._checks import (
    check_devices,
    check_layer_output,
    check_loss,
    check_params,
    check_updates,
)
from madax.layerwise._clip import ClipBy, check_clip, clipped, reference, total
from madax.layerwise._floats import floats_of, norm
from madax.layerwise._stacks import (
    Optimizer,
    check_layer_by_layer,
    cut,
    depth_of,
    init_stack,
    read,
    splitter,
    with_keys_of,
    write,
)

Embed = Callable[[Tree, Tree], Tree]
Index = int | jax.Array  # of a layer, or of a part of the batch
Key = jax.Array | None
NORM = "norm"  # in the state, of the gradients of the last step


class Layerwise(NamedTuple):
    """The pair of pure functions that :func:`layerwise` returns."""

    init: Callable[[Tree], Tree]
    step: Callable[..., tuple[Tree, Tree, Tree]]


def layerwise(
    tx: optax.GradientTransformation,
    embed: Embed,
    layer: Callable[..., Tree],
    loss: Callable[[Tree, Tree, Tree], Tree],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    microbatches: int = 1,
    has_aux: bool = False,
    gather: Callable[[Tree], Tree] | None = None,
    max_norm: Number | None = None,
    clip_by: ClipBy = "last",
) -> Layerwise:
    r"""Trains a stack of layers with one layer decoded, and one gradient, at a time.

    .. math::

      x_0 &= \mathrm{embed}(e), \qquad x_{i+1} = \mathrm{layer}(w_i, x_i), \qquad
        L = \mathrm{loss}(e, x_n) \\
      w_i &\leftarrow w_i + \mathrm{tx}(\partial L / \partial w_i), \qquad
        i = n - 1, \dots, 0, \text{ one after the other}

    A train step takes the memory of the parameters, the optimizer state, the inputs
    :math:`x_i` of all layers, and the values, gradients and activations of one layer.
    On codes of 8 bits, with moments of 8 bits, the parameters and the state take little
    more than two bytes per parameter.

    Parameters are ``{"ends": tree, "layers": tree}``. The leaves of the layers have a
    leading axis that counts layers; :func:`madax.split_layers` makes them from a Flax
    model. The ends are the parameters before and after the stack; ``embed`` and
    ``loss`` may both use them (tied embeddings). All may be floats or codes. The result
    equals ordinary training by ``tx`` of the same parameters with a list of layers,
    ``{"ends": ..., "layers": [...]}``, random bits of the rounding included.

    A random key in the state of ``tx``, such as ``optax.add_noise`` has, becomes one
    key per layer, with its index folded in, and one for the ends. Ordinary training
    draws different noise, because one key serves all leaves.

    Inside ``jax.shard_map`` (with ``check_vma=True``) a batch may be spread over the
    devices. Gradients of parameters that all devices share are summed over them: let
    ``loss`` take the mean, ``jax.lax.pmean(value, axis)``.

    With ``max_norm`` gradients are clipped before ``tx`` gets them. Layers are updated
    before the norm of all gradients is known, so ``clip_by`` tells which norm counts:

    - ``"last"``: the global norm of the last step, or that of this step's layers so
      far, from the last one down, if that is larger. So no layer passes on a gradient
      above ``max_norm``. The state has one more number, ``"norm"``, 0 at first.
    - ``"exact"``: the global norm of this step, as in ``optax.clip_by_global_norm``. A
      backward pass that updates nothing comes before the other, and takes its time.
    - ``"layer"``: the norm of each layer for itself, and of the ends for themselves.

    Args:
      tx: the optimizer, ``madam`` or ``with_quantized_params(optax.adam(1e-3))``; its
        masks and labels, if any, must be functions of the tree. Integers in the
        parameters have gradients of zero: leave them out with ``optax.masked`` or
        ``optax.partition``.
      embed: ``embed(ends, batch)`` returns :math:`x_0`, an array or a tree of arrays,
        real or complex; the layers pass on integers in it, such as positions.
      layer: ``layer(one_layer, x)`` returns the next :math:`x`, of the same shapes and
        dtypes; ``layer(one_layer, x, key)`` if the step is given a key.
      loss: ``loss(ends, x, batch)`` returns a scalar, or (scalar, aux).
      dtype: floating dtype of the parameters that the functions are given, and of
        gradients. None, the default, decodes codes to float32 and leaves others as they
        are.
      microbatches: number of equal parts along the leading axis of every array of a
        batch; example ``k`` is in part ``k % microbatches``. Each layer runs over one
        part at a time; the loss, aux and gradients are float32 means over the parts.
      has_aux: whether ``loss`` returns (scalar, aux).
      gather: function of the stored parameters of one layer, or of the ends, applied
        before they are decoded; for sharded parameters, such as
        ``lambda w: jax.lax.with_sharding_constraint(w, P())``, so that devices send
        each other codes and not values.
      max_norm: max norm of the gradients, above 0; None for no clip.
      clip_by: "last", "exact" or "layer", as above.

    Returns:
      The functions ``init`` and ``step``, to be jitted, the step with parameters and
      state donated. ``step(params, state, batch, key=None)`` returns the new
      parameters, the new state, and the loss. With ``has_aux`` the last is (loss,
      metrics): ``metrics["aux"]``, and ``metrics["grad_norm"]``, before the clip,
      float32, a scalar for the ``"ends"`` and shape (layers,) for the ``"layers"``. The
      state is a dict of the states of the ends and of the layers. The leaves of the
      latter have a leading axis, too, except scalars that belong to the step: counts,
      hyperparameters.

    Raises:
      ValueError: if ``tx`` needs the gradients of other layers, as a global norm does;
        parameters are not of that form; a batch cannot be divided; ``layer`` changes
        the shape or dtype of ``x``; or, in ``jax.shard_map`` with ``check_vma=False``
        and in ``jax.pmap``, gradients would not be summed.
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
    for name, function in {"embed": embed, "layer": layer, "loss": loss}.items():
        check_function(name, function, "pass one with the arguments above")
    check_float_dtype(dtype)
    if type(microbatches) is not int or microbatches < 1:
        raise ValueError(f"microbatches must be an int above 0, got {microbatches!r}.")
    tx = optax.with_extra_args_support(tx)
    check_clip(max_norm, clip_by)
    gather = gather or (lambda stored: stored)
    run = _Run(
        tx,
        embed,
        layer,
        loss,
        dtype,
        microbatches,
        has_aux,
        gather,
        max_norm,
        "layer" if max_norm is None else clip_by,
    )
    return Layerwise(run.init, run.step)


class _Carry(NamedTuple):
    """What the backward pass carries from a layer to the layer below it."""

    layers: Tree  # updated from the last layer down
    states: Tree  # updated likewise, except for the state of the layer above
    above: Tree  # which is this
    shared: Tree  # the leaves of the state that all layers share, after the step
    grads: Tree  # for the output of the layer
    norms: jax.Array  # of the gradients of the layers, float32, shape (layers,)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The arguments of :func:`layerwise`, and the functions that it returns."""

    tx: Optimizer
    embed: Embed
    layer: Callable[..., Tree]
    loss: Callable[[Tree, Tree, Tree], Tree]
    dtype: jax.typing.DTypeLike | None
    microbatches: int
    has_aux: bool
    gather: Callable[[Tree], Tree]
    max_norm: Number | None
    clip_by: ClipBy

    def init(self, params: Tree) -> Tree:
        """The states of the ends and of the layers."""
        check_params(params)
        ends, layers = params[ENDS], params[LAYERS]
        check_layer_by_layer(self.tx, params)
        # No two parts draw the same random numbers.
        ends_state = with_keys_of(self.tx.init({ENDS: ends}), depth_of(layers))
        states = {ENDS: ends_state, LAYERS: init_stack(self.tx, layers)}
        return states | ({NORM: jnp.float32(0)} if self.clip_by == "last" else {})

    def step(self, params: Tree, state: Tree, batch: Tree, key: Key = None) -> Tree:
        """New parameters and state, and the loss (and metrics) before the step."""
        check_devices()
        check_params(params)
        ends, layers = params[ENDS], params[LAYERS]
        batches = cut(batch, self.microbatches)
        weights = self.decode(ends)
        _, merge = floats_of(weights)
        embed = self.typed_embed(weights, layers, batches, key)
        x = self.over_parts(lambda _, batch: embed(weights, batch), batches)
        x, inputs = self.forward(layers, x, key)
        (value, g_ends, aux), grads = self.loss_grads(weights, x, batches)
        seen = self.norm_before(
            state, weights, layers, inputs, (g_ends, grads), embed, batches, key
        )
        last = self.backward(layers, state[LAYERS], inputs, grads, key, seen)
        # XLA shall decode the ends twice and not keep their values through the pass.
        ends, grads = barrier((ends, last.grads))
        g_embed = self.embed_grads(embed, self.decode(ends), grads, batches)
        g_ends = jax.tree.map(jnp.add, g_ends, g_embed)
        norms = {ENDS: norm(g_ends), LAYERS: last.norms}
        if self.has_aux:
            value = (value, {"aux": aux, "grad_norm": norms})
        whole = total([norms[ENDS], norms[LAYERS]])
        by = reference(self.clip_by, norms[ENDS], seen, whole)
        g_ends = merge(clipped(g_ends, by, self.max_norm), jnp.zeros_like)
        ends, ends_state = self.update({ENDS: ends}, g_ends, state[ENDS])
        params = {ENDS: ends, LAYERS: last.layers}
        state = {ENDS: ends_state, LAYERS: last.states}
        if self.clip_by == "last":
            # A norm that is not finite would stop the next step, or all of them.
            state[NORM] = jnp.where(jnp.isfinite(whole), whole, seen)
        return params, state, value

    def norm_before(
        self,
        state: Tree,
        weights: Tree,
        layers: Tree,
        inputs: Tree,
        grads: tuple[Tree, Tree],
        embed: Embed,
        batches: Tree,
        key: Key,
    ) -> jax.Array:
        """The global norm that is known before the layers are updated."""
        if self.clip_by != "exact":
            return state.get(NORM, jnp.float32(0))
        depth, (g_ends, g_x) = depth_of(layers), grads

        def one(t, carry):
            g_x, norms = carry
            i = depth - 1 - t
            g_layer, g_x, _ = self.layer_grads(
                read(layers, i), read(inputs, i), g_x, key, i
            )
            return g_x, norms.at[i].set(norm(g_layer))

        norms = jnp.zeros(depth, jnp.float32)
        g_x, norms = jax.lax.fori_loop(0, depth, one, (g_x, norms))
        g_embed = self.embed_grads(embed, weights, g_x, batches)
        return total([norm(jax.tree.map(jnp.add, g_ends, g_embed)), norms])

    def decode(self, stored: Tree) -> Tree:
        """The values of stored parameters, which the functions are given."""
        return dequantize_params(self.gather(stored), self.dtype)

    def apply(self, weights: Tree, x: Tree, key: Key, i: Index, part: Index) -> Tree:
        """The output of layer ``i``, of values ``weights``, for a part of the batch."""
        fold = jax.random.fold_in
        keys = () if key is None else (fold(fold(key, i), part),)
        out = self.layer(weights, x, *keys)
        check_layer_output(x, out)
        return jax.tree.map(lambda x, out: spread(out, varying(x)), x, out)

    def typed_embed(
        self, weights: Tree, layers: Tree, batches: Tree, key: Key
    ) -> Embed:
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

    def forward(self, layers: Tree, x: Tree, key: Key) -> tuple[Tree, Tree]:
        """The output of the last layer, and the inputs of all layers."""

        def one(x, now):
            i, stored = now
            weights = self.decode(stored)
            return self.over_parts(lambda p, x: self.apply(weights, x, key, i, p), x), x

        return jax.lax.scan(one, x, (jnp.arange(depth_of(layers)), layers))

    def loss_grads(self, weights: Tree, x: Tree, batches: Tree) -> tuple[Tree, Tree]:
        """(Loss, its gradients for the ends, aux), and its gradients for ``x``."""
        values, whole = floats_of(weights)

        def one(_, now):
            x, batch = now
            floats, merge = floats_of(x)

            def loss(values, floats):
                out = self.loss(whole(values), merge(floats), batch)
                value, aux = out if self.has_aux else (out, None)
                check_loss(value)
                return value, aux

            value, pull, aux = jax.vjp(loss, values, floats, has_aux=True)
            g_ends, g_x = pull(jnp.ones_like(value))
            return (value, g_ends, aux), g_x

        return self.mean_over_parts(one, (x, batches))

    def backward(
        self,
        layers: Tree,
        states: Tree,
        inputs: Tree,
        grads: Tree,
        key: Key,
        seen: jax.Array,
    ) -> _Carry:
        """Differentiates and updates all layers; returns the carry with whole states.

        Norms are computed only if they are asked for. ``seen`` is the norm known
        before.
        """
        depth = depth_of(layers)
        split, join = splitter(self.tx, layers, states)
        own, shared = split(states)

        def one(t, carry):
            i = depth - 1 - t
            # The state of the layer above is written only now, in place. XLA would copy
            # a stack that is written while it may still be read, and a state is read
            # twice: for the new state and for the step.
            above = jnp.minimum(i + 1, depth - 1)
            own = write(carry.states, carry.above, above)
            stored, mine = read(carry.layers, i), read(own, i)
            g_layer, g_x, whole = self.layer_grads(
                stored, read(inputs, i), carry.grads, key, i
            )
            norms = carry.norms
            if self.has_aux or self.max_norm is not None:
                norms = norms.at[i].set(norm(g_layer))
            by = reference(self.clip_by, norms[i], seen, total([norms]))
            g_layer = whole(clipped(g_layer, by, self.max_norm), jnp.zeros_like)
            old = join(mine, shared)
            stored, after = self.update({LAYERS: stored}, g_layer, old, madax_layer=i)
            layers, after = write(carry.layers, stored, i), split(after)
            return _Carry(layers, own, after[0], after[1], g_x, norms)

        norms = jnp.zeros(depth, jnp.float32)
        carry = _Carry(layers, own, read(own, depth - 1), shared, grads, norms)
        carry = jax.lax.fori_loop(0, depth, one, carry)
        own = write(carry.states, carry.above, 0)
        return carry._replace(states=join(own, carry.shared))

    def layer_grads(
        self, stored: Tree, x: Tree, grads: Tree, key: Key, i: Index
    ) -> tuple[Tree, Tree, Callable[..., Tree]]:
        """The gradients of the floats of a layer, those of its input, and a merge."""
        values, whole = floats_of(self.decode(stored))

        def pull(part, now):
            x, grads = now
            floats, merge = floats_of(x)

            def output(values, floats):
                x = merge(floats)
                return floats_of(self.apply(whole(values), x, key, i, part))[0]

            return jax.vjp(output, values, floats)[1](grads)

        return *self.mean_over_parts(pull, (x, grads)), whole

    def embed_grads(
        self, embed: Embed, weights: Tree, grads: Tree, batches: Tree
    ) -> Tree:
        """The gradients for the ends as ``embed`` uses them."""
        values, whole = floats_of(weights)

        def one(_, now):
            grads, batch = now

            def output(values):
                return floats_of(embed(whole(values), batch))[0]

            return jax.vjp(output, values)[1](grads)[0], ()

        return self.mean_over_parts(one, (grads, batches))[0]

    def update(self, params: Tree, grads: Tree, state: Tree, **extra: Index) -> Tree:
        """A part of the parameters, and its state, after a step of the optimizer.

        ``params`` has one entry, so that paths start as in the whole tree.
        """
        ((name, _),) = params.items()
        updates, state = self.tx.update({name: grads}, state, params, **extra)
        check_updates(params, updates)
        new: Tree = optax.apply_updates(params, updates)
        return new[name], state

    def over_parts(self, fn: Callable[[Index, Tree], Tree], xs: Tree) -> Tree:
        """``fn(part, x)`` of every microbatch."""
        if self.microbatches == 1:
            return fn(0, xs)
        parts = jnp.arange(self.microbatches)
        return jax.lax.map(lambda now: fn(*now), (parts, xs))

    def mean_over_parts(self, fn: Callable[..., Tree], xs: Tree) -> tuple[Tree, Tree]:
        """Like :meth:`over_parts`, but takes the mean of the first result of ``fn``."""
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
