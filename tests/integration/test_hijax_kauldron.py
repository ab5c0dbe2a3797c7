"""Kauldron's Trainer on lifted codes: its loop on a mesh, accumulation, checkpoints."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import needs_hijax, normal, raises, same

import madax

kd = pytest.importorskip("kauldron.kd")

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compiles"),
]

STEPS = 10
FMT = madax.SymlogFormat(8)


class Net(nn.Module):
    image: kd.kontext.Key = "batch.image"

    @nn.compact
    def __call__(self, image):
        return nn.Dense(8)(nn.relu(nn.Dense(32)(image)))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrainStep(kd.train.TrainStep):
    """Its default, with a field of a user's own."""

    label: str = "a user's"


class Doubled(kd.ckpts.InitTransform):
    """Stands for a pretrained checkpoint."""

    def transform(self, state):
        return state.replace(params=jax.tree.map(lambda w: 2 * w, state.params))


@dataclasses.dataclass(frozen=True, eq=True, kw_only=True)
class Writer(kd.train.KDMetricWriter):
    """Its default, which also notes losses."""

    losses: list = dataclasses.field(default_factory=list, compare=False)

    def write_step_metrics(self, *, aux, **rest):
        self.losses.append(float(aux.compute(flatten=False).loss_values["loss"]))
        super().write_step_metrics(aux=aux, **rest)


X = np.asarray(normal(64, 16))
LABELS = X[:, :8].argmax(1, keepdims=True).astype(np.int32)
DATA = kd.data.InMemoryPipeline(
    loader=lambda: {"image": X, "label": LABELS}, batch_size=16
)


def of_floats(workdir, tx, steps=STEPS, **options):
    return kd.train.Trainer(
        train_ds=DATA,
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
        writer=Writer(),
        **options,
    )


def trainer(*args, **options):
    return madax.trainers.kauldron(of_floats(*args, **options), FMT)


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


FSDP = kd.sharding.FSDPSharding(min_size_to_shard_mb=0)


def is_cut(state):
    codes = state.params["Dense_0"]["kernel"].codes
    return codes.addressable_shards[0].data.size == codes.size / 8


@pytest.mark.parametrize("cut", [False, True])
def test_a_run_that_is_resumed_ends_in_the_same_codes(tmp_path, cut):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    params = {"params": FSDP} if cut else {}
    options = {"sharding": kd.sharding.ShardingStrategy(**params)}
    losses, whole = by_kauldron(tmp_path / "whole", tx, **options)
    # Its data start again, from the first of four batches.
    options["checkpointer"] = kd.ckpts.Checkpointer(save_interval_steps=4)
    before, _ = by_kauldron(tmp_path, tx, 5, **options)
    after, state = by_kauldron(tmp_path, tx, **options)
    assert before[:4] + after == losses and is_cut(state) == cut
    same(*map(madax.hijax.lower, (state.params, whole.params)))


def test_its_evaluators_read_codes(tmp_path):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    evaluator = kd.evals.Evaluator(run=kd.evals.EveryNSteps(4), num_batches=4, ds=DATA)
    made = trainer(tmp_path, tx, evals={"held": evaluator})
    state, _ = made.train()
    aux = made.evals["held"].evaluate(state, STEPS)
    value = aux.compute(flatten=False).loss_values["loss"]
    assert value < made.writer.losses[0]


def test_its_metrics_read_parameters(tmp_path):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    norm = kd.metrics.Norm(tensor="params.Dense_0.kernel", axis=(0, 1))
    made = trainer(tmp_path, tx, 1, train_metrics={"norm": norm})
    start = madax.hijax.decode(made.init_state().params)["Dense_0"]["kernel"]
    _, aux = made.train()
    value = aux.compute(flatten=False).metric_values["norm"]
    np.testing.assert_allclose(value, jnp.linalg.norm(start), rtol=1e-6)


def test_classes_of_a_user_are_kept(tmp_path):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    before = of_floats(tmp_path, tx, trainstep=TrainStep(label="mine"), seed=3)
    after = madax.trainers.kauldron(before, FMT)
    assert isinstance(after.trainstep, TrainStep) and after.trainstep.label == "mine"
    assert isinstance(after, type(before)) and type(after.writer) is Writer
    assert after.seed == 3 and after.trainstep.sharding is after.sharding
    assert type(before.trainstep) is TrainStep
    assert before.sharding.params is kd.sharding.REPLICATED


def test_specs_have_the_shapes_of_the_state(tmp_path):
    """A run writes those of the context."""
    made = trainer(tmp_path, madax.hijax.optimizer(madax.madam(0.02)))
    state = made.init_state()
    shape = lambda x: (x.shape, x.dtype)
    expected = jax.tree.map(shape, state)
    assert jax.tree.map(shape, made.state_specs) == expected
    assert made.state_specs.params["Dense_0"]["kernel"].number_format == FMT
    context = made.context_specs
    assert jax.tree.map(shape, context.params) == expected.params
    assert context.loss_total.shape == () and context.preds.shape == (16, 8)
    assert context.updates["Dense_0"]["kernel"].dtype == jnp.int32


def test_codes_are_made_of_what_was_loaded(tmp_path):
    tx = madax.hijax.optimizer(madax.madam(0.02))
    plain = of_floats(tmp_path, optax.sgd(1.0)).init_state().params
    doubled = jax.tree.map(lambda w: 2 * w, plain)
    expected = madax.quantize_params(doubled, FMT, channel_axis=-1)
    made = madax.trainers.kauldron(
        of_floats(tmp_path, tx, init_transform=Doubled()), FMT, channel_axis=-1
    )
    same(madax.hijax.lower(made.init_state().params), expected)
    # An evaluation restores codes into these.
    bare = made.init_state(skip_transforms=True, skip_optimizer=True)
    kernel = bare.params["Dense_0"]["kernel"]
    assert kernel.codes.dtype == jnp.int8 and bare.opt_state is None


def test_codes_are_sharded_as_floats_would_be(tmp_path):
    sharding = kd.sharding.ShardingStrategy(params=FSDP)
    tx = madax.hijax.optimizer(madax.madam(0.02))
    losses, state = by_kauldron(tmp_path / "cut", tx, sharding=sharding)
    assert is_cut(state)
    ours, _ = by_kauldron(tmp_path / "whole", tx)
    np.testing.assert_allclose(losses, ours, rtol=1e-5)


def test_what_is_no_trainer_is_refused():
    with raises(TypeError, "trainer must be a kd.train.Trainer, got 3 of type int"):
        madax.trainers.kauldron(3, FMT)


def test_arguments_are_checked_before_a_run(tmp_path):
    made = of_floats(tmp_path, madax.hijax.optimizer(madax.madam(0.02)))
    with raises(TypeError, "format must be a Format, got 8 of type int"):
        madax.trainers.kauldron(made, 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis'"):
        madax.trainers.kauldron(made, FMT, axis=-1)
