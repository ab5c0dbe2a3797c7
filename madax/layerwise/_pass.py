"""The forward and the backward pass through one stack of layers.

The forward pass keeps the input of each layer. The backward pass is a loop whose carry
holds the stacked parameters and optimizer states and updates them in place, one layer
at a time. So only one layer at a time is decoded or has a gradient. The tree that all
layers share is a constant of both loops, so it is kept once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from madax._core.names import LAYERS, Tree
from madax._core.shards import axes_returned, manual_axes, spread, varying
from madax._core.tracing import depends_on
from madax.layerwise._checks import check_layer_output
from madax.layerwise._floats import floats_of, is_inexact, norm, total
from madax.layerwise._plan import Function, Index, Stack
from madax.layerwise._setup import Setup, summed_in
from madax.layerwise._stacks import depth_of, read, splitter, write

Key = jax.Array | None


class Carry(NamedTuple):
    """The carry of the backward pass, from a layer to the layer below it."""

    layers: Tree  # updated from the last layer down
    states: Tree  # updated likewise, except for the state of the layer above
    above: Tree  # which is this
    common: Tree  # the leaves of the state that all layers share, after the step
    grads: list[jax.Array]  # for the output of the layer
    totals: list[jax.Array]  # of the gradients for what the layers share
    norms: jax.Array  # of the gradients of the layers, float32, shape (layers,)


class Done(NamedTuple):
    """The results of the forward pass that the backward pass needs."""

    start: Callable[..., tuple[Tree, Tree]]
    shared: Tree  # by all layers
    trained: list[bool]  # which leaves of shared have gradients
    inputs: Tree  # of all layers, stacked


@dataclasses.dataclass(frozen=True)
class Pass:
    """A stack, its parameters and its inputs.

    With microbatches, the inputs have a leading axis of parts.
    """

    setup: Setup
    stack: Stack
    layers: Tree
    first: int  # how many layers come before the stack
    key: Key
    given: tuple[Tree, Tree, Tree]  # the batch, and x and shared of the stack before
    learnt: list[bool]  # which leaves of these x and shared have gradients

    def apply(
        self, layer: Function, values: Tree, now: Tree, i: Index, part: Index
    ) -> Tree:
        """The output of layer ``i`` for a part of the batch: now, of (x, shared)."""
        x, shared = now
        fold, name = jax.random.fold_in, self.stack.name
        key = self.key
        keys = () if key is None else (fold(fold(key, self.first + i), part),)
        # The layer gets a copy, so that changes are noticed.
        seen = jax.tree.map(lambda x: x, shared)
        out = layer(values if name is None else values[name], x, *keys, **seen)
        check_layer_output(x, out, shared, seen)
        return jax.tree.map(lambda x, out: spread(out, varying(x)), x, out)

    def forward(self, weights: Tree) -> tuple[Tree, Done]:
        """Returns the output of the last layer, and what the backward pass needs."""
        start = self._typed_start(weights)
        over_parts = self.setup.over_parts
        x, shared = over_parts(lambda _, now: start(weights, *now), self.given)

        def one(x, now):
            i, stored = now
            values = self.setup.decode(stored)

            def run(part, now):
                return self.stack.of_kind(
                    i, lambda layer: self.apply(layer, values, now, i, part)
                )

            return over_parts(run, (x, shared)), x

        each = jnp.arange(depth_of(self.layers)), self.layers
        x, inputs = jax.lax.scan(one, x, each)
        return x, Done(start, shared, self._trained(start, weights), inputs)

    def _typed_start(self, weights: Tree) -> Callable[..., tuple[Tree, Tree]]:
        """Makes the types of ``start`` hold for all layers inside ``jax.shard_map``.

        A loop needs the same types in all layers, but a sum that starts as zeros varies
        between devices only after the first layer.
        """
        if not manual_axes():
            return self.stack.start
        given = self.setup.part(self.given)
        _, (axes, _) = axes_returned(lambda: self.stack.start(weights, *given))
        while True:

            def start(weights, *given, axes=axes):
                x, shared = self.stack.start(weights, *given)
                return jax.tree.map(spread, x, axes), shared

            def outputs(start=start):
                now = start(weights, *given)
                values = self.setup.decode(read(self.layers, 0))
                kinds = self.stack.kinds
                return [self.apply(layer, values, now, 0, 0) for layer in kinds]

            _, found = axes_returned(outputs)
            after = jax.tree.map(lambda *axes: frozenset().union(*axes), *found)
            if after == axes:
                return start
            axes = after

    def _trained(self, start: Callable[..., tuple], weights: Tree) -> list[bool]:
        """Returns which leaves of ``shared`` are floats that depend on parameters."""
        batch, *before = self.setup.part(self.given)
        if self.stack.shared is None and not jax.tree.leaves(before[1]):
            return []
        floats, merge = floats_of(before, self.learnt)

        def shared(moving, batch):
            weights, floats = moving
            return start(weights, batch, *merge(floats))[1]

        moving = weights, floats
        found = depends_on(shared, moving, batch)
        leaves = jax.tree.leaves(jax.eval_shape(shared, moving, batch))
        return [x and is_inexact(leaf) for x, leaf in zip(found, leaves, strict=True)]

    def norms(
        self, done: Done, grads: list[jax.Array], totals: list[jax.Array] | None
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        """Returns the norms that :meth:`backward` computes, without updates."""
        depth = depth_of(self.layers)

        def one(t, carry):
            grads, totals, norms = carry
            i = depth - 1 - t
            stored = read(self.layers, i)
            g_layer, grads, totals, _ = self._grads(done, stored, i, grads, totals)
            return grads, totals, norms.at[i].set(norm(g_layer))

        start = grads, self._totals(done, totals), jnp.zeros(depth, jnp.float32)
        grads, totals, norms = jax.lax.fori_loop(0, depth, one, start)
        return norms, grads, self._typed(done, totals)

    def backward(
        self,
        done: Done,
        states: Tree,
        grads: list[jax.Array],
        totals: list[jax.Array] | None,
        seen: jax.Array,
        above: Sequence[jax.Array],
    ) -> Carry:
        """Differentiates and updates all layers; returns the carry with whole states.

        Norms are computed only if they are needed. A clip uses ``seen``, known
        before for each layer, and ``above``, the norms of the stacks after this one.
        """
        depth = depth_of(self.layers)
        split, join = splitter(self.setup.tx, self.layers, states)
        own, common = split(states)

        def one(t, carry):
            i = depth - 1 - t
            # The state of the layer above is written only now, so that XLA writes in
            # place. A state is read twice, for the new state and for the step, and XLA
            # copies a stack that is written before it is last read.
            over = jnp.minimum(i + 1, depth - 1)
            own = write(carry.states, carry.above, over)
            stored, mine = read(carry.layers, i), read(own, i)
            g_layer, g_x, totals, whole = self._grads(
                done, stored, i, carry.grads, carry.totals
            )
            norms = carry.norms
            if self.setup.has_norms:
                norms = norms.at[i].set(norm(g_layer))
            g_layer = self.setup.clip(
                g_layer, norms[i], seen[i], total([*above, norms])
            )
            g_layer, old = whole(g_layer, jnp.zeros_like), join(mine, common)
            update = self.setup.update
            stored, after = update({LAYERS: stored}, g_layer, old, madax_layer=i)
            layers, after = write(carry.layers, stored, i), split(after)
            return Carry(layers, own, after[0], after[1], g_x, totals, norms)

        carry = Carry(
            self.layers,
            own,
            read(own, depth - 1),
            common,
            grads,
            self._totals(done, totals),
            jnp.zeros(depth, jnp.float32),
        )
        carry = jax.lax.fori_loop(0, depth, one, carry)
        own = write(carry.states, carry.above, 0)
        return carry._replace(
            states=join(own, carry.common), totals=self._typed(done, carry.totals)
        )

    def _grads(
        self,
        done: Done,
        stored: Tree,
        i: Index,
        grads: list[jax.Array],
        totals: list[jax.Array],
    ) -> tuple[Tree, list[jax.Array], list[jax.Array], Callable[..., Tree]]:
        """Returns gradients for a layer and its input, totals, and a merge."""
        values, whole = floats_of(self.setup.decode(stored))

        def pull(part, now):
            x, shared, grads = now
            floats, merge = _floats(x, shared, done.trained)

            def of_layer(layer):
                def output(values, floats):
                    given = merge(floats)
                    out = self.apply(layer, whole(values), given, i, part)
                    return floats_of(out)[0]

                return jax.vjp(output, values, floats)[1](grads)

            return self.stack.of_kind(i, of_layer)

        now = read(done.inputs, i), done.shared, grads
        g_layer, g = self.setup.mean_over_parts(pull, now)
        g_x, g_shared = g[: len(grads)], g[len(grads) :]
        add = zip(totals, g_shared, strict=True)
        return g_layer, g_x, [t + g.astype(t.dtype) for t, g in add], whole

    def _totals(self, done: Done, before: list[jax.Array] | None) -> list[jax.Array]:
        """Returns the sums of gradients for the shared tree, to which layers add."""
        shared, _ = floats_of(done.shared, done.trained)
        return list(map(_total, shared, before or [None] * len(shared)))

    def _typed(self, done: Done, totals: list[jax.Array]) -> list[jax.Array]:
        """Returns the sums in the dtypes of the shared tree."""
        shared, _ = floats_of(done.shared, done.trained)
        return [t.astype(x.dtype) for t, x in zip(totals, shared, strict=True)]

    def start_grads(
        self, done: Done, ends: Tree, grads: list[jax.Array]
    ) -> tuple[Tree, list[jax.Array], list[jax.Array]]:
        """Returns gradients through ``start``: for the ends, and for the inputs."""
        values, whole = floats_of(self.setup.decode(ends))

        def one(_, now):
            grads, (batch, *before) = now
            floats, merge = floats_of(before, self.learnt)

            def output(values, floats):
                out = done.start(whole(values), batch, *merge(floats))
                return _floats(*out, done.trained)[0]

            return jax.vjp(output, values, floats)[1](grads)

        g_ends, g = self.setup.mean_over_parts(one, (grads, self.given))
        count = len(floats_of(self.given[1])[0])
        return g_ends, g[:count], g[count:]


def _floats(
    x: Tree, shared: Tree, trained: Sequence[bool]
) -> tuple[list[jax.Array], Callable[..., Tree]]:
    """Applies :func:`floats_of` to the inputs of a layer that have gradients."""
    return floats_of((x, shared), [True] * len(jax.tree.leaves(x)) + list(trained))


def _total(x: jax.Array, before: jax.Array | None) -> jax.Array:
    """Returns the sum of gradients for ``x`` from the layers above, or zeros."""
    if before is not None:
        return before.astype(summed_in(x))
    return spread(jnp.zeros(x.shape, summed_in(x)), varying(x))
