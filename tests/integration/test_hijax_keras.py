"""Keras's Model.fit on lifted codes, its checkpoints too, by an optimizer of optax."""

import os
from collections import OrderedDict

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import needs_hijax, normal, raises, same

import madax

keras = pytest.importorskip("keras")

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS = 10
FMT = madax.SymlogFormat(8)
X = np.asarray(normal(16, 16))
Y = X[:, :8].argmax(1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def made():
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()  # Names are counted.
    return keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(8)]
    )


def compiled(tx):
    model = made()
    optimizer = madax.trainers.keras(model, madax.hijax.optimizer(tx), FMT)
    model.compile(optimizer, LOSS)
    return model


def by_keras(model, epochs=STEPS, callbacks=()):
    fit = {"batch_size": 16, "epochs": epochs, "shuffle": False, "verbose": 0}
    losses = model.fit(X, Y, callbacks=list(callbacks), **fit).history["loss"]
    return losses, weights(model)


def weights(model):
    return madax.hijax.lower([v.value for v in model.trainable_variables])


def by_madax(tx):
    model = made()
    # JAX would sort the keys of a dict.
    params = OrderedDict((v.path, v.value) for v in model.trainable_variables)
    params = madax.quantize_params(params, FMT)

    @jax.jit
    def step(params, state):
        def loss(params):
            return LOSS(Y, model.stateless_call(list(params.values()), [], X)[0])

        value, grads = madax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, list(params.values())


TXS = {
    "madam": madax.madam(0.02),
    "muon": madax.muon(0.02),
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


def test_gradients_are_accumulated():
    tx = optax.MultiSteps(madax.hijax.optimizer(madax.madam(0.02)), 2)
    model = made()
    optimizer = madax.trainers.keras(model, tx.gradient_transformation(), FMT)
    model.compile(optimizer, LOSS)
    # Its steps donate the weights.
    start = jax.tree.map(jnp.copy, weights(model))
    _, once = by_keras(model, 1)
    same(once, start)
    losses, _ = by_keras(model, 2 * STEPS)
    assert losses[-1] < losses[0]


class TwoOfAName(keras.Model):
    """Embeddings and a head, and between them layers that share their paths."""

    def __init__(self):
        super().__init__(name="model")
        self.tokens = keras.layers.Embedding(50, 16, name="embedding")
        self.first = keras.layers.Dense(16, name="proj")
        self.second = keras.layers.Dense(16, name="proj")
        self.head = keras.layers.Dense(50, name="logits")

    def call(self, x):
        return self.head(self.second(self.first(self.tokens(x))))


def test_the_optimizer_reads_unique_names_in_the_order_of_the_variables():
    model, given = TwoOfAName(), []
    model(np.zeros((2, 3), int))
    tx = optax.GradientTransformation(lambda params: given.append(params), None)
    madax.trainers.keras(model, tx, FMT).build(model.trainable_variables)
    params = madax.hijax.lower(given[0])
    assert madax.diagnostics.matrices(params) == {
        "model/embedding/embeddings": None,
        "model/proj/kernel": (1, 16, 16),
        "model/proj/bias": None,
        "model/proj_1/kernel": (1, 16, 16),
        "model/proj_1/bias": None,
        "model/logits/kernel": None,
        "model/logits/bias": None,
    }
    same(list(params.values()), weights(model))


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=100.0),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_set_a_learning_rate_are_refused(callback):
    with raises(ValueError, "learning rate of this optimizer", "pass a schedule to tx"):
        by_keras(compiled(madax.madam(0.02)), callbacks=[callback])


def test_a_model_that_takes_no_codes_is_refused(monkeypatch):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    empty = keras.Sequential([keras.layers.Dense(8)])
    with raises(ValueError, "no trainable variables yet", "model.build(input_shape)"):
        madax.trainers.keras(empty, tx, FMT)
    with raises(TypeError, "model must be a keras.Model, got 3 of type int"):
        madax.trainers.keras(3, tx, FMT)
    with raises(TypeError, "tx must be an optax.GradientTransformation, got 3"):
        madax.trainers.keras(made(), 3, FMT)
    with raises(TypeError, "format must be a Format, got 8 of type int"):
        madax.trainers.keras(made(), tx, 8)
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with raises(ValueError, "Keras has the backend 'torch'", "KERAS_BACKEND=jax"):
        madax.trainers.keras(made(), tx, FMT)
