"""Tunix's Gemma 3, local and global layers in turns, is trained a layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import with_zeros_drawn

import madax

gemma = pytest.importorskip("tunix.models.gemma3.model")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("quick_compiles"),
]

DEPTH, LENGTH, STEPS = 7, 16, 3  # of which the pattern of six divides nothing


def drawn():
    config = gemma.ModelConfig(
        num_layers=DEPTH,
        num_embed=64,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        sliding_window_size=4,
        param_dtype=jnp.float32,
    )
    return with_zeros_drawn(gemma.Gemma3(config, rngs=nnx.Rngs(0)))


TOKENS = jax.random.randint(jax.random.key(1), (4, LENGTH + 1), 0, 64)
MASK = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (4, LENGTH, LENGTH))
BATCH = {
    "tokens": TOKENS,
    "positions": jnp.broadcast_to(jnp.arange(LENGTH), (4, LENGTH)),
    "mask": MASK,
}


def error(model, batch):
    tokens, positions, mask = (batch[k] for k in ("tokens", "positions", "mask"))
    logits, _ = model(tokens[:, :-1], positions, None, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def test_gemma_has_the_losses_of_the_ordinary_step():
    tx = madax.muon(moment_format=madax.MomentFormat(8))
    split = madax.split_layers(drawn(), "layers")
    coded = madax.quantize_params(
        split.params, madax.SymlogFormat(bits=8), channel_axis=0
    )

    def loss(w, x, batch):
        rest = split.ends(w)
        rest.layers = (lambda *_: (None, x),)
        return error(rest, batch)

    init, step = madax.layerwise(
        tx,
        lambda w, batch: split.ends(w).embedder.encode(batch["tokens"][:, :-1]),
        split.layer(lambda block, x, **rest: block(x, cache=None, **rest)[1]),
        loss,
        shared=lambda w, b: {"segment_pos": b["positions"], "attn_mask": b["mask"]},
    )
    params, state, step, losses = coded, init(coded), jax.jit(step), []
    for _ in range(STEPS):
        params, state, value = step(params, state, BATCH)
        losses.append(value)

    def whole(params, batch):
        stack = jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])
        return error(split.model(params | {"layers": stack}), batch)

    @jax.jit
    def ordinary(params, state):
        values = madax.dequantize_params(params)
        value, grads = jax.value_and_grad(whole)(values, BATCH)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    one = lambda i: jax.tree.map(lambda x: x[i], coded["layers"])
    listed = coded | {"layers": [one(i) for i in range(DEPTH)]}
    found, state = [], tx.init(listed)
    for _ in range(STEPS):
        listed, state, value = ordinary(listed, state)
        found.append(value)
    np.testing.assert_allclose(losses, found, rtol=1e-6)
    assert losses[-1] < 0.99 * losses[0]
