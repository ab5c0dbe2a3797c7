"""Codes that do not move: frozen leaves, averages of values, adapters on a base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from flax import nnx
from helpers import is_quantized

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = FORMATS["symlog16"]
FROZEN = {"frozen": True, "moving": False, "bias": False}
STEPS = 5


def make():
    normal = lambda seed: jax.random.normal(jax.random.key(seed), (8, 8))
    params = {"frozen": normal(0), "moving": normal(1), "bias": jnp.zeros(8)}
    return madax.quantize_params(params, FMT)


def madam():
    return madax.madam(0.02, rounding="nearest")


def train(tx, params):
    """The parameters after steps along the same gradients."""
    state = tx.init(params)
    grads = jax.tree.map(jnp.cos, madax.dequantize_params(params))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def labels_of(params, is_leaf):
    label = lambda path, _: "frozen" if FROZEN[path[0].key] else "moving"
    return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_leaf)


NO_STEPS = madax.with_quantized_params(optax.set_to_zero())
BY_LABEL = {"moving": madam(), "frozen": NO_STEPS}
FREEZE = getattr(optax.transforms, "freeze", None)
WAYS = {
    "partition": optax.partition(BY_LABEL, labels_of(FROZEN, None)),
    "partition by a function": optax.partition(
        BY_LABEL, lambda params: labels_of(params, is_quantized)
    ),
    "masked": optax.chain(madam(), optax.masked(optax.set_to_zero(), FROZEN)),
    "masked gradients": optax.chain(optax.masked(optax.set_to_zero(), FROZEN), madam()),
    "freeze": FREEZE and optax.chain(madam(), FREEZE(FROZEN)),
    "all inside": madax.with_quantized_params(
        optax.partition(
            {"moving": optax.adam(0.1), "frozen": optax.set_to_zero()},
            labels_of(FROZEN, None),
        )
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_frozen_codes_do_not_move_and_the_others_do(name):
    tx = WAYS[name]
    if tx is None:
        pytest.skip("optax has none yet")
    before = make()
    after, free = train(tx, before), train(madam(), before)
    np.testing.assert_array_equal(after["frozen"].codes, before["frozen"].codes)
    assert np.any(free["frozen"].codes != before["frozen"].codes)
    if name != "all inside":
        np.testing.assert_array_equal(after["moving"].codes, free["moving"].codes)
        np.testing.assert_array_equal(after["bias"], free["bias"])
    else:
        assert np.any(after["moving"].codes != before["moving"].codes)


@pytest.mark.parametrize("inner", [madam(), NO_STEPS])
def test_labels_of_parts_of_codes_are_an_error(inner):
    tx = optax.partition(
        {"moving": inner, "frozen": inner}, lambda p: labels_of(p, None)
    )
    with pytest.raises(TypeError, match=r"holds MaskedNode.*is_leaf=lambda x"):
        tx.init(make())


def test_averages_are_taken_of_values():
    """An average of codes is an error; the average of their values is written so."""
    average = madax.dequantize_params(make())
    params, values = make(), [average]
    for _ in range(3):
        params = train(madam(), params)
        values.append(madax.dequantize_params(params))
        average = optax.incremental_update(values[-1], average, step_size=0.25)
    weights = np.array([0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25])
    expected = jax.tree.map(lambda *x: np.tensordot(weights, np.stack(x), 1), *values)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, average, expected)
    with pytest.raises(TypeError, match="dequantize_params"):
        optax.incremental_update(params, params, step_size=0.25)


def test_adapters_in_floats_over_frozen_codes():
    """LoRA: only the adapters have gradients, so jax.grad will do, and no copy."""
    base = make()
    teacher = base["frozen"] + 0.3 * jnp.outer(jnp.ones(8), jnp.linspace(-1, 1, 8))
    x = jax.random.normal(jax.random.key(3), (64, 8))
    a = 0.1 * jax.random.normal(jax.random.key(4), (8, 2))
    adapters = {"a": a, "b": jnp.zeros((2, 8))}

    def loss(adapters, base):
        y = x @ base["frozen"] + x @ adapters["a"] @ adapters["b"]
        return jnp.mean((y - x @ teacher) ** 2)

    tx = optax.adam(0.02)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state, base):
        value, grads = jax.value_and_grad(loss)(adapters, base)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(100):
        adapters, state, value = step(adapters, state, base)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), base, make())
    assert all(jax.tree.leaves(same))
    assert jax.eval_shape(madax.grad(loss), adapters, base).keys() == adapters.keys()


class Adapted(nnx.Module):
    """The layer is quantised, and its adapter is not."""

    def __init__(self, linear, rngs):
        self.layer = nnx.LoRA(8, 2, 8, base_module=linear, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


def test_adapters_of_nnx_train_on_frozen_codes():
    linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    linear.kernel = nnx.Param(make()["frozen"])
    model = Adapted(linear, nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(3), (64, 8))
    y = model(x) + 0.3 * x.sum(1, keepdims=True)
    loss = lambda model: jnp.mean((model(x) - y) ** 2)
    frozen = lambda: jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    before, losses = frozen(), []
    tx = optax.adam(0.02)
    adapters = nnx.state(model, nnx.LoRAParam)
    state = tx.init(adapters)
    for derive in (nnx.value_and_grad, madax.value_and_grad):
        derivative = nnx.jit(derive(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
        for _ in range(40):
            value, grads = derivative(model)
            updates, state = tx.update(grads, state, adapters)
            adapters = optax.apply_updates(adapters, updates)
            nnx.update(model, adapters)
            losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]
    for old, new in zip(before, frozen(), strict=True):
        np.testing.assert_array_equal(old, new)
