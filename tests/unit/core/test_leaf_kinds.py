"""How trees of real models are read, by their authors' own layouts."""

import re

import jax
import jax.numpy as jnp
import pytest

import madax
from madax._core.leaf_kinds import read_leaves

D, F, N, K, H, L, E, V = 64, 176, 4, 2, 16, 3, 8, 500

# Of each leaf the shape, and rows and columns as strings of its axes; None where
# Madam's direction is right. "01 2": axes 0 and 1 are rows, axis 2 columns.
MODELS = {
    "tunix, bonsai: Llama, Qwen3": {
        "embedder/input_embedding": ((V, D), None),
        "layers/0/attn/q_proj/w": ((D, N, H), "0 12"),
        "layers/0/attn/k_proj/w": ((D, K, H), "0 12"),
        "layers/0/attn/v_proj/w": ((D, K, H), "0 12"),
        "layers/0/attn/o_proj/w": ((N, H, D), "01 2"),
        "layers/0/attn/q_norm/w": ((H,), None),
        "layers/0/attn/q_proj/w_lora_a": ((D, 4), "0 1"),
        "layers/0/attn/q_proj/w_lora_b": ((4, N, H), "0 12"),
        "layers/0/attn/o_proj/w_lora_a": ((N, H, 4), "01 2"),
        "layers/0/mlp/gate_proj/kernel": ((D, F), "0 1"),
        "layers/0/mlp/down_proj/kernel": ((F, D), "0 1"),
        "layers/0/input_layernorm/w": ((D,), None),
        "layers/1/attn/q_proj/w": ((D, N, H), "0 12"),
        "final_norm/w": ((D,), None),
        "lm_head/w": ((D, V), None),
    },
    "tunix: Qwen3-MoE": {
        "layers/0/mlp/router/kernel": ((D, E), None),
        "layers/0/mlp/gate_proj": ((E, D, F), "1 2"),
        "layers/0/mlp/down_proj": ((E, F, D), "1 2"),
        "layers/0/attn/q_proj/w": ((D, N, H), "0 12"),
        "layers/0/attn/o_proj/w": ((N, H, D), "01 2"),
    },
    "Equinox: U-Net": {
        "up/weight": ((32, 64, 2, 2), "0 123"),
        "up/bias": ((32, 1, 1), None),
        "down/weight": ((64, 32, 3, 3), "0 123"),
        "down/bias": ((64, 1, 1), None),
        "ffn/layers/0/weight": ((64, 32, 3, 3), "0 123"),
        "v/weight": ((64, 32, 3, 3), "0 123"),
    },
    "Flax: U-Net": {
        "down/kernel": ((3, 3, 32, 32), "012 3"),
        "down/bias": ((32,), None),
        "up/kernel": ((2, 2, 32, 64), "012 3"),
        "q/kernel": ((3, 3, 32, 32), "012 3"),
    },
    "Equinox: cells": {
        "cell/weight_ih": ((96, 10), "0 1"),
        "cell/weight_hh": ((96, 32), "0 1"),
        "cell/bias": ((96,), None),
    },
    "heads one by one": {
        f"blocks/{i}/MultiHead_0/Head_0/Dense_{j}/kernel": ((D, H), "0 1")
        for i in (0, 1)
        for j in (0, 1, 2)
    },
    "short names": {
        "wq": ((D, N, H), "0 12"),
        "bq": ((N, H), None),
        "b_k": ((N, H), None),
        "w_k": ((D, N, H), "0 12"),
        "attn_w": ((D, D), "0 1"),
        "attn_b": ((D,), None),
        "wo": ((N, H, D), "01 2"),
        "h/ln1_g": ((6, D), None),
        "h/rms_att_weight": ((6, D), None),
    },
    "Gemma": {
        "embedder/input_embedding": ((V, D), None),
        "embedder/per_layer_model_projection/w": ((D, L * D), "0 1"),
        "layer_0/attn/q_einsum/w": ((N, D, H), "1 2"),
        "layer_0/attn/kv_einsum/w": ((2, K, D, H), "2 3"),
        "layer_0/attn/qkv_einsum/w": ((3, N, D, H), "2 3"),
        "layer_0/attn/attn_vec_einsum/w": ((N, H, D), "01 2"),
        "layer_0/attn/q_einsum/lora/a": ((D, 4), "0 1"),
        "layer_0/attn/kv_einsum/lora/b": ((4, 2, K, H), "0 123"),
        "layer_0/attn/attn_vec_einsum/lora/a": ((N, H, 4), "01 2"),
        "layer_0/attn/attn_vec_einsum/lora/b": ((4, D), "0 1"),
        "layer_0/mlp/gating_einsum/w": ((2, D, F), "1 2"),
        "layer_0/mlp/linear/w": ((F, D), "0 1"),
        "layer_0/pre_attention_norm/scale": ((D,), None),
        "layer_1/moe/gating_einsum": ((E, 2, F, D), "2 3"),
        "layer_1/moe/linear": ((E, F, D), "1 2"),
        "layer_1/moe/router_logits": ((D, E), None),
    },
    "KerasHub: Gemma": {
        "decoder_block_0/attention/query/kernel": ((8, D, H), "1 2"),
        "decoder_block_0/attention/key/kernel": ((4, D, H), "1 2"),
        "decoder_block_0/attention/attention_output/kernel": ((8, H, D), "01 2"),
        "decoder_block_0/ffw_gating/kernel": ((D, F), "0 1"),
        "decoder_block_0/ffw_linear/kernel": ((F, D), "0 1"),
    },
    "MaxText, scanned on axis 1": {
        "params/token_embedder/embedding": ((V, D), None),
        "params/decoder/layers/mlp/wi_0/kernel": ((D, L, F), "0 2"),
        "params/decoder/layers/mlp/wi_1/kernel": ((D, L, F), "0 2"),
        "params/decoder/layers/mlp/wo/kernel": ((F, L, D), "0 2"),
        "params/decoder/layers/self_attention/query/kernel": ((D, L, N, H), "0 23"),
        "params/decoder/layers/self_attention/key/kernel": ((D, L, K, H), "0 23"),
        "params/decoder/layers/self_attention/out/kernel": ((N, L, H, D), "02 3"),
        "params/decoder/layers/pre_self_attention_layer_norm/scale": ((D, L), None),
        "params/decoder/decoder_norm/scale": ((D,), None),
        "params/decoder/logits_dense/kernel": ((D, V), None),
    },
    "MaxText: fused": {
        "decoder/layers_0/mlp/wi/kernel": ((D, 2, F), "0 12"),
        "decoder/layers_0/mlp/wo/kernel": ((F, D), "0 1"),
        "decoder/layers_0/self_attention/qkv_proj/kernel": ((D, 3, N, H), "0 23"),
        "decoder/layers_0/self_attention/out/kernel": ((N, H, D), "01 2"),
    },
    "fused, in a stack": {
        "layers/mlp/wi/kernel": ((L, D, 2, F), "1 23"),
        "layers/mlp/wo/kernel": ((L, F, D), "1 2"),
        "layers/norm/scale": ((L, D), None),
    },
    "queries in groups": {
        "blocks/0/attn/query/kernel": ((D, K, 3, H), "0 123"),
        "blocks/0/attn/key/kernel": ((D, K, H), "0 12"),
        "blocks/0/attn/out/kernel": ((K, 3, H, D), "012 3"),
    },
    "queries in groups, in a stack": {
        "blocks/attn/q": ((L, D, K, 3, H), "1 234"),
        "blocks/attn/o": ((L, K, 3, H, D), "123 4"),
        "blocks/ln/scale": ((L, D), None),
    },
    "MaxText: scanned experts": {
        "decoder/layers/MoeBlock_0/gate/kernel": ((D, L, E), None),
        "decoder/layers/MoeBlock_0/wi_0": ((E, L, D, F), "2 3"),
        "decoder/layers/MoeBlock_0/wo": ((E, L, F, D), "2 3"),
        "decoder/layers/pre_norm/scale": ((D, L), None),
    },
    "nn.scan on axis 0": {
        "layers/LayerNorm_0/scale": ((L, D), None),
        "layers/MultiHeadDotProductAttention_0/query/kernel": ((L, D, N, H), "1 23"),
        "layers/MultiHeadDotProductAttention_0/query/bias": ((L, N, H), None),
        "layers/MultiHeadDotProductAttention_0/out/kernel": ((L, N, H, D), "12 3"),
        "layers/MultiHeadDotProductAttention_0/out/bias": ((L, D), None),
        "layers/Dense_0/kernel": ((L, D, F), "1 2"),
        "layers/moe/w1": ((L, E, D, F), "2 3"),
        "layers/moe/router/kernel": ((L, D, E), None),
        "layers/Conv_0/kernel": ((L, 3, D, F), "12 3"),
        "Embed_0/embedding": ((V, D), None),
    },
    "Flax attention": {
        "DenseGeneral_2/kernel": ((D, N, N), "0 12"),
        "DenseGeneral_2/bias": ((N, N), None),
        "attention/head_0/query/kernel": ((D, H), "0 1"),
        "DenseGeneral_0/kernel": ((D, N, H), "0 12"),
        "DenseGeneral_0/bias": ((N, H), None),
        "DenseGeneral_1/kernel": ((N, H, D), "01 2"),
        "DenseGeneral_1/bias": ((D,), None),
        "query/kernel": ((D, N, H), "0 12"),
        "query/bias": ((N, H), None),
        "value/kernel": ((D, N, H), "0 12"),
        "out/kernel": ((N, H, D), "01 2"),
    },
    "GPT-2, by PyTorch's names": {
        "transformer.wte.weight": ((V, D), None),
        "transformer.wpe.weight": ((128, D), None),
        "transformer.h.0.attn.c_attn.weight": ((D, 3 * D), "0 1"),
        "transformer.h.0.ln_1.weight": ((D,), None),
        "transformer.ln_f.weight": ((D,), None),
        "lm_head.weight": ((V, D), None),
    },
    "Meta's names": {
        "tok_embeddings/weight": ((V, D), None),
        "layers/0/attention/wq/weight": ((D, D), "0 1"),
        "layers/0/attention/wo/weight": ((D, D), "0 1"),
        "layers/0/feed_forward/w1/weight": ((F, D), "0 1"),
        "layers/0/feed_forward/w2/weight": ((D, F), "0 1"),
        "output/weight": ((V, D), None),
    },
    "a stack of experts beside attention": {
        "layers/0/attention/wq": ((D, N, H), "0 12"),
        "layers/0/attention/wo": ((N, H, D), "01 2"),
        "layers/0/moe/wi": ((E, D, F), "1 2"),
        "layers/0/moe/wo": ((E, F, D), "1 2"),
        "layers/0/moe/gate": ((D, E), None),
        "MAPHead_0/MlpBlock_0/Dense_0/kernel": ((D, F), "0 1"),
        "MAPHead_0/MlpBlock_0/Dense_1/kernel": ((F, D), "0 1"),
        "pre_logits/kernel": ((D, D), "0 1"),
    },
    "queries, keys and values in one leaf": {
        "blocks/attn/qkv": ((L, 3, D, D), "2 3"),
        "blocks/attn/out": ((L, D, D), "1 2"),
        "blocks/mlp/w1": ((L, D, F), "1 2"),
        "blocks/ln1/scale": ((L, D), None),
    },
    "our decoder": {
        "ends/tokens": ((V, D), None),
        "ends/head": ((V, D), None),
        "ends/norm": ((D,), None),
        "layers/q": ((L, D, D), "1 2"),
        "layers/o": ((L, D, D), "1 2"),
        "layers/gate": ((L, D, F), "1 2"),
        "layers/up": ((L, D, F), "1 2"),
        "layers/down": ((L, F, D), "1 2"),
        "layers/norm1": ((L, D), None),
    },
    "a Llama with names of one letter": {
        "ends/e": ((256, 128), None),
        "ends/h": ((128, 256), None),
        "ends/n": ((128,), None),
        "layers/a": ((L, 128, 128), "1 2"),
        "layers/u": ((L, 128, 344), "1 2"),
        "layers/d": ((L, 344, 128), "1 2"),
        "layers/n": ((L, 128), None),
    },
    "Keras: a list of arrays": {
        "0": ((V, D), None),
        "1": ((D, 3 * D), "0 1"),
        "2": ((3 * D,), None),
        "3": ((D, D), "0 1"),
        "4": ((D,), None),
        "5": ((D, 7), None),
        "6": ((7,), None),
    },
    "a multilayer perceptron": {
        "Dense_0/kernel": ((784, 128), "0 1"),
        "Dense_0/bias": ((128,), None),
        "Dense_1/kernel": ((128, 96), "0 1"),
        "Dense_1/bias": ((96,), None),
        "Dense_2/kernel": ((96, 10), None),
        "Dense_2/bias": ((10,), None),
    },
    "ResNet, Flax": {
        "conv_init/kernel": ((7, 7, 3, 32), "012 3"),
        "bn_init/scale": ((32,), None),
        "ResNetBlock_0/Conv_0/kernel": ((3, 3, 32, 32), "012 3"),
        "ResNetBlock_0/BatchNorm_0/scale": ((32,), None),
        "fc/kernel": ((32, 1000), None),
    },
    "VGG, Flax": {
        "features/layers/0/kernel": ((3, 3, 3, 64), "012 3"),
        "classifier/layers/0/kernel": ((2048, 512), "0 1"),
        "classifier/layers/1/kernel": ((512, 512), "0 1"),
        "classifier/layers/2/kernel": ((512, 100), None),
    },
    "Equinox": {
        "conv/weight": ((32, 3, 5, 5), "0 123"),
        "conv1d/weight": ((32, 24, 3), "0 12"),
        "conv3d/weight": ((32, 24, 3, 3, 3), "0 1234"),
        "conv/bias": ((32, 1, 1), None),
        "first/weight": ((32, 24, 3), "0 12"),
        "first/bias": ((32, 1), None),
        "attention/query_proj/weight": ((D, D), "0 1"),
        "attention/output_proj/weight": ((D, D), "0 1"),
        "mlp/layers/0/weight": ((F, D), "0 1"),
        "mlp/layers/1/weight": ((D, F), "0 1"),
        "embedding/weight": ((V, D), None),
        "head/weight": ((10, D), None),
    },
    "Haiku": {
        "convnet/conv2_d/w": ((3, 3, 16, 32), "012 3"),
        "convnet/batch_norm/scale": ((1, 1, 1, 32), None),
        "convnet/linear/w": ((32, D), "0 1"),
        "convnet/linear/b": ((D,), None),
        "mha/query/w": ((D, D), "0 1"),
        "embed/embeddings": ((V, D), None),
        "rms_norm": ((1, D), None),
    },
    "convolutions of other kinds": {
        "out/kernel": ((3, 3, 32, 4), "012 3"),
        "conv_1d/kernel": ((5, 16, 32), "01 2"),
        "Conv3D_0/kernel": ((3, 3, 3, 16, 32), "0123 4"),
        "depthwise/kernel": ((7, 7, 1, 96), None),
        "dwconv/weight": ((96, 1, 7, 7), None),
        "depthwise_conv/w": ((3, 3, 1, 8), None),
        "wide_conv/w": ((7, 7, 3, 8), "012 3"),
        "up/kernel": ((2, 2, 32, 16), "012 3"),
        "up/bias": ((16,), None),
        "layers/conv/kernel": ((2, 3, 3, 16, 32), "123 4"),
        "blocks/conv1d/kernel": ((2, 5, 16, 32), "12 3"),
    },
    "vision Transformer": {
        "cls": ((1, 1, D), None),
        "pos_embedding": ((1, 50, D), None),
        "patch_embed/proj/kernel": ((4, 4, 3, D), None),
        "blocks/0/PreNorm_0/fn/to_qkv/kernel": ((D, 3 * D), "0 1"),
        "blocks/0/PreNorm_0/norm/scale": ((D,), None),
        "blocks/0/NormFormer/fc1/kernel": ((D, F), "0 1"),
        "blocks/0/NormFormer/fc2/kernel": ((F, D), "0 1"),
        "blocks/0/norm1/linear/kernel": ((D, 6 * D), "0 1"),
        "blocks/0/layer_scale": ((D,), None),
        "head/kernel": ((D, 10), None),
    },
    "experts in lists": {
        **{
            f"layers/{i}/moe/experts/{e}/{name}/kernel": (shape, "0 1")
            for i in range(2)
            for e in range(E)
            for name, shape in {"w1": (D, F), "w2": (F, D)}.items()
        },
        "layers/0/moe/gate/kernel": ((D, E), None),
        "layers/1/moe/gate/kernel": ((D, E), None),
    },
    "experts without layers": {
        **{f"Expert_{e}/Dense_0/kernel": ((D, F), "0 1") for e in range(E)},
        **{f"Expert_{e}/Dense_1/kernel": ((F, D), "0 1") for e in range(E)},
        "gate/kernel": ((D, E), None),
    },
    "a stack whose norms have no weights": {
        "wte": ((V, D), None),
        "blocks/q": ((L, D, N * H), "1 2"),
        "blocks/k": ((L, D, K * H), "1 2"),
        "blocks/o": ((L, N * H, D), "1 2"),
        "blocks/up": ((L, D, F), "1 2"),
        "blocks/down": ((L, F, D), "1 2"),
    },
    "a stack without a name": {
        "tok_embed": ((V, D), None),
        "norm1": ((L, D), None),
        "wq": ((L, D, N * H), "1 2"),
        "wo": ((L, N * H, D), "1 2"),
        "final_norm": ((D,), None),
    },
    "DiT": {
        "t_embedder/mlp/0/kernel": ((256, D), "0 1"),
        "y_embedder/embedding_table/embedding": ((11, D), None),
        "blocks/0/adaLN_modulation/kernel": ((D, 6 * D), "0 1"),
        "normalizing_flow/linear/kernel": ((D, D), "0 1"),
    },
    "Mamba, Griffin": {
        "layers/0/mixer/in_proj/kernel": ((D, 4 * D), "0 1"),
        "layers/0/mixer/A_log": ((2 * D, H), None),
        "layers/0/mixer/D": ((2 * D,), None),
        "layers/0/mixer/conv1d/kernel": ((4, 1, 2 * D), None),
        "layers/0/mixer/conv1d/weight": ((2 * D, 1, 4), None),
        "layers/0/recurrent/conv_1d/w": ((4, 2 * D), None),
        "layers/0/mixer/out_proj/kernel": ((2 * D, D), "0 1"),
    },
    "agents": {
        "torso/Dense_0/kernel": ((17, D), "0 1"),
        "torso/Dense_1/kernel": ((D, D), "0 1"),
        "policy_head/kernel": ((D, 6), None),
        "value_head/kernel": ((D, 1), None),
        "log_std": ((1, 6), None),
    },
    "vector quantisation": {
        "quantizer/codebook": ((V, D), None),
        "positions/table": ((128, D), None),
    },
    "by hand": {
        "linear/w": ((D, F), "0 1"),
        "linear/b": ((F,), None),
        "stack/w": ((L, D, F), "1 2"),
        "stack/b": ((L, F), None),
        "kernels": ((L, D, D), "1 2"),
        "low_rank/a": ((D, 4), "0 1"),
        "low_rank/b": ((4, D), "0 1"),
    },
}


