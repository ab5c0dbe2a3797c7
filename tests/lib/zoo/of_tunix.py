"""Models of Tunix, and its trainer."""

import importlib

import jax.numpy as jnp
from flax import nnx
from models import with_zeros_drawn

import madax
from zoo.loops import OPTIMIZER
from zoo.other import TOKENS, Layers, Other

SOURCE, PACKAGES = "Tunix", ("google-tunix", "flax")
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
_LENGTH = TOKENS.shape[1]
_POSITIONS = jnp.broadcast_to(jnp.arange(_LENGTH), TOKENS.shape)
_MASK = jnp.tril(jnp.ones((len(TOKENS), _LENGTH, _LENGTH), bool))


def _gemma_2(module):
    kinds = module.AttentionType
    return {
        "attention_types": (kinds.LOCAL_SLIDING, kinds.GLOBAL),
        "final_logit_softcap": 30.0,
        "attn_logits_soft_cap": 50.0,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
    }


def _train(_, model, steps):
    from tunix_loop import by_tunix

    model, tx = madax.hijax.lift(model), madax.hijax.optimizer(OPTIMIZER)
    return by_tunix(model, tx, steps), madax.hijax.lower(model)


def _output(model):
    return model(TOKENS, _POSITIONS, None, _MASK)[0]


def _rest(ends, x):
    ends.layers = (lambda *_, **__: (None, x),)
    return _output(ends)


def _given(ends):
    """What the model passes to its layers after x: positions, or their sines."""
    found = []

    def note(x, *args, **kwargs):
        found.append((args, kwargs))
        return None, x

    ends.layers = (note,)
    _output(ends)
    return {"given": found[0]}


_LAYERS = Layers(
    "layers",
    lambda ends: ends.embedder.encode(TOKENS),
    lambda block, x, given: block(x, *given[0], **given[1])[1],
    _rest,
    _given,
)


def _of(name, kind, fields, more=lambda module: {}):
    def build():
        module = importlib.import_module(f"tunix.models.{name}.model")
        config = module.ModelConfig(**_SIZES | fields | more(module))
        # Leaves that start at zero are drawn.
        model = with_zeros_drawn(getattr(module, kind)(config, rngs=nnx.Rngs(0)))
        return Other(model, _output, _LAYERS, _train)

    return build


_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
MODELS = {
    "Llama 3": _of("llama3", "Llama3", _QWEN),
    "Qwen 2": _of("qwen2", "Qwen2", _QWEN),
    "Qwen 3": _of("qwen3", "Qwen3", _QWEN | {"use_tied_embedding": True}),
    "Qwen 3 with experts": _of("qwen3", "Qwen3", _QWEN | _EXPERTS),
    "Gemma 2": _of("gemma", "Gemma", _GEMMA, _gemma_2),
    "Gemma 3": _of("gemma3", "Gemma3", _GEMMA | {"param_dtype": jnp.float32}),
}
