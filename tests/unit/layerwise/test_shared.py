"""Layers that share values, that are of several kinds, and that are several stacks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS, OPTIMIZERS
from helpers import mostly_nightly, normal, raises
from layers import batches, embed, layer, loss, one, trained, weights

import madax

DEPTH, WIDTH = 4, 8
quick = pytest.mark.usefixtures("quick_compiles")


def unstacked(stack):
    return [one(stack, i) for i in range(len(jax.tree.leaves(stack)[0]))]


def check_step(functions, params, batch, whole, **options):
    """A step takes off the parameters what jax.grad of the whole network does."""
    init, step = madax.layerwise(
        optax.sgd(1.0), *functions, dtype=jnp.float32, **options
    )
    new, _, value = jax.jit(step)(params, init(params), batch)
    expected, grads = jax.jit(jax.value_and_grad(whole))(params, batch)
    assert value == pytest.approx(float(expected), rel=1e-6)
    for g in jax.tree.leaves(grads):
        assert np.all(np.any(np.abs(g) > 1e-5, axis=tuple(range(1, g.ndim))))
    jax.tree.map(
        lambda old, new, g: np.testing.assert_allclose(old - new, g, 1e-4, 1e-6),
        params,
        new,
        grads,
    )


# --- what layers share ----------------------------------------------------------------


def attended(w, x, *, mask, rotary, memory):
    scores = jnp.where(mask, (x * rotary) @ w["q"] @ jnp.swapaxes(x, 1, 2), -1e9)
    return x + jnp.tanh(jax.nn.softmax(scores) @ x @ w["v"] + memory["x"] * w["m"])


def all_shared(ends, batch):
    x, positions = batch
    mask = positions[:, :, None] >= positions[:, None]
    rotary = jnp.cos(positions)[..., None]
    memory = {"x": jnp.tanh(x @ ends["memory"]), "unused": positions}
    return {"mask": mask, "rotary": rotary, "memory": memory}


ATTENTION = (
    lambda ends, batch: batch[0] @ ends["in"],
    attended,
    lambda ends, x, batch: jnp.mean((x @ ends["in"].T - batch[0]) ** 2),
)


def attention(depth=DEPTH, batch=4, length=6):
    ends = {"in": normal(3, WIDTH), "memory": normal(3, WIDTH, seed=1)}
    square = lambda seed: normal(depth, WIDTH, WIDTH, seed=seed, scale=0.3)
    layers = {"q": square(2), "v": square(3), "m": normal(depth, WIDTH, seed=4)}
    x = normal(batch, length, 3, seed=5)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return {"ends": ends, "layers": layers}, (x, positions)


@quick
@pytest.mark.parametrize("microbatches", [1, 2])
def test_what_layers_share_has_its_gradient(microbatches):
    def whole(params, batch):
        x, shared = (
            ATTENTION[0](params["ends"], batch),
            all_shared(params["ends"], batch),
        )
        for w in unstacked(params["layers"]):
            x = attended(w, x, **shared)
        return ATTENTION[2](params["ends"], x, batch)

    params, batch = attention()
    check_step(
        ATTENTION, params, batch, whole, shared=all_shared, microbatches=microbatches
    )


def temporary_bytes(functions, depth, **options):
    params, batch = jax.eval_shape(lambda: attention(depth, batch=2, length=256))
    init, step = madax.layerwise(optax.sgd(1.0), *functions, **options)
    lowered = jax.jit(step).lower(params, jax.eval_shape(init, params), batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@quick
def test_a_mask_is_kept_once():
    """By the compiler's count: beside masks a layer keeps its input, of 16 kB."""
    carried = (
        lambda ends, batch: {"x": ATTENTION[0](ends, batch), **all_shared(ends, batch)},
        lambda w, x: x | {"x": attended(w, **x)},
        lambda ends, x, batch: ATTENTION[2](ends, x["x"], batch),
    )
    mask, more = 2 * 256**2, 8
    grown = [
        temporary_bytes(functions, 4 + more, **options)
        - temporary_bytes(functions, 4, **options)
        for functions, options in ((ATTENTION, {"shared": all_shared}), (carried, {}))
    ]
    # Parameters that are not donated are copied, too: not a kB a layer.
    assert grown[0] < more * 20_000
    assert grown[1] > more * mask


# --- kinds of layers ------------------------------------------------------------------


def scaled(by, w, x, key=None):
    x = x if key is None else x + jax.random.normal(key, x.shape)
    return x + jnp.tanh(by * (x @ w["w"]))


SMALL, LARGE = (functools.partial(scaled, by) for by in (0.5, 2.0))
PATTERNS = {
    "repeated": ([SMALL, LARGE], [SMALL, LARGE, SMALL, LARGE]),
    "each": ([SMALL, LARGE, LARGE, SMALL],) * 2,
    "all": ([LARGE], [LARGE] * DEPTH),
}