def structs(model):
    return {
        k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, (shape, _) in model.items()
    }


def read(tree):
    """Rows and columns of each leaf, as strings."""
    shapes = {path: leaf.shape for path, leaf in tree.items()}
    found = {}
    for path, reading in zip(
        shapes, read_leaves(list(shapes), shapes.values()), strict=True
    ):
        groups = sorted(reading.axes or [])
        axes = " ".join("".join(map(str, group)) for group in groups)
        found[path] = axes if reading.kind == "matrix" else None
    return found


@pytest.mark.parametrize("model", MODELS)
def test_models_are_read_as_their_authors_meant_them(model):
    expected = {path: axes for path, (_, axes) in MODELS[model].items()}
    assert read(structs(MODELS[model])) == expected


ORDERS = {model: structs(MODELS[model]) for model in MODELS} | {
    f"a row called {name}": structs(
        {"bias": ((64,), None), "weight": ((32, 64), None), name: ((1, 64), None)}
    )
    for name in ("alpha", "zeta")
}


@pytest.mark.parametrize("model", ORDERS)
def test_the_order_of_leaves_changes_no_reading(model):
    shapes = {path: leaf.shape for path, leaf in ORDERS[model].items()}

    def readings(shapes):
        found = read_leaves(list(shapes), shapes.values())
        pairs = zip(shapes, found, strict=True)
        return {path: (x.kind, x.axes) for path, x in pairs}

    expected = readings(shapes)
    assert readings(dict(reversed(shapes.items()))) == expected
    assert readings(dict(sorted(shapes.items()))) == expected


