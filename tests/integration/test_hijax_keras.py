"""Keras's Model.fit on lifted codes, its checkpoints too, by an optimizer of optax."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import needs_hijax, normal, same

import madax

keras = pytest.importorskip("keras")

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS = 10
X = np.asarray(normal(16, 16))
Y = X[:, :8].argmax(1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Optax(keras.optimizers.Optimizer):
    """An optimizer of optax, with its state in variables of Keras."""

    def __init__(self, tx):
        super().__init__(learning_rate=1.0)  # tx has its own.
        self.tx = tx

    def build(self, variables):
        super().build(variables)
        n = len(self.variables)
        self.slices = slice(n), slice(n, None)
        state = self.tx.init([v.value for v in variables])
        leaves, self.treedef = jax.tree.flatten(state)
        for i, x in enumerate(leaves):
            self.add_variable(x.shape, "zeros", x.dtype, name=f"state_{i}").assign(x)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        own, leaves = (optimizer_variables[s] for s in self.slices)
        state = self.treedef.unflatten(leaves)
        updates, state = self.tx.update(grads, state, trainable_variables)
        params = optax.apply_updates(trainable_variables, updates)
        return params, own + jax.tree.leaves(state)


def made():
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()  # Names are counted.
    return keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(8)]
    )


def coded(model):
    values = [v.value for v in model.trainable_variables]
    return madax.quantize_params(values, madax.SymlogFormat(8))


def compiled(tx):
    model = made()
    for v, w in zip(
        model.trainable_variables, madax.hijax.lift(coded(model)), strict=True
    ):
        v.assign(w)
    model.compile(Optax(madax.hijax.optimizer(tx)), LOSS)
    return model


def by_keras(model, epochs=STEPS, callbacks=()):
    fit = {"batch_size": 16, "epochs": epochs, "shuffle": False, "verbose": 0}
    losses = model.fit(X, Y, callbacks=list(callbacks), **fit).history["loss"]
    return losses, weights(model)


def weights(model):
    return madax.hijax.lower([v.value for v in model.trainable_variables])


def by_madax(tx):
    model = made()
    params = coded(model)

    @jax.jit
    def step(params, state):
        def loss(params):
            return LOSS(Y, model.stateless_call(params, [], X)[0])

        value, grads = madax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params


TXS = {
    "madam": madax.madam(0.02),
    "adam": madax.with_quantized_params(optax.adam(1e-2)),
}


@pytest.mark.parametrize("name", TXS)
def test_its_loop_trains_as_with_madax(name):
    losses, params = by_keras(compiled(TXS[name]))
    ours, expected = by_madax(TXS[name])
    np.testing.assert_allclose(losses, ours, rtol=1e-6)  # It reports means.
    same(params, expected)
    assert params[0].codes.dtype == jnp.int8 and losses[-1] < losses[0]


def test_a_run_that_is_resumed_ends_in_the_same_codes(tmp_path):
    tx = madax.madam(0.02)
    saving = keras.callbacks.OrbaxCheckpoint(str(tmp_path), save_on_background=False)
    before, halfway = by_keras(compiled(tx), STEPS // 2, [saving])
    model = compiled(tx)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(str(tmp_path))
    same(weights(model), halfway)
    after, params = by_keras(model, STEPS // 2)
    losses, expected = by_keras(compiled(tx))
    assert before + after == losses
    same(params, expected)
