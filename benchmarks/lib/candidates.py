"""Candidates to improve Madam that are not in the library; `why` has their results.

Each is a wrapper of an optimizer of float32 parameters, or of codes where it says so.
Only matrices have scales and norms of their own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import madax
from benchmarks.lib.steps import Tree


def _matrices(fn: Callable[..., jax.Array], *trees: optax.Params) -> optax.Params:
    """Applies a function to matrices; other leaves of the first tree stay."""
    return jax.tree.map(lambda x, *rest: fn(x, *rest) if x.ndim > 1 else x, *trees)


def trained_scales(
    inner: optax.GradientTransformation, rate: optax.Schedule, *, columns: bool = False
) -> optax.GradientTransformation:
    """A trainable scale for each matrix, or for each of its columns.

    A weight is a scale times a number that ``inner`` trains. The scale takes steps of
    Madam: the derivative by its logarithm is the sum of gradients times weights.
    """

    def totals(grads, params):
        def total(w, g):
            axes = tuple(range(w.ndim - 1)) if columns else None
            return jnp.sum(g * w, axes, keepdims=True)

        return _matrices(total, params, grads)

    steps = optax.chain(
        madax.scale_by_second_moment(),
        optax.clip(10.0),
        optax.scale_by_learning_rate(rate),
    )

    def init_fn(params):
        return inner.init(params), steps.init(totals(params, params))

    def update_fn(updates, state, params: Tree = None):
        logs, scales = steps.update(totals(updates, params), state[1])
        updates, state = inner.update(updates, state[0], params)
        after = optax.apply_updates(params, updates)
        after = _matrices(lambda w, d: w * jnp.exp(d), after, logs)
        return optax.tree.sub(after, params), (state, scales)

    return optax.GradientTransformation(init_fn, update_fn)


def kept_norms(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Every matrix keeps the norm that it has at init, as in Hyperball."""

    def norms(params):
        return jax.tree.map(jnp.linalg.norm, params)

    def init_fn(params):
        return inner.init(params), norms(params)

    def update_fn(updates, state, params: Tree = None):
        updates, inner_state = inner.update(updates, state[0], params)
        after = optax.apply_updates(params, updates)
        after = _matrices(lambda w, a, b: w * (a / b), after, state[1], norms(after))
        return optax.tree.sub(after, params), (inner_state, state[1])

    return optax.GradientTransformation(init_fn, update_fn)


def nearest_at_the_end(
    make: Callable[..., optax.GradientTransformation], rate: optax.Schedule
) -> optax.GradientTransformation:
    """Codes are rounded to nearest once the rate is below a tenth of the first."""
    stochastic, nearest = make(rate), make(rate, rounding="nearest")

    def init_fn(params):
        return stochastic.init(params), jnp.zeros([], jnp.int32)

    def update_fn(updates, state, params: Tree = None):
        state, count = state
        early, after = stochastic.update(updates, state, params)
        late, _ = nearest.update(updates, state, params)
        is_late = jnp.less(rate(count), 0.1 * jnp.asarray(rate(0)))
        updates = jax.tree.map(lambda a, b: jnp.where(is_late, b, a), early, late)
        return updates, (after, count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


def with_noise(
    inner: optax.GradientTransformation, deviation: float
) -> optax.GradientTransformation:
    """Gradients are those at weights times lognormal noise, as in LMD.

    The parameters are the noisy ones; :func:`without_noise` takes the others.
    """

    def init_fn(params):
        return params, inner.init(params), jnp.zeros([], jnp.int32)

    def update_fn(updates, state, params: Tree = None):
        mean, inner_state, count = state
        updates, inner_state = inner.update(updates, inner_state, mean)
        mean = optax.apply_updates(mean, updates)
        noise = optax.tree.random_like(jax.random.key(count), mean)
        noisy = jax.tree.map(lambda w, n: w * jnp.exp(deviation * n), mean, noise)
        return optax.tree.sub(noisy, params), (mean, inner_state, count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


def without_noise(params: optax.Params, state: Tree) -> optax.Params:
    """The parameters to be scored: of :func:`with_noise`, without its noise."""
    del params
    return state[0]


def additive_then_multiplicative(rate: optax.Schedule) -> optax.GradientTransformation:
    """A step that adds, and one that multiplies, by the same direction, as in HAM."""

    def update_fn(updates, state, params: Tree = None):
        def step(w, d):
            moved = w + 0.1 * d  # A typical weight is of that size.
            return moved * jnp.exp(jnp.sign(w) * d) - w

        return jax.tree.map(step, params, updates), state

    return optax.chain(
        madax.scale_by_second_moment(),
        optax.clip(10.0),
        optax.scale_by_learning_rate(rate),
        optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn),
        madax.clip_log_weights(),
    )


def floored_steps(
    direction: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    floor: float = 1.0,
    p_scale: float | None = None,
) -> optax.GradientTransformation:
    """Madam's steps with a floor, in any direction, clipped as Madam clips it.

    With a floor above 1 the rate is that of steps relative to the size of a leaf at
    init, which the steps of nearly all weights then are.
    """
    relative = max(floor, 1.0)
    return optax.chain(
        direction,
        optax.scale_by_learning_rate(lambda count: rate(count) / relative),
        madax.scale_by_sign_log(floor=floor),
        madax.clip_log_weights(p_scale),
    )


def muon_and_momentum(rate: optax.Schedule) -> optax.GradientTransformation:
    """The direction of Muon for matrices, and a first moment for all other leaves."""

    def labels(params):
        def label(path, x):
            name = jax.tree_util.keystr(path)
            table = x.ndim < 2 or "embed" in name or "head" in name
            return "other" if table else "matrix"

        return jax.tree_util.tree_map_with_path(label, params)

    direction = optax.partition(
        {
            "matrix": madax.transforms.scale_by_orthogonal_momentum(),
            "other": madax.scale_by_second_moment(b1=0.9),
        },
        labels,
    )
    return floored_steps(optax.chain(direction, optax.clip(10.0)), rate)