def test_a_bias_tells_the_outputs_of_a_layer_with_one_weight():
    shapes = {
        "c_fc/kernel": (F, D),
        "c_fc/bias": (F,),
        "linear/weight": (D, F),
        "linear/bias": (F,),
        "plain/weight": (F, D),
        "cell/weight_hh": (3 * D, D),
        "cell/bias": (3 * D,),
        "both/w1": (D, F),
        "both/b1": (F,),
        "both/w2": (F, D),
    }
    found = dict(zip(shapes, read_leaves(list(shapes), shapes.values()), strict=True))
    rows = {path: list(x.axes[0]) for path, x in found.items() if x.axes}
    assert rows == {
        "c_fc/kernel": [1],
        "linear/weight": [0],
        "plain/weight": [1],
        "cell/weight_hh": [1],
        "both/w1": [0],
        "both/w2": [0],
    }


def test_the_table_has_leaves_of_many_models():
    assert sum(map(len, MODELS.values())) >= 60


ENDS = {"tokens": (V, D), "norm": (D,), "last": (D, V), "in": (7, D), "skip/b": (D, F)}
LAYERS = {
    "Llama": {
        "attn/q_proj/w": (D, N, H),
        "attn/k_proj/w": (D, K, H),
        "attn/o_proj/w": (N, H, D),
        "mlp/gate": (D, F),
        "mlp/down": (F, D),
        "norm/scale": (D,),
    },
    "experts": {
        "moe/w1": (E, D, F),
        "moe/w2": (E, F, D),
        "moe/gate/kernel": (D, E),
        "moe/gate/bias": (E,),
        "out/kernel": (N, H, D),
        "query/kernel": (D, N, H),
        "query/bias": (N, H),
    },
    "one matrix": {"w": (D, 3 * D), "b": (3 * D,)},
    "no vectors": {"a": (D, F), "b": (F, D), "router": (D, E)},
    "convolutions": {"conv1/kernel": (3, 3, D, D), "out/kernel": (3, 3, D, D)},
    "not told": {"C": (H, 4, 2), "tensor": (4, 5, D), "w": (D, D)},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_leaves_are_read_the_same_in_layerwise_and_outside_of_it(kind):
    """Of the ends alone, a layer, the stack, a list; and of an ordinary model."""
    layer = LAYERS[kind]
    ends = {f"ends/{path}": shape for path, shape in ENDS.items()}
    one = {f"layers/{path}": shape for path, shape in layer.items()}
    stack = {path: (L, *shape) for path, shape in one.items()}
    listed = {f"layers/{i}/{p}": x for i in range(L) for p, x in layer.items()}
    plain = {f"blocks/{i}/{p}": x for i in range(L) for p, x in layer.items()}

    def kinds(tree, shift=0):
        readings = read_leaves(list(tree), tree.values())
        return {
            re.sub(r"^(ends|layers|blocks)/(\d+/)?", "", path): (
                reading.kind,
                reading.axes
                and [tuple(i - shift for i in axes) for axes in reading.axes],
            )
            for path, reading in zip(tree, readings, strict=True)
            if shift == 0 or not path.startswith("ends")
        }

    expected = kinds(one)
    assert kinds(ends | stack, shift=1) == expected
    everything = kinds(ends) | expected
    assert kinds(ends | listed) == everything
    if kind != "one matrix":  # which by itself shows no layer
        assert kinds(ENDS | plain) == everything
    whole = kinds(ends | stack)
    assert {path: whole[path] for path in ENDS} == kinds(ends)
    assert kinds(ends)["tokens"][0] == "table" and kinds(ends)["last"][0] == "head"


def test_optimizers_are_made_for_the_same_matrices_in_layerwise():
    """A layer's momentum is as large as its matrices, in either form."""
    shapes = {"q_proj": (D, N, H), "o_proj": (N, H, D), "norm": (D,)}
    layers = {name: jnp.ones((L, *shape)) for name, shape in shapes.items()}
    ends = {"tokens": jnp.ones((V, D)), "first": jnp.ones((D, D))}
    tx = madax.muon_madam(0.1)
    run = madax.layerwise(tx, *[lambda *args: 0.0] * 3)
    state = jax.eval_shape(run.init, {"ends": ends, "layers": layers})
    momentum = lambda state: state.direction.inner_states["matrix"].inner_state.mu
    in_layers, in_ends = (momentum(state[part])[part] for part in ("layers", "ends"))
    listed = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(L)]
    whole = jax.eval_shape(tx.init, {"ends": ends, "layers": listed})
    one = momentum(whole)["layers"][0]
    assert jax.tree.leaves(in_layers) == [
        jax.ShapeDtypeStruct((L, *x.shape), x.dtype) for x in jax.tree.leaves(one)
    ]
    assert len(jax.tree.leaves(one)) == 2
    assert in_ends == momentum(whole)["ends"]
    assert [x.shape for x in jax.tree.leaves(in_ends)] == [(D, D)]


