"""Trainers of others on lifted codes, with no line of theirs changed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import FORMATS
from checkpoints import abstract, restore, save
from flax import nnx
from flax.training.train_state import TrainState
from helpers import mostly_nightly, needs_hijax, normal, same
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import enter, make_mesh

import madax

pytestmark = [needs_hijax, pytest.mark.usefixtures("quick_compiles")]

FMT = FORMATS["symlog8"]
WIDTH, WORDS = 8, 16
IDS = jnp.asarray((np.arange(4)[:, None] * 5 + np.arange(6)) % WORDS)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, kernel_size=(3,), rngs=rngs)
        self.einsum = nnx.Einsum("bti,io->bto", (WIDTH, WIDTH), (WIDTH,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + jnp.tanh(self.einsum(self.conv(x)))


class Model(nnx.Module):
    """Tied embeddings, dropout, statistics, and a block that is rematerialised."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.block = Block(rngs)
        self.batch_norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.own = nnx.Param(normal(WIDTH, WIDTH))

    def __call__(self, ids):
        x = nnx.remat(lambda block, x: block(x))(self.block, self.embed(ids))
        x = self.dropout(self.batch_norm(x)) + jnp.dot(x, self.own)
        return self.embed.attend(x) * self.own.sum()


def loss(model, ids):
    logits = model(ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()


def trained(model, tx, value_and_grad, steps=30):
    """The loop of Flax's pages."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, ids):
        value, grads = value_and_grad(loss)(model, ids)
        optimizer.update(model, grads)
        return value

    values = [step(model, optimizer, IDS) for _ in range(steps)]
    state = nnx.state(optimizer, nnx.optimizer.OptState)
    return values, nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat), state


def coded():
    return madax.quantize_params(nnx.jit(lambda: Model(nnx.Rngs(0)))(), FMT)


NNX = {
    "madam": lambda: madax.madam(0.02, moment_format=madax.MomentFormat(8)),
    "muon": lambda: madax.muon(0.02),
    "muon_madam": lambda: madax.muon_madam(0.02),
    "adam": lambda: madax.with_quantized_params(optax.adam(0.02)),
}


@pytest.mark.parametrize("name", mostly_nightly(NNX, "madam"))
def test_nnx_trains_as_with_madax(name):
    ours = trained(coded(), NNX[name](), madax.value_and_grad)
    tx = madax.hijax.optimizer(NNX[name]())
    model = madax.hijax.lift(coded())
    values, params, stats, state = trained(model, tx, nnx.value_and_grad)
    kinds = [type(w).__name__ for w in jax.tree.leaves(params)]
    assert kinds.count("LiftedArray") == 8
    same((values, madax.hijax.lower(params), stats, state), ours)
    assert values[-1] < values[0]
    # nnx.remat returns its block, which JAX cannot do with hijax types.
    model = madax.hijax.lower(model)
    model.eval()
    logits = nnx.jit(lambda model: model(IDS))(model)
    assert np.all(np.isfinite(logits))


class Net(nn.Module):
    """A stack of layers by nn.scan, with a scale for each of them."""

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.tanh(layer(x)), None

        scan = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scan(nn.Dense(WIDTH, name="layers"), x, None)
        return nn.Dense(4)(x)


def test_linen_s_train_state_trains_as_with_madax():
    net, x = Net(), normal(16, WIDTH)
    y = jnp.arange(16) % 4
    params = net.init(jax.random.key(0), x)["params"]
    params = madax.quantize_params(params, FMT, channel_axis=0)

    def run(params, tx, value_and_grad):
        state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

        @jax.jit
        def step(state):
            def loss(params):
                logits = state.apply_fn({"params": params}, x)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean()

            value, grads = value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value

        values = []
        for _ in range(100):
            state, value = step(state)
            values.append(value)
        return values, state.params, state.opt_state

    tx = madax.madam(0.05)
    values, lifted, state = run(
        madax.hijax.lift(params), madax.hijax.optimizer(tx), jax.value_and_grad
    )
    same(
        (values, madax.hijax.lower(lifted), state),
        run(params, tx, madax.value_and_grad),
    )
    assert values[-1] < 0.5 * values[0]


# --- a mesh ---------------------------------------------------------------------------

ON_MESH = {"up": P(None, "model"), "down": P("model", None), "bias": P()}


def placed(axis_type, lift):
    params = {"up": normal(8, 16), "down": normal(16, 8, seed=1), "bias": jnp.ones(8)}
    params = lift(madax.quantize_params(params, FMT, channel_axis=-1))
    on = {k: NamedSharding(make_mesh(axis_type), s) for k, s in ON_MESH.items()}
    return madax.hijax.put(params, on)


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_a_mesh_trains_as_with_madax(axis_type):
    mesh = make_mesh(axis_type)
    x = jax.device_put(normal(8, 8, seed=2), NamedSharding(mesh, P("data", None)))

    def loss(p, x):
        hidden = jnp.tanh(x @ p["up"])
        out = P("data", None) if axis_type == "explicit" else None
        y = jnp.einsum("bi,io->bo", hidden, p["down"], out_sharding=out) + p["bias"]
        return jnp.mean((y - x) ** 2)

    def run(params, tx, value_and_grad):
        @jax.jit
        def step(params, state, x):
            value, grads = value_and_grad(loss)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        state, values = jax.jit(tx.init)(params), []
        for _ in range(30):
            params, state, value = jax.block_until_ready(step(params, state, x))
            values.append(value)
        return params, state, values

    tx = madax.madam(0.05)
    with enter(mesh):
        lift = madax.hijax.lift
        lifted = placed(axis_type, lift)
        scale = madax.hijax.lower(lifted)["up"].scale
        assert scale.sharding.spec == P(None, "model")
        params, state, values = run(
            lifted, madax.hijax.optimizer(tx), jax.value_and_grad
        )
        ours = run(placed(axis_type, lambda q: q), tx, madax.value_and_grad)
    assert params["up"].codes.dtype == jnp.int8
    assert params["up"].sharding.is_equivalent_to(lifted["up"].sharding, 2)
    same((madax.hijax.lower(params), state, values), ours)
    assert values[-1] < 0.7 * values[0]


# --- checkpoints ----------------------------------------------------------------------


def lifted_tree(axis_type=None):
    if axis_type:
        return placed(axis_type, madax.hijax.lift)
    params = {"w": normal(8, 16), "b": {"c": jnp.ones(3)}}
    params = madax.quantize_params(params, FORMATS["log16"], channel_axis=0)
    return madax.hijax.lift(params, jnp.bfloat16)


def assert_restored(tree, expected):
    same(*map(madax.hijax.lower, (tree, expected)))
    for x, y in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize("axis_type", [None, "auto"])
def test_a_trainer_s_own_checkpoints_keep_codes(tmp_path, axis_type):
    """As in Tunix: a manager with items, and arguments made of the model's state."""
    tree = lifted_tree(axis_type)
    args, handlers = ocp.args, {"model": ocp.PyTreeCheckpointHandler()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(), tree)
        saved = args.PyTreeSave(item=tree, save_args=save_args)
        manager.save(1, args=args.Composite(model=saved))
        manager.wait_until_finished()
        wanted = args.PyTreeRestore(
            item=tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target=tree),
        )
        restored = manager.restore(1, args=args.Composite(model=wanted))
    assert_restored(restored.model, tree)


