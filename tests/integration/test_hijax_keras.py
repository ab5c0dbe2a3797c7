"""Keras's Model.fit on lifted codes, its checkpoints too, by an optimizer of optax."""

import os
import subprocess
import sys
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
    model.load_weights(str(tmp_path))
    same(weights(model), halfway)
    assert model.optimizer.iterations == STEPS // 2
    after, params = by_keras(model, STEPS // 2)
    losses, expected = by_keras(compiled(tx))
    assert before + after == losses
    same(params, expected)


def test_files_of_floats_are_read_as_the_codes_that_were_saved(tmp_path):
    path, tx = str(tmp_path / "halfway.weights.h5"), madax.muon(0.02)
    model = compiled(tx)
    _, halfway = by_keras(model, STEPS // 2)
    model.save_weights(path)
    # Its steps donate the weights.
    halfway = jax.tree.map(jnp.copy, halfway)
    _, expected = by_keras(model, STEPS // 2)
    model = compiled(tx)
    model.load_weights(path)
    same(weights(model), halfway)
    same(by_keras(model, STEPS // 2)[1], expected)


def test_the_best_weights_are_restored():
    model = compiled(madax.madam(0.02))
    _, first = by_keras(model, 1)
    first = jax.tree.map(jnp.copy, first)
    stop = keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=2, restore_best_weights=True
    )
    model = compiled(madax.madam(0.02))
    losses, best = by_keras(model, callbacks=[stop])
    assert len(losses) == 3  # The loss falls, and the first was the largest.
    same(best, first)


def test_variables_of_nnx_hold_codes():
    """Keras reads the setting when it is imported."""
    code = f"""
import sys
sys.path[:0] = {sys.path}
import test_hijax_keras as here
model = here.compiled(here.madax.madam(0.02))
losses, params = here.by_keras(model, 2)
assert losses[1] < losses[0] and params[0].codes.dtype == "int8"
"""
    options = os.environ | {"KERAS_NNX_ENABLED": "true"}
    cwd = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", code], check=True, env=options, cwd=cwd)


def test_a_file_of_a_model_has_its_values_and_no_tx(tmp_path):
    path, model = str(tmp_path / "model.keras"), compiled(madax.madam(0.02))
    model.save(path)
    loaded = keras.models.load_model(path, compile=False)
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    with raises(ValueError, "does not hold the tx", "compile=False to load_model"):
        keras.models.load_model(path)


def other_weights():
    keras.utils.set_random_seed(1)
    return [np.asarray(normal(*v.shape)) for v in made().weights]


FLOATS = {
    "weights of another model": lambda model: model.set_weights(other_weights()),
    "an optimizer of Keras": lambda model: (
        model.compile("sgd", LOSS),
        by_keras(model),
    ),
}


@pytest.mark.parametrize("name", FLOATS)
def test_variables_of_codes_refuse_other_floats(name):
    model = compiled(madax.madam(0.02))
    with raises(
        ValueError, "dense/kernel' holds codes", "before madax.trainers.keras makes"
    ):
        FLOATS[name](model)


def test_the_rate_of_tx_is_neither_shown_nor_set():
    rate = compiled(madax.madam(0.02)).optimizer.learning_rate
    assert rate == float("inf")
    with raises(ValueError, "learning rate of this optimizer", "pass a schedule to tx"):
        rate.assign(0.1)


def test_convolutions_train():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Conv2D(8, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(8),
        ]
    )
    tx = madax.hijax.optimizer(madax.madam(0.02))
    model.compile(madax.trainers.keras(model, tx, FMT), LOSS)
    images = X.reshape(16, 4, 4, 1)
    losses = model.fit(images, Y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    kernel = model.layers[0].kernel.value
    assert kernel.codes.dtype == jnp.int8 and len(kernel.shape) == 4
    np.testing.assert_allclose(model(images), model.predict(images), atol=1e-5)


def test_losses_are_scaled_for_float16():
    losses, expected = by_keras(compiled(madax.madam(0.02)))
    model = compiled(madax.madam(0.02))
    scaled = keras.optimizers.LossScaleOptimizer(model.optimizer)
    model.compile(scaled, LOSS)
    found, params = by_keras(model)
    assert found == losses and scaled.iterations == STEPS
    same(params, expected)


def test_a_loop_that_applies_gradients_trains():
    model, expected = compiled(madax.madam(0.02)), compiled(madax.madam(0.02))
    variables = model.trainable_variables
    grads = [normal(*v.shape) for v in variables]
    model.optimizer.apply(grads, variables)
    held = expected.trainable_variables
    values = [v.value for v in expected.optimizer.variables]
    new, _ = expected.optimizer.stateless_apply(values, grads, [v.value for v in held])
    same(weights(model), madax.hijax.lower(new))
    assert model.optimizer.iterations == 1


def test_layers_are_frozen_by_another_call_that_keeps_codes():
    model = compiled(madax.madam(0.02))
    by_keras(model, 1)
    model.layers[1].trainable = False
    model.compile(model.optimizer, LOSS)
    with raises(ValueError, "made for 4 variables got 2", "call madax.trainers.keras"):
        model.train_on_batch(X, Y)  # A fit would take the values away before.
    model.layers[1].trainable = True
    before = jax.tree.map(jnp.copy, weights(model))
    tx = madax.hijax.optimizer(madax.madam(0.02))
    model.compile(madax.trainers.keras(model, tx, FMT), LOSS)
    same(weights(model), before)
    model.layers[1].trainable = False
    model.compile(madax.trainers.keras(model, tx, FMT), LOSS)
    by_keras(model, 1)
    model.layers[1].trainable = True
    after = weights(model)
    same(after[2:], before[2:])
    assert (after[0].codes != before[0].codes).any()


def test_what_needs_floats_or_shardings_is_refused():
    tx = madax.hijax.optimizer(madax.madam(0.02))
    model = made()
    model.layers[0].kernel.constraint = keras.constraints.MaxNorm(1.0)
    with raises(
        ValueError, "dense/kernel' has the constraint", "leave constraints out"
    ):
        madax.trainers.keras(model, tx, FMT)
    model = made()
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        with raises(ValueError, "has a distribution", "set_distribution(None)"):
            madax.trainers.keras(model, tx, FMT)
    finally:
        keras.distribution.set_distribution(None)


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