def test_the_report_is_a_dict_that_prints_as_a_table():
    shape = jax.ShapeDtypeStruct
    tree = {
        "conv/kernel": shape((3, 3, 8, 16), jnp.bfloat16),
        "embed/embedding": shape((V, D), jnp.float32),
        "layers/q_proj/w": madax.quantize_params(
            jnp.ones((D, N, H)), madax.SymlogFormat(8)
        ),
        "layers/wi/kernel": shape((D, L, F), jnp.float32),
    }
    rule = lambda path, leaf: (
        madax.transforms.MatrixDimensionNumbers(0, 2)
        if path == "layers/wi/kernel"
        else None
    )
    found = madax.diagnostics.matrices(tree)
    assert found["conv/kernel"] == (1, 72, 16) and found["embed/embedding"] is None
    assert found["layers/q_proj/w"] == (1, D, N * H) and isinstance(found, dict)
    lines = str(found).splitlines()
    assert lines[0].split() == ["leaf", "shape", "storage", "read", "as"]
    assert lines[2].split() == ["embed/embedding", "(500,", "64)", "float32", "table"]
    assert "SymlogFormat(bits=8" in lines[3] and lines[3].endswith("1 of 64 x 64")
    columns = {
        line.index(x)
        for line, x in zip(lines, ["shape", "(3", "(500", "(64", "(64"], strict=True)
    }
    assert len(columns) == 1
    asked = madax.diagnostics.matrices(tree, rule)
    assert asked["layers/wi/kernel"] == (L, D, F) and asked["conv/kernel"] is None
    assert str(asked).splitlines()[1].split()[-1] == "other"
