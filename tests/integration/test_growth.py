"""Leaves that have to grow: gains, gates and biases get where Adam gets them.

Branches of a residual network, whose gains start at 1e-6 or at zero, as with LayerScale
and ReZero, and whose biases are to become ten. A bound of three times the first size
would hold gains at 3e-6 and biases at 0.3.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mostly_nightly

import madax
from madax import MomentFormat, SymlogFormat, diagnostics

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS, WIDTH = 1500, 8
SIGNS = np.where(np.arange(WIDTH) % 2, 1.0, -1.0)
BOTH = np.outer([1, -1], SIGNS)
# Where leaves that are no matrices start, and the values that make the data.
LEAVES = {
    "layer_scale": {"gain": (np.full(WIDTH, 1e-6), SIGNS)},
    "rezero": {"gain": (np.zeros(()), np.ones(()))},
    "small": {"gain": (np.full((), 1e-6), -np.ones(()))},
    "dense": {"bias": (np.zeros(WIDTH), 10 * SIGNS)},
    "layers/scaled": {"gain": (np.full((2, WIDTH), 1e-6), BOTH)},
    "layers/dense": {"bias": (np.zeros((2, WIDTH)), 10 * BOTH)},
}


def branch(params, x):
    if "gain" in params:
        return params["gain"] * jax.nn.gelu(x)
    return x @ params["kernel"] + params["bias"]


def network(params, x):
    """What all branches make of ``x``; some are stacks of two layers."""
    outputs = []
    for name in LEAVES:
        apply = jax.vmap(branch, (0, None)) if "layers" in name else branch
        outputs.append(apply(params[name], x).reshape(-1, *x.shape))
    return jnp.concatenate(outputs)


def task():
    """The first parameters, and data: the matrices could stay, other leaves not."""
    rng = np.random.default_rng(0)
    first, truth = (
        {
            name: {k: jnp.float32(ends[i]) for k, ends in leaves.items()}
            for name, leaves in LEAVES.items()
        }
        for i in range(2)
    )
    for name, layers in (("dense", ()), ("layers/dense", (2,))):
        kernel = rng.standard_normal((*layers, WIDTH, WIDTH)) / np.sqrt(WIDTH)
        first[name]["kernel"] = truth[name]["kernel"] = jnp.float32(kernel)
    x = jnp.float32(rng.standard_normal((64, WIDTH)))
    return first, x, network(truth, x)


def train(tx, *, codes=False):
    """Returns parameters, state, and the losses."""
    params, x, y = task()
    if codes:
        params = madax.quantize_params(params, SymlogFormat(8))
        assert all(
            isinstance(leaf, madax.QuantizedArray) == (k == "kernel")
            for leaves in params.values()
            for k, leaf in leaves.items()
        )

    def loss(weights):
        return jnp.mean((network(weights, x) - y) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(madax.dequantize_params(params))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=STEPS))
    (params, state), losses = run(params, tx.init(params))
    return params, state, np.asarray(losses)


@pytest.fixture(scope="module")
def adam():
    return train(optax.adam(optax.cosine_decay_schedule(0.03, STEPS)))


def ends(params):
    """For each leaf that has to grow, its name, its values, and where they belong."""
    for name, leaves in LEAVES.items():
        for k, (_, truth) in leaves.items():
            yield f"{name}/{k}", np.float64(params[name][k]), truth


RATE = optax.cosine_decay_schedule(0.03, STEPS)


@pytest.mark.parametrize(
    ("name", "codes"),
    mostly_nightly(
        itertools.product(["madam", "muon_madam"], [False, True]),
        ("muon_madam", True),
    ),
)
def test_gains_and_biases_get_where_adam_gets_them(adam, name, codes):
    options = {"moment_format": MomentFormat(8)} if codes else {}
    tx = getattr(madax, name)(RATE, floor=1.0, **options)
    params, state, losses = train(tx, codes=codes)
    for (leaf, got, truth), (_, adams, _) in zip(
        ends(params), ends(adam[0]), strict=True
    ):
        np.testing.assert_allclose(adams, truth, rtol=0.02, err_msg=leaf)
        np.testing.assert_allclose(got, truth, rtol=0.01, err_msg=leaf)
    assert losses[-1] < adam[2][-1] < 1e-3 * losses[0]
    assert not any(diagnostics.fraction_at_bound(params, state).values())


def test_bounds_of_the_paper_hold_every_leaf_and_are_named():
    params, state, _ = train(madax.madam(RATE, floor=1.0, p_scale=3.0))
    for _, got, truth in ends(params):
        first = 1e-6 if truth.ndim and truth.max() == 1 else 0.1
        assert np.all(np.abs(got) <= 3.01 * first) or got.ndim == 0
    jax.jit(diagnostics.fraction_at_bound)(
        params, state
    )  # Under jit, values are unknown.
    with pytest.warns(UserWarning) as record:
        at_bound = diagnostics.fraction_at_bound(params, state)
    (warning,) = record
    assert warning.filename == __file__
    names, text = str(warning.message).split(": ", 1)
    stuck = {name for name, fraction in at_bound.items() if fraction >= 0.5}
    assert stuck >= {leaf for leaf, *_ in ends(params)}
    assert names == ", ".join(f"params['{name}']" for name in at_bound if name in stuck)
    assert "a larger p_scale" in text and "quantize_params" in text


# By name and shape, and whether it has a bound.
KINDS = {
    "Dense_0/kernel": ((4, 4), True),
    "embed/embedding": ((4, 4), True),
    "conv/kernel": ((3, 3, 2, 2), True),
    "anything": ((4, 4), True),
    "head/kernel": ((4, 1), True),
    "Dense_0/bias": ((4,), False),
    "vector": ((4,), False),
    "skip_gate": ((), False),
    "gates/alpha": ((1, 1, 1), False),
    "blocks/layerscale": ((4, 1, 1), False),
    "blocks/attention/query/bias": ((2, 4, 4), False),
    "blocks/ls1/gamma": ((2, 4), False),
    "blocks/LayerNorm_0/scale": ((2, 4), False),
}


def push(tx, params, size):
    """Parameters and state after a step of that size."""

    @jax.jit
    def run(params):
        state = tx.init(params)
        updates = jax.tree.map(lambda w: jnp.full(w.shape, size), params)
        updates, state = tx.update(updates, state, params)
        after = optax.apply_updates(params, updates)
        return after, state

    return run(params)


def test_matrices_alone_are_bounded():
    """By default; the paper's bound is on every leaf, and inf is on none."""
    params = {k: jnp.full(shape, 0.5) for k, (shape, _) in KINDS.items()}
    params["zeros/kernel"] = jnp.zeros((4, 4))
    for p_scale in (None, 2.0, np.inf):
        after, state = push(madax.clip_log_weights(p_scale), params, 1e3)
        at_bound = jax.jit(diagnostics.fraction_at_bound)(after, state)
        for name, w in params.items():
            largest = 1e3 + np.max(w)
            if p_scale == 2.0:
                largest = 1.0 if np.any(w) else 0.2
            elif p_scale is None and KINDS.get(name, ((), False))[1]:
                largest = 1.5
            np.testing.assert_allclose(after[name], largest, rtol=1e-6, err_msg=name)
            assert at_bound[name] == (largest < 1e3), name


