"""Kauldron's Trainer on lifted codes: its loop on a mesh, accumulation, checkpoints."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import needs_hijax, normal, same

import madax

kd = pytest.importorskip("kauldron.kd")

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS = 10


class Net(nn.Module):
    image: kd.kontext.Key = "batch.image"

    @nn.compact
    def __call__(self, image):
        return nn.Dense(8)(nn.relu(nn.Dense(32)(image)))


class Coded(kd.train.TrainStep):
    """Its init, with codes: what is restored into has to be of the same type."""

    def _init_model(self, *args, **kwargs):
        state = super()._init_model(*args, **kwargs)
        return madax.hijax.lift(madax.quantize_params(state, madax.SymlogFormat(8)))


@dataclasses.dataclass(frozen=True, eq=True, kw_only=True)
class Writer(kd.train.KDMetricWriter):
    """Its default, which also notes losses; ShapeDtypeStruct has no types of hijax."""

    losses: list = dataclasses.field(default_factory=list, compare=False)

    def write_context_structure(self, step, trainer):
        pass

    def write_step_metrics(self, *, aux, **rest):
        self.losses.append(float(aux.compute(flatten=False).loss_values["loss"]))
        super().write_step_metrics(aux=aux, **rest)


def data():
    x = np.asarray(normal(64, 16))
    return {"image": x, "label": x[:, :8].argmax(1, keepdims=True).astype(np.int32)}


def trainer(workdir, tx, steps=STEPS, **options):
    options = {"trainstep": Coded()} | options
    return kd.train.Trainer(
        train_ds=kd.data.InMemoryPipeline(loader=data, batch_size=16),
        model=Net(),
        train_losses={
            "loss": kd.losses.SoftmaxCrossEntropyWithIntLabels(
                logits="preds", labels="batch.label"
            )
        },
        num_train_steps=steps - 1,  # It takes one more.
        log_metrics_every=1,
        workdir=workdir,
        optimizer=tx,
        sharding=kd.sharding.ShardingStrategy(params=None),
        writer=Writer(),
        **options,
    )


def by_kauldron(*args, **options):
    made = trainer(*args, **options)
    state, _ = made.train()
    return made.writer.losses, state


def by_madax(workdir, tx):
    """The same steps, where codes are differentiated by madax."""
    made = trainer(workdir, madax.hijax.optimizer(tx))
    step = made.trainstep
    state = madax.hijax.lower(step.init(made.train_ds.element_spec))
    model, losses = made.model, step.aux.losses

    @jax.jit
    def one(state, batch):
        context = kd.train.Context.from_state_and_batch(state=state, batch=batch)

        def loss(params):
            value, _ = kd.train.forward_with_loss(
                context.replace(params=params),
                model=model,
                losses=losses,
                rngs=step.rng_streams.train_rngs(state.step),
                is_training=True,
            )
            return value

        value, grads = madax.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step_ = state.step + 1
        return state.replace(step=step_, params=params, opt_state=opt_state), value

    values = []
    for _, batch in zip(range(STEPS), made.train_ds, strict=False):
        batch = kd.sharding.device_put(batch, made.sharding.batch)
        state, value = one(state, batch)
        values.append(float(value))
    return values, state


TXS = {
    "madam": madax.madam(0.02),
    "muon": madax.muon(0.02),
    "muon_madam": madax.muon_madam(0.02),
    "adam": madax.with_quantized_params(optax.adam(1e-2)),
}


@pytest.mark.parametrize("name", TXS)
def test_its_loop_trains_on_a_mesh_as_with_madax(tmp_path, name):
    tx = TXS[name]
    losses, state = by_kauldron(tmp_path, madax.hijax.optimizer(tx))
    ours, expected = by_madax(tmp_path, tx)
    assert losses == ours and losses[-1] < losses[0]
    same(madax.hijax.lower(state.params), expected.params)
    kernel = state.params["Dense_0"]["kernel"]
    assert kernel.codes.dtype == jnp.int8 and len(kernel.devices()) == 8


def test_gradients_are_accumulated(tmp_path):
    tx = optax.MultiSteps(madax.hijax.optimizer(madax.madam(0.02)), 2)
    losses, _ = by_kauldron(tmp_path, tx, steps=2 * STEPS)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_a_run_that_is_resumed_ends_in_the_same_codes(tmp_path):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    losses, whole = by_kauldron(tmp_path / "whole", tx)
    # Its data start again, from the first of four batches.
    options = {"checkpointer": kd.ckpts.Checkpointer(save_interval_steps=4)}
    before, _ = by_kauldron(tmp_path, tx, 5, **options)
    after, state = by_kauldron(tmp_path, tx, **options)
    assert before[:4] + after == losses
    same(*map(madax.hijax.lower, (state.params, whole.params)))
