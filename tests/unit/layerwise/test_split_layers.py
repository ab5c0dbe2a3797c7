"""Flax models are trained a layer at a time as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from flax import linen, nnx
from helpers import mostly_nightly, raises
from models import nnx_list

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEPTH, WIDTH, VOCABULARY = 3, 8, 16
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 7))


class Block(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x, rngs=None):
        return x + self.dropout(nnx.relu(self.mlp(self.norm(x))), rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs, blocks):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = blocks

    def loss(self, x, tokens):
        logits, labels = self.embedding.attend(x), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sequential(rngs):
    return nnx.Sequential(*(Block(rngs) for _ in range(DEPTH)))


def vmapped(rngs):
    del rngs
    make = nnx.vmap(lambda key: Block(nnx.Rngs(key)))
    return make(jax.random.split(jax.random.key(0), DEPTH))


def applied(model, x):
    if isinstance(model.blocks, nnx.Sequential):
        return model.blocks(x)
    scan = nnx.scan(
        lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return scan(x, model.blocks)


@pytest.mark.parametrize("make", mostly_nightly([sequential, vmapped], sequential))
def test_the_gradients_match_the_model(make):
    model = Model(nnx.Rngs(0), make(nnx.Rngs(1)))
    graph, state = nnx.split(model)

    def whole(state):
        model = nnx.merge(graph, state)
        return model.loss(applied(model, model.embedding(TOKENS[:, :-1])), TOKENS)

    expected, grads = jax.value_and_grad(whole)(state)
    split = madax.split_layers(model, "blocks")
    init, step = madax.layerwise(
        # A step takes the gradient off the parameters.
        optax.sgd(1.0),
        lambda ends, tokens: split.ends(ends).embedding(tokens[:, :-1]),
        split.layer(),
        lambda ends, x, tokens: split.ends(ends).loss(x, tokens),
        dtype=jnp.float32,
    )
    params, _, value = jax.jit(step)(split.params, init(split.params), TOKENS)
    assert value == pytest.approx(float(expected), rel=1e-6)
    moved = jax.tree.map(jnp.subtract, split.params, params)
    after = nnx.merge(graph, jax.tree.map(jnp.subtract, state, grads))
    there = madax.split_layers(after, "blocks").params
    expected = jax.tree.map(jnp.subtract, split.params, there)
    assert sorted(moved["layers"]) == ["mlp", "norm"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved, expected
    )
    assert model.blocks is not None


def test_codes_are_trained_with_dropout():
    model = Model(
        nnx.Rngs(0), nnx_list([Block(nnx.Rngs(i), 0.5) for i in range(DEPTH)])
    )
    split = madax.split_layers(model, "blocks")
    params = {
        "ends": madax.quantize_params(split.params["ends"], FORMATS["symlog8"]),
        "layers": madax.quantize_params(
            split.params["layers"],
            FORMATS["symlog8"],
            where=lambda path, w: path.endswith("kernel"),
            channel_axis=0,
        ),
    }
    init, step = madax.layerwise(
        madax.madam(0.02, floor=1.0),
        lambda ends, tokens: split.ends(ends).embedding(tokens[:, :-1]),
        split.layer(),
        lambda ends, x, tokens: split.ends(ends).loss(x, tokens),
        dtype=jnp.float32,
    )
    state, step, losses = init(params), jax.jit(step), []
    for i in range(40):
        key = jax.random.key(i)
        params, state, value = step(params, state, TOKENS, key)
        losses.append(value)
    one, other = (step(params, state, TOKENS, jax.random.key(i))[2] for i in range(2))
    assert one != other
    assert min(losses[-5:]) < 0.7 * losses[0]


# --- random numbers and statistics ----------------------------------------------------


class Noisy(nnx.Module):
    """A layer with dropout as Flax documents it first: with a stream of its own."""

    def __init__(self, rngs, rate=0.5):
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.first = nnx.Dropout(rate, rngs=rngs)
        self.second = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, *, shift=0.0):
        y = self.mlp(x) + shift
        return jnp.concatenate([self.first(y), self.second(y)])


class Ends(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx_list([Noisy(rngs) for _ in range(DEPTH)])


X = jnp.float32(np.random.default_rng(1).normal(size=(64, WIDTH)))
eager_or_jitted = pytest.mark.parametrize("compiled", [lambda f: f, jax.jit])


@eager_or_jitted
def test_layers_draw_from_the_key_that_they_are_given(compiled):
    model = Ends(nnx.Rngs(0))
    split = madax.split_layers(model, "blocks")
    w = jax.tree.map(lambda x: x[1], split.params["layers"])
    layer = compiled(split.layer())
    out = np.asarray(layer(w, X, jax.random.key(1)))
    kept, whole = out != 0, np.tile(model.blocks[1].mlp(X), (2, 1))
    np.testing.assert_allclose(out, np.where(kept, 2 * whole, 0), rtol=1e-5)
    assert 0.4 < np.mean(kept) < 0.6
    # Both dropouts, and other keys, draw other numbers; the same key draws the same.
    others = [
        kept[:64],
        kept[64:],
        np.asarray(layer(w, X, jax.random.key(2)))[:64] != 0,
    ]
    for i, one in enumerate(others):
        for other in others[:i]:
            assert 0.4 < np.mean(one == other) < 0.6
    np.testing.assert_array_equal(layer(w, X, jax.random.PRNGKey(1)), out)
    with raises(
        ValueError, "model.blocks.first.", "has no key; pass a key to the step"
    ):
        layer(w, X)
    np.testing.assert_allclose(
        split.layer()(w, X, jax.random.key(1), shift=1.0),
        np.where(kept, 2 * (whole + 1), 0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_network_with_dropout_is_trained():
    """Each step, and each layer, drops other values."""
    split = madax.split_layers(Ends(nnx.Rngs(0)), "blocks")
    w = jax.tree.map(jnp.ones_like, split.params["layers"])
    params = split.params | {"layers": w}
    init, step = madax.layerwise(
        optax.set_to_zero(),
        lambda ends, key: jnp.zeros((DEPTH + 1, 2, WIDTH)),
        lambda w, x, key: jnp.roll(x, 1, 0).at[0].set(split.layer()(w, X[:1], key)),
        lambda ends, x, key: (x.sum(), (x, split.ends(ends, key).dropout(X))),
        dtype=jnp.float32,
        has_aux=True,
    )
    step, state = jax.jit(step), init(params)
    keys = [jax.random.key(i) for i in range(2)]
    (x, y), (x1, y1) = (step(params, state, k, k)[2][1]["aux"] for k in keys)
    masks = [np.asarray(one).ravel() != 0 for one in [*x[:DEPTH], *x1[:DEPTH]]]
    assert len({mask.tobytes() for mask in masks}) == 2 * DEPTH
    assert 0.4 < np.mean((y != 0) == (y1 != 0)) < 0.6


@eager_or_jitted
def test_ends_are_new_each_time(compiled):
    model = Ends(nnx.Rngs(0))
    split = madax.split_layers(model, "blocks")
    values = split.params["ends"]
    with raises(ValueError, "model.norm.mean is a BatchStat that the model writes to"):
        compiled(lambda values: split.ends(values).norm(X))(values)
    with raises(ValueError, "model.dropout.", "has no key; pass", "ends(values, key)"):
        compiled(lambda values: split.ends(values).dropout(X))(values)
    dropped = compiled(lambda values, key: split.ends(values, key).dropout(X))
    one, again, other = (dropped(values, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert 0.4 < np.mean((one != 0) == (other != 0)) < 0.6
    # A norm that is not trained keeps its statistics, and so does the given model.
    model.norm.mean = nnx.BatchStat(jnp.full(WIDTH, 3.0))
    model.eval()
    split = madax.split_layers(model, "blocks")
    both = compiled(lambda v: split.ends(v).norm(split.ends(v).dropout(X)))(values)
    np.testing.assert_allclose(both, (X - 3) / np.sqrt(1 + 1e-5), rtol=1e-4)
    mean, _ = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    np.testing.assert_array_equal(mean, np.full(WIDTH, 3.0))


# --- what is shared -------------------------------------------------------------------


def shared_by_all(model, block):
    model.blocks = nnx_list([block] * DEPTH)


def shared_by_two(model, block):
    model.blocks[2].mlp.kernel = model.blocks[1].mlp.kernel


def shared_with_ends(model, block):
    model.head = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(3))
    model.head.kernel = model.blocks[1].mlp.kernel


def shared_with_a_stack(model, block):
    model.blocks = vmapped(None)
    model.scale = model.blocks.norm.scale


SHARED = [
    (shared_by_all, "model.blocks.1.mlp.bias and model.blocks.0.mlp.bias are one"),
    (shared_by_two, "model.blocks.2.mlp.kernel and model.blocks.1.mlp.kernel are one"),
    (shared_with_ends, "model.blocks.1.mlp.kernel and model.head.kernel are one"),
    (shared_with_a_stack, "model.blocks.norm.scale and model.scale are one"),
]


@pytest.mark.parametrize(("share", "message"), SHARED)
def test_shared_parameters_are_not_untied(share, message):
    model = Model(nnx.Rngs(0), nnx_list([Block(nnx.Rngs(i)) for i in range(DEPTH)]))
    share(model, Block(nnx.Rngs(0)))
    with raises(ValueError, message):
        madax.split_layers(model, "blocks")


def test_streams_may_be_shared_and_one_layer_is_a_list():
    rngs = nnx.Rngs(0)
    model = Model(rngs, nnx_list([Noisy(rngs)]))
    split = madax.split_layers(model, "blocks")
    assert split.params["layers"]["mlp"]["kernel"].shape == (1, WIDTH, WIDTH)


def test_a_scan_of_linen_is_split():
    class Body(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            return x + linen.relu(linen.Dense(WIDTH)(linen.RMSNorm()(x))), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(WIDTH, name="first")(x)
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = linen.scan(Body, length=DEPTH, **axes)(name="blocks")(x, None)
            return x

    x = np.float32(np.random.default_rng(0).normal(size=(5, 3)))
    variables = Net().init(jax.random.key(0), x)["params"]
    params = {"ends": {"first": variables["first"]}, "layers": variables["blocks"]}
    init, step = madax.layerwise(
        optax.sgd(1.0),
        lambda ends, x: linen.Dense(WIDTH).apply({"params": ends["first"]}, x),
        lambda w, x: Body().apply({"params": w}, x)[0],
        lambda ends, x, batch: jnp.mean((x - 1) ** 2),
        dtype=jnp.float32,
    )
    new, _, value = jax.jit(step)(params, init(params), x)
    whole = lambda v: jnp.mean((Net().apply({"params": v}, x) - 1) ** 2)
    expected, grads = jax.value_and_grad(whole)(variables)
    assert value == pytest.approx(float(expected), rel=1e-6)
    moved = jax.tree.map(jnp.subtract, params, new)
    found = moved["ends"] | {"blocks": moved["layers"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, grads)


def test_bad_input_is_refused():
    with raises(TypeError, "model must be a flax.nnx.Module, got 3"):
        madax.split_layers(3, "blocks")
    model = Model(nnx.Rngs(0), sequential(nnx.Rngs(1)))
    with raises(ValueError, "name is 'layers'", "pass the path"):
        madax.split_layers(model, "layers")
    split = madax.split_layers(model, "blocks")
    for wrong in ((split.params["layers"], X), (3,), ({"blocks": 3},)):
        with raises(TypeError, "split.layer takes a function", "write split.layer(lam"):
            split.layer(*wrong)
    model = Model(nnx.Rngs(0), nnx.Sequential(Block(nnx.Rngs(0)), nnx.relu))
    with raises(ValueError, "model.blocks must be a list of modules", "'Block', "):
        madax.split_layers(model, "blocks")
    with raises(ValueError, "model.blocks must be a list of modules", "of []"):
        madax.split_layers(Model(nnx.Rngs(0), nnx_list([])), "blocks")
    for one in (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0))):
        with raises(ValueError, "model.blocks is a", "no leading axis in common"):
            madax.split_layers(Model(nnx.Rngs(0), one), "blocks")
    norms = [nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)) for _ in range(2)]
    with raises(ValueError, "model.blocks has variables", "['mean', 'var']"):
        madax.split_layers(Model(nnx.Rngs(0), nnx_list(norms)), "blocks")
