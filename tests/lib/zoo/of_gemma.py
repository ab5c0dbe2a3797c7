"""Gemma 3 as Google publishes it, in linen: the package ``gemma``."""

import jax
import jax.numpy as jnp

from zoo.loops import by_train_state
from zoo.other import TOKENS, Other

SOURCE, PACKAGES = "gemma", ("gemma", "flax")
WHY = "linen keeps its layers apart; stack them, or use nn.scan"


def _gemma_3():
    from gemma import gm
    from gemma.gm.nn import _config, _modules

    kinds = _modules.AttentionType
    config = _config.TransformerConfig(
        num_embed=72,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=8,
        vision_encoder=None,
    )
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    output = lambda params: model.apply({"params": params}, TOKENS).logits
    return Other(params, output, WHY, by_train_state)


MODELS = {"Gemma 3": _gemma_3}
