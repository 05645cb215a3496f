from tests.engine.families import LINEAR, SMALL

CLASSES = "Qwen3_5TextConfig", "Qwen3_5ForCausalLM"
CONFIG = SMALL | LINEAR | {"tie_word_embeddings": True}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
COMPOSITE = {"text_config": SMALL | LINEAR | {"tie_word_embeddings": True}, "vision_config": VISION}
VARIANTS = {"qwen3_5_with_vision": COMPOSITE}
VARIANT_CLASSES = {"qwen3_5_with_vision": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration")}
