"""8-bit state of every optimizer of optax: as in float32, or left in float32.

What is right is what optax does by itself: with the same gradients, of which one
element may be far too large, or with the same data.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mostly_nightly, raises
from optax import contrib

from benchmarks.accuracy import survey
from madax import with_quantized_state

pytestmark = pytest.mark.usefixtures("quick_compiles")

RATE = 0.01
# What codes would ruin: their updates were NaN, or lost, or wrong by more than a tenth.
RUINED = {
    "rmsprop, centered": lambda: optax.rmsprop(RATE, centered=True),
    "lbfgs": lambda: optax.lbfgs(),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "cocob": lambda: contrib.cocob(),
    "madgrad": lambda: contrib.madgrad(RATE),
    "dadapt": lambda: contrib.dadapt_adamw(),
    "prodigy": lambda: contrib.prodigy(),
    "rprop": lambda: optax.rprop(RATE),
    "simplified": lambda: contrib.simplified_ademamix(RATE),
}


def made(make):
    try:
        return make()
    except AttributeError as error:
        pytest.skip(f"newer than this optax: {error}")


def stored(tx, params):
    """The paths of the leaves of a state that are codes."""
    state = jax.eval_shape(with_quantized_state(tx).init, params).inner_state
    found = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in found]
    return [name for name, (_, x) in zip(names, found, strict=True) if x.dtype == "u1"]


SQUARE = {"w": jnp.ones((64, 64))}


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: optax.adam(RATE), ["0/mu/w", "0/nu/w"]),
        (lambda: optax.adabelief(RATE), ["0/mu/w", "0/nu/w"]),
        (lambda: optax.nadam(RATE), ["0/mu/w", "0/nu/w"]),
        (lambda: optax.lamb(RATE), ["0/mu/w", "0/nu/w"]),
        (lambda: optax.yogi(RATE), ["0/mu/w", "0/nu/w"]),
        (lambda: optax.rmsprop(RATE), ["0/nu/w"]),
        (lambda: optax.adagrad(RATE), ["0/sum_of_squares/w"]),
        (lambda: optax.lion(RATE), ["0/mu/w"]),
        (lambda: optax.inject_hyperparams(optax.adamax)(RATE), ["0/mu/w", "0/nu/w"]),
        (RUINED["rmsprop, centered"], []),
        (lambda: optax.inject_hyperparams(optax.rmsprop)(RATE, centered=True), []),
        (RUINED["lbfgs"], []),
        (RUINED["amsgrad"], ["0/mu/w"]),
        (lambda: optax.apply_if_finite(optax.amsgrad(RATE), 3), ["0/mu/w"]),
        (RUINED["cocob"], []),
        (RUINED["madgrad"], []),
        (RUINED["dadapt"], []),
        (RUINED["prodigy"], []),
        (lambda: contrib.galore(RATE), []),
        (RUINED["rprop"], ["0/prev_updates/w"]),
        (RUINED["simplified"], []),
        (lambda: optax.ema(0.9), ["ema/w"]),
    ],
)
def test_moments_are_stored_as_codes_and_nothing_else(make, fields):
    found = stored(made(make), SQUARE)
    assert [name.removeprefix("inner_state/") for name in found] == fields


def test_in_a_loop_of_a_step_leaves_are_told_apart_too():
    """An optimizer that scans over rows, as over the layers of a stack."""
    inner = optax.chain(optax.amsgrad(RATE), optax.trace(0.9))

    def update(grads, state, params=None):
        def row(carry, row):
            g, s = row
            out, s = inner.update(g, s)
            return carry + 1, (out, s)

        count, (out, state) = jax.lax.scan(row, state[0], (grads, state[1]))
        return out, (count, state)

    def init(params):
        return jnp.int32(0), jax.vmap(inner.init)(params)

    tx = optax.GradientTransformation(init, update)
    found = stored(tx, {"w": jnp.ones((2, 64, 64))})
    assert found == ["1/0/0/mu/w", "1/1/trace/w"]


def test_a_factored_moment_of_the_shape_of_a_bias_is_not_stored():
    params = {"w": jnp.ones((4096, 128)), "b": jnp.ones(4096)}
    assert stored(optax.adafactor(RATE), params) == ["0/v/b"]


def refused(make, path, *reason):
    where = lambda name, leaf: name == path
    with raises(ValueError, f"where selects '{path}'", *reason, "leave it out"):
        with_quantized_state(make(), where=where).init(SQUARE)


def test_what_codes_would_ruin_is_refused_with_the_reason():
    refused(RUINED["rmsprop, centered"], "0/nu/w", "the difference of it and 0/mu/w")
    refused(RUINED["amsgrad"], "0/nu_max/w", "the maximum of it and 0/nu/w")
    refused(RUINED["lbfgs"], "0/params/w", "from parameters alone")
    refused(RUINED["lbfgs"], "2/grad/w", "no update depends on it")
    refused(RUINED["prodigy"], "grad_sum/w", "sums of moments to estim_lr")
    refused(RUINED["prodigy"], "params0/w", "it starts from parameters")
    refused(RUINED["cocob"], "2/cumulative_gradients/w", "a sum that never decays")
    refused(RUINED["rprop"], "0/step_sizes/w", "a step only multiplies it")
    refused(RUINED["simplified"], "0/m/w", "more slowly than the root of 0/n/w")


def test_an_update_that_cannot_be_traced_asks_for_where():
    adam = optax.scale_by_adam()

    def update(grads, state, params=None, *, example):
        del example
        return adam.update(grads, state, params)

    tx = optax.GradientTransformationExtraArgs(adam.init, update)
    with raises(ValueError, "inner.update", "'example'", "use where to select them"):
        with_quantized_state(tx).init(SQUARE)
    tx = with_quantized_state(tx, where=lambda path, leaf: path == "nu/w")
    assert tx.init(SQUARE).inner_state.nu["w"].dtype == jnp.uint8


@pytest.mark.parametrize(
    "name",
    mostly_nightly(survey.SURVEY, "adabelief"),
)
def test_losses_and_updates_match_float32(name):
    found = survey.against_floats(made(survey.SURVEY[name]))
    # Noise makes updates of 8 bits a little longer.
    assert 0.9 < found["loss"] < 1.06
    assert 0.97 < found["update"] < 1.12


# --- one element that is far too large ------------------------------------------------

SPIKES, AT, STEPS, PLACE = (0.0, 1e10, 1e15, 3e19), (0, 15), 40, (3, 5)


def weights_after(tx):
    """Weights by when there is a spike, how large it is, and step."""
    params = {"w": jnp.ones((64, 64))}
    key = jax.random.key(0)
    grads = 0.3 + jax.random.normal(key, (STEPS, 64, 64))

    def train(at, spike):
        def one(carry, now):
            t, g = now
            w, state = carry
            g = g.at[PLACE].add(jnp.where(t == at, spike, 0))
            updates, state = tx.update({"w": g}, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w["w"]

        start = params, tx.init(params)
        return jax.lax.scan(one, start, (jnp.arange(STEPS), grads))[1]

    cases = jnp.array([(at, spike) for at in AT for spike in SPIKES])
    found = jax.jit(lambda c: jax.lax.map(lambda c: train(c[0], c[1]), c))(cases)
    return np.asarray(found, np.float64)


# These ask for a loss.
ASK = ("lbfgs", "polyak_sgd", "contrib.momo", "contrib.momo_adam", "contrib.sophia")


@pytest.mark.parametrize(
    "name",
    mostly_nightly(
        [name for name in survey.SURVEY if name not in ASK],
        "adam",
        "sgd, momentum",
        "contrib.muon",
    ),
)
def test_a_finite_spike_costs_one_element_at_most(name):
    tx = made(survey.SURVEY[name])
    # There, an element leaps in optax, too, if it has no first gradient.
    first = len(SPIKES) if name == "contrib.acprop" else 0
    check_spikes(tx, with_quantized_state(tx), first)


@pytest.mark.parametrize("name", ["mu", "nu"])
def test_moments_in_floats_are_skipped_with_those_in_codes(name):
    tx = optax.adam(RATE)
    check_spikes(tx, with_quantized_state(tx, where=lambda path, _: name in path))


def check_spikes(inner, tx, first=0):
    def paths(tx):
        return np.abs(np.diff(weights_after(tx), axis=1, prepend=1.0)).sum(1)[first:]

    exact, found = paths(inner), paths(tx)
    is_known = np.isfinite(exact).all((1, 2))
    # It moves by what optax moves it, at most, with the spike or without.
    most = np.maximum(exact[0], exact)[is_known][:, *PLACE]
    assert np.all(found[is_known][:, *PLACE] <= 1.3 * most)
    # The other elements move on, as they do in optax.
    others = np.ones((64, 64), bool)
    others[PLACE] = False
    exact, found = (np.mean(x[is_known][:, others], axis=1) for x in (exact, found))
    assert np.all(found >= 0.9 * exact)