@quick
@pytest.mark.parametrize("name", mostly_nightly(PATTERNS, "repeated", "each"))
def test_layers_are_of_kinds_by_a_pattern(name):
    pattern, each = PATTERNS[name]
    functions = (
        lambda ends, batch: batch @ ends,
        pattern,
        lambda ends, x, batch: jnp.mean((x @ ends.T - batch) ** 2),
    )

    def whole(params, batch):
        x = functions[0](params["ends"], batch)
        for i, (f, w) in enumerate(zip(each, unstacked(params["layers"]), strict=True)):
            x = f(w, x, jax.random.fold_in(jax.random.fold_in(KEY, i), 0))
        return functions[2](params["ends"], x, batch)

    layers = {"w": normal(DEPTH, WIDTH, WIDTH, scale=0.3)}
    params = {"ends": normal(3, WIDTH), "layers": layers}
    init, step = madax.layerwise(optax.sgd(1.0), *functions, dtype=jnp.float32)
    batch = normal(5, 3, seed=1)
    new, _, value = jax.jit(step)(params, init(params), batch, KEY)
    expected, grads = jax.jit(jax.value_and_grad(whole))(params, batch)
    assert value == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda old, new, g: np.testing.assert_allclose(old - new, g, 1e-4, 1e-6),
        params,
        new,
        grads,
    )


KEY = jax.random.key(3)

# --- several stacks -------------------------------------------------------------------


def encoded(w, x, *, mask):
    return x + jnp.tanh((x * mask) @ w["w"])


def decoded(w, x, *, memory, mask):
    seen = jax.nn.softmax(x @ w["q"] @ jnp.swapaxes(memory, 1, 2)) * mask
    return x + jnp.tanh(seen @ memory @ w["v"])


TRANSLATION = {
    "embed": {
        "encoder": lambda ends, batch: batch["from"] @ ends["in"],
        "decoder": lambda ends, batch, x: batch["to"] @ ends["in"],
    },
    "shared": {
        "encoder": lambda ends, batch: {"mask": batch["mask"][..., None]},
        "decoder": lambda ends, batch, x: {
            "memory": x * ends["norm"],
            "mask": batch["mask"][:, None],
        },
    },
    "layer": {"encoder": encoded, "decoder": decoded},
}


def translation_loss(ends, x, batch):
    return jnp.mean((x @ ends["in"].T - batch["to"]) ** 2)


@quick
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_decoder_attends_to_an_encoder(microbatches):
    def whole(params, batch):
        ends, layers = params["ends"], params["layers"]
        x = batch["from"] @ ends["in"]
        for w in unstacked(layers["encoder"]):
            x = encoded(w, x, mask=batch["mask"][..., None])
        memory, x = x * ends["norm"], batch["to"] @ ends["in"]
        for w in unstacked(layers["decoder"]):
            x = decoded(w, x, memory=memory, mask=batch["mask"][:, None])
        return translation_loss(ends, x, batch)

    square = lambda depth, seed: normal(depth, WIDTH, WIDTH, seed=seed, scale=0.3)
    params = {
        "ends": {"in": normal(3, WIDTH), "norm": normal(WIDTH, seed=1)},
        "layers": {
            "encoder": {"w": square(3, 2)},
            "decoder": {"q": square(2, 3), "v": square(2, 4)},
        },
    }
    batch = {"from": normal(4, 6, 3, seed=5), "to": normal(4, 5, 3, seed=6)}
    batch["mask"] = batch["from"][..., 0] > -1.0
    functions = TRANSLATION["embed"], TRANSLATION["layer"], translation_loss
    options = {"shared": TRANSLATION["shared"], "microbatches": microbatches}
    check_step(functions, params, batch, whole, **options)


def two_stacks(format):
    """The network of the other tests twice: two stacks, the second one deeper."""
    params = weights(format)
    low = params["layers"]
    high = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]])[:3], low)
    return params | {"layers": {"low": low, "high": high}}


def listed(params):
    stacks = params["layers"]
    return params | {"layers": {k: unstacked(v) for k, v in stacks.items()}}