def test_standard_checkpoints_keep_codes(tmp_path):
    tree = lifted_tree()
    save(tmp_path / "tree", tree)
    for target in ((), (tree,), (abstract(tree),)):
        assert_restored(restore(tmp_path / "tree", *target), tree)
    # Other arrays are restored as ever, lowered codes among them.
    save(tmp_path / "lowered", madax.hijax.lower(tree))
    lowered = restore(tmp_path / "lowered", madax.hijax.lower(tree))
    same(lowered, madax.hijax.lower(tree))


@pytest.mark.filterwarnings("ignore:Use:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sharding info:UserWarning")
def test_checkpoints_of_orbax_v1_keep_codes(tmp_path):
    """As in Keras and MaxText, whose handlers are made for each checkpointer."""
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    tree = lifted_tree()
    v1.save_pytree(tmp_path / "tree", tree)
    for target in ((), (tree,), (abstract(tree),)):
        assert_restored(v1.load_pytree(tmp_path / "tree", *target), tree)


# --- Equinox and Haiku ----------------------------------------------------------------


def test_equinox_trains_the_arrays_of_a_partition():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 16, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    params = madax.hijax.lift(madax.quantize_params(arrays, FMT))
    x, tx = normal(8, 4), madax.hijax.optimizer(madax.madam(0.05))

    def loss(params, static, x):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - 1) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: loss(p, static, x))(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    assert type(params.layers[0].weight).__name__ == "LiftedArray"
    # Its optimizers of floats are an error.
    with pytest.raises(TypeError, match=r"wrap the optimizer in madax\.hijax"):
        eqx.apply_updates(params, jax.tree.map(jnp.ones_like, params))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_haiku_trains_and_its_convolutions_take_the_decoded_tree():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(
        hk.transform(lambda x: hk.Linear(4)(hk.Flatten()(hk.Conv2D(8, 3)(x))))
    )
    x, tx = normal(2, 4, 4, 3), madax.hijax.optimizer(madax.madam(0.05))
    params = madax.quantize_params(net.init(jax.random.key(0), x), FMT)
    params = madax.hijax.lift(params)

    def loss(params):
        return jnp.mean((net.apply(madax.hijax.decode(params), x) - 1) ** 2)

    state, first = tx.init(params), None
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    first = loss(params)
    for _ in range(20):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.5 * first
    with pytest.raises(ValueError, match=r"pass madax\.hijax\.decode"):
        net.apply(params, x)
