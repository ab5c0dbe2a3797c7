"""Flax models whose layers are not all alike are trained a layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from flax import nnx
from helpers import is_quantized, mostly_nightly, normal, raises
from models import nnx_list

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

WIDTH, LENGTH = 8, 6


def assert_moved_by(grads, before, after):
    """What a step of SGD at a rate of 1 took from parameters are their gradients."""
    states = nnx.state(before, nnx.Param), nnx.state(after, nnx.Param), grads
    jax.tree.map(
        lambda old, new, g: np.testing.assert_allclose(old - new, g, 1e-4, 1e-6),
        *map(nnx.to_pure_dict, states),
    )


class Block(nnx.Module):
    """A layer as language models have it: many arguments, and a cache returned."""

    def __init__(self, rngs, window, hidden, rate=0.0):
        self.window = window
        self.up = nnx.Linear(WIDTH, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, positions, cache, mask):
        near = positions[:, :, None] - positions[:, None] < self.window
        seen = jnp.where(mask & near, 1.0, 0.0) @ x
        return cache, x + self.dropout(self.down(jnp.tanh(self.up(seen))))


class Model(nnx.Module):
    def __init__(self, blocks, **options):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, WIDTH, rngs=rngs)
        make = lambda window, hidden: Block(rngs, window, hidden, **options)
        self.blocks = nnx_list([make(*each) for each in blocks])
        self.last = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x, positions, cache, mask):
        x = self.first(x)
        for block in self.blocks:
            cache, x = block(x, positions, cache, mask)
        return cache, self.last(x)


BATCH = {
    "x": normal(4, LENGTH, 3, seed=1),
    "positions": jnp.broadcast_to(jnp.arange(LENGTH), (4, LENGTH)),
    "mask": jnp.tril(jnp.ones((LENGTH, LENGTH), bool)) & jnp.ones((4, 1, 1), bool),
}


def error(model, batch):
    _, out = model(batch["x"], batch["positions"], None, batch["mask"])
    return jnp.mean((out - jnp.roll(batch["x"], -1, 1)) ** 2)


def by_layers(split, tx, **options):
    def loss(w, x, batch):
        # The model as it is, with a function instead of its layers.
        rest = split.ends(w)
        rest.blocks = (lambda *_: (None, x),)
        return error(rest, batch)

    return madax.layerwise(
        tx,
        lambda w, batch: split.ends(w).first(batch["x"]),
        split.layer(lambda block, x, **shared: block(x, cache=None, **shared)[1]),
        loss,
        shared=lambda w, batch: {k: batch[k] for k in ("positions", "mask")},
        **options,
    )


# Of each layer the window and the width inside, and then the shapes of the stacks.
NETS = {
    "in_turns": ([(1, 8), (9, 8), (1, 8), (9, 8), (1, 8)], {"": (5, 8, 8)}),
    "last": ([(1, 8), (1, 8), (9, 8)], {"": (3, 8, 8)}),
    "wider_later": (
        [(9, 8), (9, 16), (1, 16)],
        {"blocks_0": (1, 8, 8), "blocks_1": (2, 8, 16)},
    ),
    "wider_in_turns": (
        [(1, 8), (9, 16)] * 2 + [(1, 8)],
        {
            "blocks_0/blocks_0": (2, 8, 8),
            "blocks_0/blocks_1": (2, 8, 16),
            "blocks_4": (1, 8, 8),
        },
    ),
}


@pytest.mark.parametrize("name", mostly_nightly(NETS, "in_turns", "wider_in_turns"))
def test_the_gradients_match_the_model(name):
    blocks, shapes = NETS[name]
    model = Model(blocks)
    split = madax.split_layers(model, "blocks")
    paths = jax.tree_util.tree_leaves_with_path(split.params["layers"])
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in paths
    }
    ends = {f"{k}/up/kernel".strip("/"): shape for k, shape in shapes.items()}
    assert {k: v for k, v in found.items() if k.endswith("up/kernel")} == ends

    # A step takes the gradients off the parameters.
    init, step = by_layers(split, optax.sgd(1.0), dtype=jnp.float32)
    params, _, value = jax.jit(step)(split.params, init(split.params), BATCH)
    expected, grads = nnx.jit(nnx.value_and_grad(error))(model, BATCH)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert_moved_by(grads, model, split.model(params))


def test_a_model_of_trained_codes_is_evaluated():
    model = Model(NETS["in_turns"][0])
    split = madax.split_layers(model, "blocks")
    params = madax.quantize_params(split.params, FORMATS["symlog8"], channel_axis=0)
    init, step = by_layers(split, madax.muon_madam())
    state, step, losses = init(params), jax.jit(step), []
    for _ in range(20):
        params, state, value = step(params, state, BATCH)
        losses.append(value)
    assert losses[-1] < 0.8 * losses[0]
    trained, evaluate = split.model(params), nnx.jit(error)
    codes = nnx.to_pure_dict(nnx.state(trained, nnx.Param))
    assert is_quantized(codes["blocks"][4]["up"]["kernel"])
    next_loss = step(params, state, BATCH)[2]
    assert evaluate(trained, BATCH) == pytest.approx(float(next_loss), rel=1e-6)
    inside = jax.jit(lambda p: error(split.model(madax.dequantize_params(p)), BATCH))
    assert inside(params) == pytest.approx(float(next_loss), rel=1e-6)
    # The given model is as it was.
    assert evaluate(model, BATCH) == pytest.approx(float(losses[0]), rel=0.1)


def test_layers_of_kinds_drop_by_keys_of_their_own():
    """With Flax's first form of dropout, a stream that a layer is made with."""
    model = Model([(1, 8), (9, 8)] * 2, rate=0.5)
    split = madax.split_layers(model, "blocks")
    drawn = lambda block, x: block.dropout(jnp.ones_like(x[0]))
    layers = split.layer(lambda block, x: jnp.roll(x, 1, 0).at[0].set(drawn(block, x)))
    assert len(layers) == 4 and len(set(layers)) == 2
    init, step = madax.layerwise(
        optax.set_to_zero(),
        lambda w, batch: jnp.zeros((5, 20, 20)),
        layers,
        lambda w, x, batch: (x.sum(), x),
        has_aux=True,
    )
    state, step = init(split.params), jax.jit(step)
    draws = [
        step(split.params, state, 0.0, jax.random.key(i))[2][1]["aux"][:4]
        for i in range(2)
    ]
    masks = np.concatenate(draws).reshape(8, -1) > 0
    assert np.abs(np.corrcoef(masks) - np.eye(8)).max() < 0.2


