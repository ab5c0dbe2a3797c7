"""The train step of :func:`madax.layerwise`: both passes, stack by stack."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from madax._core.names import ENDS, LAYERS, Tree
from madax._core.shards import barrier
from madax._core.tracing import shapes_of
from madax.layerwise._checks import (
    check_devices,
    check_loss,
    check_params,
    check_stacks_of_state,
)
from madax.layerwise._clip import averaged, times_so_far
from madax.layerwise._floats import floats_of, norm, total
from madax.layerwise._pass import Done, Key, Pass
from madax.layerwise._plan import Stack
from madax.layerwise._setup import Setup
from madax.layerwise._stacks import (
    check_layer_by_layer,
    cut,
    depth_of,
    init_stack,
    with_keys_of,
)

FRACTIONS = "fractions"  # in the state: of the global norm, on average


@dataclasses.dataclass(frozen=True)
class Run:
    """The functions that :func:`madax.layerwise` returns."""

    setup: Setup
    stacks: list[Stack]
    loss: Callable[[Tree, Tree, Tree], Tree]

    def init(self, params: Tree) -> Tree:
        """Returns the states of the ends and of the layers."""
        check_params(params, self.stacks)
        tx = self.setup.tx
        check_layer_by_layer(tx, params, [stack.name for stack in self.stacks])
        states, depth = {}, 0
        for stack in self.stacks:
            layers = stack.layers(params)
            states[stack.name] = init_stack(tx, layers, depth)
            depth += depth_of(layers)
        # Each part draws random numbers of its own.
        ends = with_keys_of(tx.init({ENDS: params[ENDS]}), depth)
        state = {ENDS: ends, LAYERS: states.get(None, states)}
        if self.setup.clip.has_memory:
            state[FRACTIONS] = self.no_fractions(params)
        return state

    def no_fractions(self, params: Tree) -> Tree:
        """The fractions before the first step: zeros, which do not count."""
        depths = {one.name: depth_of(one.layers(params)) for one in self.stacks}
        norms = {name: jnp.zeros(n, jnp.float32) for name, n in depths.items()}
        return {ENDS: jnp.float32(0), LAYERS: norms.get(None, norms)}

    def fractions(self, params: Tree, state: Tree) -> Tree:
        """The fractions in a state; none in a state of steps that did not clip."""
        zeros = self.no_fractions(params)
        found = state.get(FRACTIONS, zeros)
        if shapes_of(found) != shapes_of(zeros):
            raise ValueError(
                f"state[{FRACTIONS!r}] is of other layers than params; call init again."
            )
        return found

    def step(self, params: Tree, state: Tree, batch: Tree, key: Key = None) -> Tree:
        """Returns new parameters and state, and the loss (and metrics) before."""
        check_devices()
        check_params(params, self.stacks)
        check_stacks_of_state(state, self.stacks)
        ends, setup = params[ENDS], self.setup
        clips_by_last = setup.clip.has_memory
        fractions = self.fractions(params, state) if clips_by_last else {}
        batches = cut(batch, setup.microbatches)
        weights = setup.decode(ends)
        _, merge = floats_of(weights)
        passes, x = self.forward(params, weights, batches, key)
        (value, g_ends, aux), grads = self.loss_grads(weights, x, batches)
        passes.reverse()
        seen, times = jnp.float32(1), [jnp.ones(depth_of(p.layers)) for p, _ in passes]
        if setup.clip.is_exact:
            seen = self.exact_norm(passes, ends, g_ends, grads)
        if clips_by_last:
            last, names = fractions[LAYERS], [one.stack.name for one, _ in passes]
            stacks = [last if name is None else last[name] for name in names]
            times = times_so_far(fractions[ENDS], stacks)
        new, states, norms, totals = {}, {}, {}, None
        for (one, done), more in zip(passes, times, strict=True):
            name = one.stack.name
            mine = state[LAYERS] if name is None else state[LAYERS][name]
            above = list(norms.values())
            last = one.backward(done, mine, grads, totals, seen * more, above)
            new[name] = last.layers if name is None else last.layers[name]
            states[name], norms[name] = last.states, last.norms
            # So that XLA decodes the ends twice, and does not keep their values
            # meanwhile.
            ends, grads = barrier((ends, [*last.grads, *last.totals]))
            g_start, grads, totals = one.start_grads(done, ends, grads)
            g_ends = jax.tree.map(jnp.add, g_ends, g_start)
        own, layer_norms = norm(g_ends), norms
        norms = {ENDS: own, LAYERS: layer_norms.get(None, layer_norms)}
        if setup.has_aux:
            value = (value, {"aux": aux, "grad_norm": norms})
        whole = total([own, *layer_norms.values()])
        g_ends = merge(setup.clip(g_ends, own, seen, whole), jnp.zeros_like)
        ends, ends_state = setup.update({ENDS: ends}, g_ends, state[ENDS])
        params = {ENDS: ends, LAYERS: new.get(None, new)}
        after = {ENDS: ends_state, LAYERS: states.get(None, states)}
        if clips_by_last:
            after[FRACTIONS] = jax.tree.map(partial(averaged, whole), norms, fractions)
        return params, after, value

    def forward(
        self, params: Tree, weights: Tree, batches: Tree, key: Key
    ) -> tuple[list[tuple[Pass, Done]], Tree]:
        """The passes through all stacks, and the output of the last."""
        passes, first, x, shared, learnt = [], 0, (), {}, []
        for stack in self.stacks:
            layers, given = stack.layers(params), (batches, x, shared)
            one = Pass(self.setup, stack, layers, first, key, given, learnt)
            x, done = one.forward(weights)
            passes.append((one, done))
            learnt = [True] * len(jax.tree.leaves(x)) + done.trained
            first, shared = first + depth_of(layers), done.shared
        return passes, x

    def exact_norm(
        self,
        passes: list[tuple[Pass, Done]],
        ends: Tree,
        g_ends: Tree,
        grads: list[jax.Array],
    ) -> jax.Array:
        """Returns the norm of all gradients, by a backward pass without updates."""
        norms, totals = [], None
        for one, done in passes:
            found, grads, totals = one.norms(done, grads, totals)
            g_start, grads, totals = one.start_grads(done, ends, [*grads, *totals])
            g_ends = jax.tree.map(jnp.add, g_ends, g_start)
            norms.append(found)
        return total([norm(g_ends), *norms])

    def loss_grads(self, weights: Tree, x: Tree, batches: Tree) -> tuple[Tree, Tree]:
        """Returns (loss, gradients for the ends, aux), and the gradients for ``x``."""
        values, whole = floats_of(weights)

        def one(_, now):
            x, batch = now
            floats, merge = floats_of(x)

            def loss(values, floats):
                out = self.loss(whole(values), merge(floats), batch)
                value, aux = out if self.setup.has_aux else (out, None)
                check_loss(value)
                return value, aux

            value, pull, aux = jax.vjp(loss, values, floats, has_aux=True)
            g_ends, g_x = pull(jnp.ones_like(value))
            return (value, g_ends, aux), g_x

        return self.setup.mean_over_parts(one, (x, batches))