def by_hand(tx):
    def whole(params, batch, key):
        x = embed(params["ends"], batch)
        layers = params["layers"]["low"] + params["layers"]["high"]
        for i, w in enumerate(layers):
            x = layer(w, x, jax.random.fold_in(jax.random.fold_in(key, i), 0))
        return loss(params["ends"], x, batch)

    def step(params, state, batch, key):
        values = madax.dequantize_params(params)
        value, grads = jax.value_and_grad(whole)(values, batch, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def test_two_stacks_equal_the_ordinary_step():
    tx, start = OPTIMIZERS["moments8"], two_stacks(FORMATS["symlog8"])
    keys = [jax.random.key(i) for i in range(len(batches()))]
    params, _, losses = trained(tx.init, by_hand(tx), listed(start), keys=keys)
    layers = {"low": layer, "high": layer}
    run = madax.layerwise(tx, embed, layers, loss, dtype=jnp.float32)
    found, _, found_losses = trained(*run, start, keys=keys)
    # The two programs may round a gradient otherwise, and so a code in a thousand.
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    codes = zip(jax.tree.leaves(listed(found)), jax.tree.leaves(params), strict=True)
    assert all(np.mean(x != y) < 0.01 for x, y in codes if x.dtype == np.int8)


def test_stacks_of_several_depths_are_read_as_layers():
    table = str(madax.diagnostics.matrices(two_stacks(None)))
    read_as = dict(re.findall(r"layers/(\w+)/mlp/w .* float32  (.*)", table))
    assert read_as == {"low": "2 of 16 x 16", "high": "3 of 16 x 16"}


@quick
def test_two_stacks_draw_other_noise_and_have_norms():
    tx = optax.chain(optax.add_noise(1.0, 0.0, 7), optax.sgd(1.0))
    stack = jnp.zeros((2, 50, 20))
    params = {"ends": jnp.zeros(20), "layers": {"a": stack, "b": stack}}
    init, step = madax.layerwise(
        tx,
        lambda ends, batch: batch + ends,
        dict.fromkeys("ab", lambda w, x: x + w[0]),
        lambda ends, x, batch: (jnp.sum(x), ()),
        has_aux=True,
    )
    new, _, (_, metrics) = jax.jit(step)(params, init(params), jnp.ones(20))
    parts = np.concatenate(jax.tree.leaves(new["layers"]))[:, 1:].reshape(4, -1)
    assert np.abs(np.corrcoef(parts) - np.eye(4)).max() < 0.15
    norms = metrics["grad_norm"]["layers"]
    np.testing.assert_allclose([norms["a"], norms["b"]], np.full((2, 2), 20**0.5), 1e-6)


# --- what is refused ------------------------------------------------------------------


def call(**new):
    params, batch = attention()
    args = dict(zip(("embed", "layer", "loss"), ATTENTION, strict=True))
    args |= {"shared": all_shared, "params": params, "tx": optax.sgd(1.0)} | new
    params = args.pop("params")
    init, step = madax.layerwise(**args)
    jax.eval_shape(lambda p: step(p, init(p), batch), params)


def writes(w, x, *, memory, **shared):
    memory["x"] = memory["x"] + 1
    return attended(w, x, memory=memory, **shared)


PARAMS = attention()[0]
TWICE = {"a": attended, "b": attended}
BAD = [
    (ValueError, {"layer": writes}, "layer changes the shared dict", "'mask'"),
    (
        ValueError,
        {"layer": lambda w, x, **shared: (x, shared)},
        "layer must return x with its shapes and dtypes",
        "The shared ['mask', 'memory', 'rotary'] are not part of x",
    ),
    (
        TypeError,
        {"shared": lambda ends, batch: batch[1]},
        "what shared returns must be a dict of arguments of layer by name",
    ),
    (TypeError, {"shared": 3}, "shared must be a function, got 3"),
    (TypeError, {"embed": None}, "embed must be a function, got None"),
    (
        ValueError,
        {"layer": [attended] * 3},
        "layer is a pattern of 3 functions, which does not divide the 4 layers",
        "a function for each layer",
    ),
    (TypeError, {"layer": [attended, 3]}, "layer must be a function, got 3"),
    (TypeError, {"layer": []}, "layer must be a function, got []"),
    (ValueError, {"layer": {}}, "layer must have a function for each stack"),
    (ValueError, {"layer": {"0": attended}}, "layer must have a function", "['0']"),
    (
        ValueError,
        {"layer": TWICE, "embed": {"b": ATTENTION[0]}},
        "embed has no function for 'a', the first stack",
    ),
    (
        ValueError,
        {"layer": TWICE, "shared": {"c": all_shared}},
        "shared has functions for ['c'], but layer for ['a', 'b']",
    ),
    (
        ValueError,
        {"layer": TWICE},
        "params['layers'] must be a dict of stacks ['a', 'b']",
        "got ['m', 'q', 'v']",
    ),
    (
        ValueError,
        {
            "layer": {"a": attended, "b": [attended, attended]},
            "params": PARAMS | {"layers": {"a": np.ones(3), "b": np.ones(3)}},
        },
        "does not divide the 3 layers of params['layers/b']",
    ),
    (
        ValueError,
        {
            "layer": TWICE,
            "params": PARAMS | {"layers": dict.fromkeys("ab", PARAMS["layers"])},
            "tx": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
        },
        "tx must update each layer from its own gradients",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[2][:24])
def test_what_does_not_fit_is_refused(case):
    with raises(case[0], *case[2:]):
        call(**case[1])