def test_a_free_leaf_ends_at_the_largest_number_of_its_dtype():
    tx = optax.chain(madax.clip_log_weights(), madax.lns_quantize(rounding="nearest"))
    after, state = push(tx, {"bias": jnp.ones(4, jnp.float16)}, 1e9)
    largest = np.nextafter(np.float16(65504), np.float16(0))
    np.testing.assert_array_equal(after["bias"], largest)
    assert jax.jit(diagnostics.fraction_at_bound)(after, state)["bias"] == 1


@pytest.mark.parametrize("make", [madax.papers.bbit_madam, madax.papers.lns_madam])
def test_a_grid_bounds_every_leaf(make):
    """Its largest magnitude is the bound, and counts as such."""
    params = {"bias": jnp.zeros(4), "kernel": jnp.ones((4, 4))}
    tx = make(0.5)
    grads = jax.tree.map(lambda w: -jnp.ones(w.shape), params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = params, tx.init(params)
    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=20)[0])
    params, state = run(*start)
    np.testing.assert_allclose(params["bias"], 0.3, rtol=1e-3)
    np.testing.assert_allclose(params["kernel"], 3.0, rtol=1e-3)
    at_bound = jax.jit(diagnostics.fraction_at_bound)(params, state)
    assert at_bound == {"bias": 1, "kernel": 1}
