"""Models of bonsai, which is a repository: github.com/jax-ml/bonsai."""

import importlib

import jax.numpy as jnp
from flax import nnx
from models import with_zeros_drawn

from zoo.loops import by_nnx
from zoo.other import TOKENS, Layers, Other, images

SOURCE, PACKAGES = "bonsai", ("flax",)
ALL = jnp.ones_like(TOKENS)


def _module(name):
    return importlib.import_module(f"bonsai.models.{name}.modeling")


def _qwen_3():
    m = _module("qwen3")
    config = m.ModelConfig(
        num_layers=2,
        vocab_size=72,
        emb_dim=32,
        mlp_dim=48,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=10_000,
        rope_scaling_factor=8.0,
        local_rope_theta=1e4,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    caches = lambda: m.init_cache(config, *TOKENS.shape, 0, jnp.float32)
    layers = Layers(
        "layers",
        lambda ends: ends.embedder.embedding[...].at[(TOKENS,)].get(),
        lambda block, x: block(x, caches()[0], ALL),
        lambda ends, x: ends.lm_head(ends.final_norm(x)),
    )
    output = lambda model: model(TOKENS, cache=caches(), segment_ids=ALL)
    return Other(m.Qwen3(config, rngs=nnx.Rngs(0)), output, layers, by_nnx)


def _gemma_3():
    m = _module("gemma3")
    vision = m.VisionConfig(
        attention_dropout=0.0,
        hidden_size=40,
        image_size=16,
        intermediate_size=56,
        layer_norm_eps=1e-6,
        num_attention_heads=4,
        num_channels=3,
        num_hidden_layers=2,
        patch_size=4,
        vision_use_head=False,
    )
    text = m.TextConfig(
        attention_bias=False,
        attention_dropout=0.0,
        head_dim=16,
        hidden_size=32,
        intermediate_size=48,
        layer_types=[m.AttentionMode.SLIDE, m.AttentionMode.FULL],
        max_position_embeddings=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_full_factor=8.0,
        rope_full_theta=1e6,
        rope_slide_factor=1.0,
        rope_slide_theta=1e4,
        sliding_window=8,
        vocab_size=72,
        norm_dtype=jnp.float32,
    )
    config = m.ModelConfig(vision, text, 4, "float32", None)
    kinds = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]) < 4, TOKENS.shape).astype(int)
    caches = lambda: m.init_cache(config, *TOKENS.shape, 0, jnp.float32)

    def embed(ends, x):
        image = ends.multi_modal_projector(ends.vision_tower.post_layernorm(x))
        return m.batched_merge_modalities(image, ends.embed_tokens(TOKENS), kinds)

    def layer(block, x):
        cache = caches()[0]
        mask = m.make_causal_mask(cache, kinds, out_sharding=None)
        if block.self_attn.use_sliding:
            mask = m.make_window_mask(cache, kinds, 8, out_sharding=None)
        return block(x, cache, ALL, mask)

    names = ("vision_tower.encoder.layers", "language_model.layers")
    layers = Layers(
        names,
        {
            names[0]: lambda ends: ends.vision_tower.embeddings(images(16)),
            names[1]: embed,
        },
        {names[0]: lambda block, x: block(x, None), names[1]: layer},
        lambda ends, x: ends.embed_tokens.weight.attend(ends.language_model.norm(x)),
    )

    def output(model):
        rest = {"cache": caches(), "segment_ids": ALL, "token_type_ids": kinds}
        return model(TOKENS, images(16), **rest)

    model = with_zeros_drawn(m.Gemma3Model(config, rngs=nnx.Rngs(0)))
    return Other(model, output, layers, by_nnx)


def _mamba_2():
    m = _module("mamba2")
    config = m.ModelConfig(
        vocab_size=72,
        hidden_size=32,
        state_size=12,
        head_dim=16,
        chunk_size=8,
        num_hidden_layers=2,
    )
    layers = Layers(
        "backbone.layers",
        lambda ends: ends.backbone.embedder(TOKENS),
        lambda block, x: block(x)[0],
        lambda ends, x: ends.backbone.embedder.attend(ends.backbone.final_norm(x)),
    )
    model = m.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return Other(model, lambda model: model(TOKENS)["logits"], layers, by_nnx)


def _vit():
    m = _module("vit")
    config = m.ModelConfig(
        image_size=(16, 16),
        patch_size=(4, 4),
        num_channels=3,
        hidden_dim=32,
        attn_dropout_prob=0.0,
        dropout_prob=0.0,
        num_heads=4,
        mlp_dim=48,
        eps=1e-6,
        num_layers=2,
        num_labels=10,
    )
    layers = Layers(
        "layers",
        lambda ends: ends.pos_embeddings(images(16), rngs=None),
        lambda block, x: block(x, rngs=None),
        lambda ends, x: ends.classifier(ends.ln(x)[:, 0]),
    )
    model = m.ViTClassificationModel(config, rngs=nnx.Rngs(0))
    return Other(model, lambda model: model(images(16), rngs=None), layers, by_nnx)


def _convnext():
    m = _module("convnext")
    model = m.ConvNeXt(m.ModelConfig((2, 2), (16, 24), 0.0, 10), rngs=nnx.Rngs(0))

    def down(ends, x):
        for module in ends.stages[1].downsample_layers:
            x = module(x)
        return x

    names = ("stages.0.layers", "stages.1.layers")
    layers = Layers(
        names,
        {names[0]: lambda ends: ends.embedding_layer(images(16)), names[1]: down},
        lambda block, x: block(x, rngs=None, train=False),
        lambda ends, x: ends.head(ends.norm(x.mean((1, 2)))),
    )
    return Other(model, lambda model: model(images(16), rngs=None), layers, by_nnx)


def _umt5():
    m = _module("umt5")
    config = m.ModelConfig(
        vocab_size=72,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    model = m.UMT5Model(config, rngs=nnx.Rngs(0))
    output = lambda model: model.lm_head(model(TOKENS, ALL, TOKENS, ALL))

    def masks(ends, memory=None):
        stack = ends.encoder if memory is None else ends.decoder
        return stack._prepare_attention_mask(TOKENS, ALL, memory, ALL, jnp.float32)

    def shared(ends, x):
        memory = ends.encoder.final_layer_norm(x)
        own, cross = masks(ends, memory)
        return {
            "attention_mask": own,
            "encoder_hidden_states": memory,
            "encoder_attention_mask": cross,
        }

    names = ("encoder.block", "decoder.block")
    layers = Layers(
        names,
        {
            names[0]: lambda ends: ends.encoder.embed_tokens(TOKENS),
            names[1]: lambda ends, x: ends.decoder.embed_tokens(TOKENS),
        },
        lambda block, x, **shared: block(x, **shared)[0],
        lambda ends, x: ends.lm_head(ends.decoder.final_layer_norm(x)),
        {names[0]: lambda ends: {"attention_mask": masks(ends)[0]}, names[1]: shared},
    )
    return Other(model, output, layers, by_nnx)


def _unet():
    m = _module("unet")
    model = m.UNet(m.ModelConfig(3, 2, (4, 8, 16, 32, 64)), rngs=nnx.Rngs(0))
    why = "skip connections go from layer to layer of another shape"
    return Other(model, lambda model: model(images(16)), why, by_nnx)


MODELS = {
    "Qwen 3": _qwen_3,
    "Gemma 3": _gemma_3,
    "Mamba 2": _mamba_2,
    "ViT": _vit,
    "ConvNeXt": _convnext,
    "UMT5": _umt5,
    "UNet": _unet,
}
