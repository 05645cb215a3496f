from tests.engine.families import SMALL

CLASSES = "Lfm2Config", "Lfm2ForCausalLM"
CONFIG = {name: value for name, value in SMALL.items() if name != "head_dim"} | {
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "block_multiple_of": 40,
}
VARIANTS = {
    "lfm2_with_bias": CONFIG
    | {
        "conv_bias": True,
        "conv_L_cache": 4,
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": False,
    }
}
