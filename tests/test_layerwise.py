"""A layer at a time, training is that of the ordinary step, to the last bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FORMATS, raises
from test_meshes import EXACT_ADAM, different

import madax
from madax import MomentFormat

DEPTH, WIDTH, VOCABULARY, STEPS = 3, 16, 32, 6


# --- a network of equal layers, its embedding tied, and the step as most write it ------


def embed(ends, batch):
    return ends["table"][batch[:, :-1]]


def layer(w, x, key=None):
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)
    return x + jax.nn.relu((x * w["scale"]) @ w["mlp"]["up"]) @ w["mlp"]["down"]


def loss(ends, x, batch):
    logits = x @ ends["table"].T
    labels = batch[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def weights():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape) / WIDTH**0.5)
    one = lambda: {
        "scale": jnp.ones(WIDTH),
        "mlp": {"up": normal(WIDTH, 2 * WIDTH), "down": normal(2 * WIDTH, WIDTH)},
    }
    ends = {"table": normal(VOCABULARY, WIDTH)}
    return {"ends": ends, "layers": [one() for _ in range(DEPTH)]}


def stacked(params):
    """The same parameters with the layers stacked."""

    def stack(*leaves):
        # Scales keep the rank of their codes.
        ndim = max(x.ndim for x in jax.tree.leaves(leaves))
        return jnp.stack([x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in leaves])

    def node(*ws):
        if not isinstance(ws[0], madax.QuantizedArray):
            return jnp.stack(ws)
        scale = jnp.stack([jnp.reshape(w.scale, (1,) * w.ndim) for w in ws])
        codes = jnp.stack([w.codes for w in ws])
        return madax.QuantizedArray(codes, scale, ws[0].format)

    is_leaf = lambda x: isinstance(x, madax.QuantizedArray)
    layers = jax.tree.map(node, *params["layers"], is_leaf=is_leaf)
    return params | {"layers": layers}


@functools.cache
def batches():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, VOCABULARY, (STEPS, 8, 9)))


def ordinary(tx):
    """All decoded, all gradients there, then the update; layers recomputed."""

    def whole(params, batch):
        x = embed(params["ends"], batch)
        for one in params["layers"]:
            x = layer(one, x)
        return loss(params["ends"], x, batch)

    def step(params, state, batch):
        values = madax.dequantize_params(params)
        value, grads = jax.value_and_grad(whole)(values, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def trained(step, params, state):
    step, values = jax.jit(step), []
    for batch in batches():
        params, state, value = step(params, state, batch)
        values.append(value)
    return params, state, jnp.stack(values)


OPTIMIZERS = {
    "floats": (madax.madam(0.02, floor=1.0), None),
    "codes": (
        madax.madam(0.02, b1=0.9, moment_format=MomentFormat(8), seed=3),
        FORMATS["symlog8"],
    ),
    "schedule": (
        optax.inject_hyperparams(madax.madam)(
            optax.linear_schedule(0.05, 0.01, STEPS), b2=0.9
        ),
        FORMATS["log16"],
    ),
    "adam": (madax.with_quantized_params(EXACT_ADAM), FORMATS["log8"]),
    "clipped": (
        optax.chain(optax.clip_by_block_rms(0.5), madax.madam(0.02)),
        FORMATS["log8"],
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_ordinary_step(name):
    tx, fmt = OPTIMIZERS[name]
    params = weights() if fmt is None else madax.quantize_params(weights(), fmt)
    expected, state, losses = trained(ordinary(tx), params, tx.init(params))
    init, step = madax.layerwise(tx, embed, layer, loss, dtype=jnp.float32)
    start = stacked(params)
    found, found_state, found_losses = trained(step, start, init(start))
    assert found_losses.tolist() == losses.tolist()
    assert different(found, stacked(expected)) == []
    assert different(start, found) != []
