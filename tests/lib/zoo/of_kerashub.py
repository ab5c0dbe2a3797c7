"""Models of KerasHub on JAX, with their parameters by their paths."""

import importlib
import os

import jax.numpy as jnp

from zoo.loops import by_madax
from zoo.other import TOKENS, Other

SOURCE, PACKAGES = "KerasHub", ("keras-hub", "keras")
os.environ.setdefault("KERAS_BACKEND", "jax")


def _of(kind, **fields):
    def build():
        model = getattr(importlib.import_module("keras_hub").models, kind)(**fields)
        batch = {"token_ids": TOKENS, "padding_mask": jnp.ones_like(TOKENS)}
        paths = [x.path for x in model.trainable_variables]
        rest = [x.value for x in model.non_trainable_variables]

        def output(params):
            features, _ = model.stateless_call([params[x] for x in paths], rest, batch)
            return features

        params = {x.path: x.value for x in model.trainable_variables}
        return Other(params, output, "parameters are a list of arrays", by_madax)

    return build


_SIZES = {
    "vocabulary_size": 72,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}

MODELS = {
    "Gemma 3": _of(
        "Gemma3Backbone",
        image_size=16,
        head_dim=16,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        **_SIZES,
    ),
    "Mixtral": _of("MixtralBackbone", num_experts=6, top_k=2, **_SIZES),
    "RWKV 7": _of(
        "RWKV7Backbone",
        hidden_size=32,
        head_size=16,
        num_layers=2,
        vocabulary_size=72,
        intermediate_dim=48,
    ),
}
