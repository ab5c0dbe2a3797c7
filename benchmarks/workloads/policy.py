"""A cart that balances a pole: policy gradients with a learned baseline."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.workloads import Measure, Workload, functional
from benchmarks.workloads.layers import Layers

FAILURE = Measure("failure", "lower", lambda share: share)

# In SI units; the pole is a uniform rod, of which half the length counts.
GRAVITY, CART, POLE, HALF, FORCE, TICK = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
# Of place and angle (12 degrees), beyond which all is lost; and scales of speeds.
LIMITS = np.array([2.4, 2.0, np.pi / 15, 2.0], np.float32)
STARTS = 4096
DISCOUNT = 0.97


def move(state: jax.Array, force: jax.Array) -> jax.Array:
    """Returns states a tick later, by a semi-implicit Euler step.

    The cart's and the rod's equations of motion, solved for both accelerations:
    (M + m) x'' + m l θ'' cos θ = F + m l θ'² sin θ, and
    x'' cos θ + 4/3 l θ'' = g sin θ.

    Args:
      state: place, speed, angle from upright and its speed, of shape (..., 4).
      force: on the cart, of shape (...).
    """
    place, speed, angle, turning = jnp.moveaxis(state, -1, 0)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    mass = CART + POLE
    push = (force + POLE * HALF * turning**2 * sine) / mass
    twist = (GRAVITY * sine - cosine * push) / (
        HALF * (4 / 3 - POLE * cosine**2 / mass)
    )
    speed = speed + TICK * (push - POLE * HALF * twist * cosine / mass)
    turning = turning + TICK * twist
    return jnp.stack([place + TICK * speed, speed, angle + TICK * turning, turning], -1)


def reward(state: jax.Array) -> jax.Array:
    """Returns 1 in the middle, upright; less beside that, and 0 beyond the limits."""
    share = (state / LIMITS)[..., ::2] ** 2
    return jnp.where((share < 1).all(-1), 1 - share.mean(-1), 0.0)


def rollout(
    start: jax.Array, draws: jax.Array, right: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Plays episodes; what is once beyond the limits earns nothing any more.

    Args:
      start: states, of shape (episodes, 4).
      draws: uniform numbers, of shape (ticks, episodes).
      right: states to the probability of a push to the right.

    Returns:
      States before each tick, of shape (ticks, episodes, 4); whether it was to the
      right, and rewards, of shape (ticks, episodes).
    """

    def tick(carry, draw):
        state, alive = carry
        action = draw < right(state)
        after = move(state, jnp.where(action, FORCE, -FORCE))
        earned = alive * reward(after)
        return (after, alive * (earned > 0)), (state, action, earned)

    return jax.lax.scan(tick, (start, jnp.ones(len(start))), draws)[1]


def policy(
    folder: Path | None = None,
    *,
    widths: tuple[int, ...],
    horizon: int,
    held_out: int,
) -> Workload:
    """Returns the workload: the score is the share of the reward that is missed.

    At the score the policy takes the likelier action, from start states held out.

    Args:
      folder: not used, as there is no data.
      widths: of the hidden layers of actor and critic.
      horizon: ticks in an episode.
      held_out: start states to score on.
    """
    del folder
    init_net, apply = functional(
        lambda rngs: Layers((4, *widths, 1), rngs, bend=jnp.tanh)
    )

    def init(key: jax.Array) -> optax.Params:
        actor, critic = jax.random.split(key)
        return {"actor": init_net(actor), "critic": init_net(critic)}

    def net(params: optax.Params, states: jax.Array) -> jax.Array:
        flat = (states / LIMITS).reshape(-1, 4)
        return apply(params, flat).reshape(states.shape[:-1])

    def batch(train: jax.Array, indices: jax.Array, key: jax.Array) -> Any:
        draws = jax.random.uniform(key, (horizon, len(indices)))
        return train[indices], draws

    def loss(params: Any, batch: Any) -> jax.Array:
        start, draws = batch
        states, actions, rewards = jax.lax.stop_gradient(
            rollout(
                start, draws, lambda state: jax.nn.sigmoid(net(params["actor"], state))
            )
        )
        logits, expected = (net(params[name], states) for name in ("actor", "critic"))
        return actor_critic(logits, expected, actions, rewards)

    def metric(params: Any, test: jax.Array) -> dict[str, jax.Array]:
        def right(state: jax.Array) -> jax.Array:
            return jnp.where(net(params["actor"], state) > 0, 1.0, 0.0)

        draws = jnp.full((horizon, len(test)), 0.5)
        return {FAILURE.name: 1 - rollout(test, draws, right)[2].mean()}

    # Up to a quarter of what is allowed.
    states = LIMITS / 4 * _uniform(STARTS + held_out)
    return Workload(
        "policy",
        states[:STARTS],
        states[STARTS:],
        init,
        loss,
        metric,
        FAILURE,
        batch,
        settings={"data": "cart-pole", "held_out": held_out},
    )


def actor_critic(
    logits: jax.Array, expected: jax.Array, actions: jax.Array, rewards: jax.Array
) -> jax.Array:
    """Returns the loss of both nets over the states in which episodes still went on.

    The actor's is the surprise of its actions times the advantage: the discounted
    return less what the critic expected, standardised. The critic's is its squared
    error.

    Args:
      logits: of a push to the right, of shape (ticks, episodes).
      expected: returns, as the critic has them.
      actions: whether the push was to the right.
      rewards: as from ``rollout``.
    """
    alive = jnp.concatenate([jnp.ones_like(rewards[:1]), rewards[:-1]]) > 0
    returns = discounted(rewards)
    gain = jax.lax.stop_gradient(returns - expected)
    gain = (gain - gain.mean(where=alive)) / (gain.std(where=alive) + 1e-6)
    surprise = optax.sigmoid_binary_cross_entropy(logits, actions)
    return jnp.mean(surprise * gain + (returns - expected) ** 2, where=alive)


def _uniform(states: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (states, 4), minval=-1)


def discounted(rewards: jax.Array) -> jax.Array:
    """Returns the mean of the rewards to come, of shape (ticks, episodes).

    The discounted sum is multiplied by 1 less the discount, so it is in [0, 1].
    """

    def back(later, now):
        total = now + DISCOUNT * later
        return total, total

    start = jnp.zeros_like(rewards[0])
    return (1 - DISCOUNT) * jax.lax.scan(back, start, rewards, reverse=True)[1]
