"""Models of others: what each computes on codes, and how it is trained and saved.

``make test-models`` runs this file in an environment for each set of pins, and makes
the page's table of what it found.
"""

import json
from importlib.metadata import version

import checkpoints
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import is_quantized, needs_hijax, same
from zoo import MODELS, PACKAGES
from zoo.listed import LISTED, leaves_of
from zoo.loops import OPTIMIZER
from zoo.other import Layers, apart, error

import madax

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("quick_compiles"),
]

FMT = madax.SymlogFormat(8)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def built(name):
    try:
        return MODELS[name]()
    except ImportError as missing:
        pytest.skip(f"not here: {missing}")


@pytest.fixture
def other(built, name, record_property):
    packages = ("jax", *PACKAGES[name.split(" of ")[-1]])
    record_property("versions", json.dumps({x: version(x) for x in packages}))
    return built


@pytest.fixture(scope="module")
def coded(built):
    return madax.quantize_params(built.model, FMT)


def test_axes(other, name, record_property):
    listed = json.loads(LISTED.read_text())
    assert leaves_of(other) == listed[name]
    record_property("leaves", len(listed[name]))


def test_float_step(other):
    params, together = apart(other.model)
    loss = lambda params: other.error(together(params))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = OPTIMIZER.init(params), []
    for _ in range(4):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < losses[0] and np.isfinite(losses).all()


def test_codes(other, coded, record_property):
    leaves = jax.tree.leaves(apart(coded)[0], is_leaf=is_quantized)
    fraction = sum(x.size for x in leaves if is_quantized(x)) / sum(
        x.size for x in leaves
    )
    record_property("fraction", round(fraction, 4))
    assert fraction > 0.85  # Small models have many biases.
    decoded, together = apart(madax.dequantize_params(coded))
    params, whole = apart(coded)

    @jax.jit
    def both(params, decoded):
        plain = jax.value_and_grad(lambda p: other.error(together(p)))(decoded)
        ours = madax.value_and_grad(other.error)(whole(params))
        # One structure for the two, by the paths of leaves.
        return jax.tree.leaves(plain), jax.tree.leaves(ours)

    plain, ours = both(params, decoded)
    if not all(map(np.array_equal, plain, ours)):
        most = max(np.abs(x).max() for x in plain)
        for x, y in zip(plain, ours, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * most)
        pytest.skip("to 1e-6 of the max, as XLA orders some sums otherwise")


def test_trainer(other, coded):
    losses, model = other.train(other, coded, 10)
    assert np.mean(losses[-3:]) < losses[0]
    leaves = jax.tree.leaves(apart(model)[0], is_leaf=is_quantized)
    assert {x.codes.dtype.name for x in leaves if is_quantized(x)} == {"int8"}


def test_layerwise(other):
    if not isinstance(other.layers, Layers):
        pytest.skip(other.layers)
    names, embed, layer, rest, shared = other.layers
    split = madax.split_layers(other.model, names)
    params = madax.quantize_params(split.params, FMT, channel_axis=0)

    def of_ends(functions):
        """Functions of the ends' module as functions of their values and a batch."""
        if isinstance(functions, dict):
            return {key: of_ends(function) for key, function in functions.items()}
        return lambda w, batch, *x: functions(split.ends(w), *x)

    init, step = madax.layerwise(
        OPTIMIZER,
        of_ends(embed),
        split.layer(layer),
        lambda w, x, batch: error(rest(split.ends(w), x)),
        **({"shared": of_ends(shared)} if shared else {}),
    )
    state, step, losses, whole = init(params), jax.jit(step), [], []
    ordinary = jax.jit(lambda params: error(other.output(split.model(params))))
    for _ in range(4):
        whole.append(ordinary(params))
        params, state, value = step(params, state, None)
        losses.append(value)
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
    assert losses[-1] < losses[0]


def test_checkpoint(coded, other, tmp_path):
    params, _ = apart(coded)
    params = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    checkpoints.save(tmp_path / "codes", params)
    target = checkpoints.abstract(jax.eval_shape(lambda: params))
    same(checkpoints.restore(tmp_path / "codes", target), params)