class Cross(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, y, memory):
        return y + jnp.tanh(self.linear(y + memory))


class Translator(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        linear = lambda: nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.encoder = nnx.Sequential(linear(), linear())
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.decoder = nnx_list([Cross(rngs) for _ in range(3)])

    def __call__(self, batch):
        x, y = batch
        memory = self.norm(self.encoder(x))
        for block in self.decoder:
            y = block(y, memory)
        return jnp.mean((y - x) ** 2)


def test_an_encoder_and_a_decoder_are_two_stacks():
    model = Translator()
    split = madax.split_layers(model, ("encoder", "decoder"))
    assert {k: len(v) for k, v in split.params["layers"].items()} == {
        "encoder": 2,
        "decoder": 1,
    }
    init, step = madax.layerwise(
        optax.sgd(1.0),
        {
            "encoder": lambda w, batch: batch[0],
            "decoder": lambda w, batch, x: batch[1],
        },
        split.layer(),
        lambda w, y, batch: jnp.mean((y - batch[0]) ** 2),
        shared={"decoder": lambda w, batch, x: {"memory": split.ends(w).norm(x)}},
    )
    batch = normal(5, WIDTH), normal(5, WIDTH, seed=1)
    params, _, value = jax.jit(step)(split.params, init(split.params), batch)
    expected, grads = nnx.jit(nnx.value_and_grad(Translator.__call__))(model, batch)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert_moved_by(grads, model, split.model(params))
    # Either stack may have a function of its own.
    functions = {"encoder": lambda block, x: x, "decoder": None}
    assert set(split.layer(functions)) == {"encoder", "decoder"}
    with raises(TypeError, "split.layer takes", "for each of ['encoder', 'decoder']"):
        split.layer({"encoder": None})


def test_many_kinds_are_told_of_with_what_they_differ_in():
    windows = [(window, 8) for window in range(17)]
    wide = [(1, 8 + i) for i in range(17)]
    functions = Model([(1, 8)] * 17)
    for block in functions.blocks:
        block.act = lambda x: x
    shape = "its down.kernel is Param of shape (9, 8) and not Param of shape (8, 8)"
    for model, differs in (
        (Model(windows), "model.blocks.0, as its window is 1 and not 0: make it the"),
        (Model(wide), shape),
        (functions, "its act is <function"),
    ):
        with pytest.warns(UserWarning, match="model.blocks has 17 kinds") as found:
            split = madax.split_layers(model, "blocks")
        (warning,) = found
        assert differs in str(warning.message) and len(str(warning.message)) < 400
        assert warning.filename == __file__
        assert len(set(split.layer())) == 17
