"""Tiny models of Tunix; as a script, the list of what their programs do with leaves.

``python tests/lib/others.py`` in an environment with google-tunix writes
``others.json``, against which ``make test`` compares how madax reads the leaves.
"""

import importlib
import json
import pathlib
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from contractions import contractions
from flax import nnx
from models import with_zeros_drawn

LISTED = pathlib.Path(__file__).with_suffix(".json")
TOKENS = jnp.arange(16)[None] % 8 + jnp.arange(2)[:, None]

# Numbers of heads, features and words that no two axes share.
_SIZES = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
_QWEN = {"vocab_size": 72, "rope_theta": 10_000, "norm_eps": 1e-6}
_GEMMA = {"num_embed": 72, "sliding_window_size": 8}


def _gemma_2(module):
    kinds = module.AttentionType
    return {
        "attention_types": (kinds.LOCAL_SLIDING, kinds.GLOBAL),
        "final_logit_softcap": 30.0,
        "attn_logits_soft_cap": 50.0,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
    }


# The module, the class, the fields of its configuration, and more of those.
MODELS = {
    "Llama 3": ("llama3", "Llama3", _QWEN, None),
    "Qwen 2": ("qwen2", "Qwen2", _QWEN, None),
    "Qwen 3": ("qwen3", "Qwen3", _QWEN | {"use_tied_embedding": True}, None),
    "Qwen 3, experts": (
        "qwen3",
        "Qwen3",
        _QWEN | {"num_experts": 6, "num_experts_per_tok": 2},
        None,
    ),
    "Gemma 2": ("gemma", "Gemma", _GEMMA, _gemma_2),
    "Gemma 3": ("gemma3", "Gemma3", _GEMMA | {"param_dtype": jnp.float32}, None),
}


def build(name):
    """The model, whose leaves that start at zero are drawn, so that they have codes."""
    module, kind, fields, more = MODELS[name]
    module = importlib.import_module(f"tunix.models.{module}.model")
    fields = _SIZES | fields | (more(module) if more else {})
    config = module.ModelConfig(**fields)
    return with_zeros_drawn(getattr(module, kind)(config, rngs=nnx.Rngs(0)))


def logits(model):
    length = TOKENS.shape[1]
    mask = jnp.tril(jnp.ones((len(TOKENS), length, length), bool))
    positions = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    return model(TOKENS, positions, None, mask)[0]


def leaves_of(name):
    """For each path its shape, and what the program does with the leaf."""
    graph, params, rest = nnx.split(build(name), nnx.Param, ...)
    used = contractions(lambda p: logits(nnx.merge(graph, p, rest)), params)
    shapes = map(np.shape, jax.tree.leaves(params))
    return {
        path: [list(shape), found]
        for (path, found), shape in zip(used.items(), shapes, strict=True)
    }


if __name__ == "__main__":
    entries = {name: leaves_of(name) for name in MODELS}
    text = ",\n".join(
        f' "{name}": {{\n'
        + ",\n".join(f'  "{path}": {json.dumps(x)}' for path, x in leaves.items())
        + "\n }"
        for name, leaves in entries.items()
    )
    made = f' "google-tunix": "{version("google-tunix")}"'
    LISTED.write_text(f"{{\n{made},\n{text}\n}}\n")
