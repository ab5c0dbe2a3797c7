"""Models of transformers 4 that are written in linen, by their configurations alone."""

import importlib

from zoo.loops import by_train_state
from zoo.of_gemma import WHY
from zoo.other import TOKENS, Other

SOURCE, PACKAGES = "transformers", ("transformers", "flax")


def _of(config, model, **fields):
    def build():
        package = importlib.import_module("transformers")
        if not hasattr(package, model):
            raise ImportError(f"{package.__version__} has no {model}")
        made = getattr(package, config)(**fields)
        flax = getattr(package, model)(made, input_shape=TOKENS.shape, seed=0)
        output = lambda params: flax(TOKENS, params=params)[0]
        return Other(flax.params, output, WHY, by_train_state)

    return build


_SIZES = {
    "vocab_size": 72,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
_GPT_2 = {
    "vocab_size": 72,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
}

MODELS = {
    "GPT-2": _of("GPT2Config", "FlaxGPT2LMHeadModel", **_GPT_2),
    "BERT": _of("BertConfig", "FlaxBertForMaskedLM", **_SIZES),
    "Llama": _of("LlamaConfig", "FlaxLlamaForCausalLM", **_SIZES),
}
