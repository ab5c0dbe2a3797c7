"""Loops in which models of others are trained on codes."""

import jax
import optax
from flax import nnx
from flax.training import train_state

import madax

# Directions of Muon would take most of the time; others.json has their axes.
OPTIMIZER = madax.madam(0.02, moment_format=madax.MomentFormat(8))


def by_nnx(other, model, steps):
    """Flax's own loop: nnx.value_and_grad and nnx.Optimizer."""
    model = madax.hijax.lift(model)
    tx = madax.hijax.optimizer(OPTIMIZER)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(other.error)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return losses, madax.hijax.lower(model)


def by_train_state(other, params, steps):
    """The loop of linen: jax.value_and_grad and a TrainState."""
    state = train_state.TrainState.create(
        apply_fn=None,
        params=madax.hijax.lift(params),
        tx=madax.hijax.optimizer(OPTIMIZER),
    )

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(other.error)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    return losses, madax.hijax.lower(state.params)


def by_madax(other, params, steps):
    """A loop of one's own, with madax.value_and_grad."""
    state = OPTIMIZER.init(params)

    @jax.jit
    def step(params, state):
        value, grads = madax.value_and_grad(other.error)(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params


def by_equinox(other, model, steps):
    """The loop of Equinox: filter_jit, partition and combine."""
    import equinox as eqx

    state = OPTIMIZER.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        value, grads = madax.value_and_grad(other.error)(model)
        params, static = eqx.partition(model, eqx.is_array)
        updates, state = OPTIMIZER.update(grads, state, params)
        return eqx.combine(optax.apply_updates(params, updates), static), state, value

    losses = []
    for _ in range(steps):
        model, state, value = step(model, state)
        losses.append(float(value))
    return losses, model
