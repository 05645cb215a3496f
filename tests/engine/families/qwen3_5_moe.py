from tests.engine.families import EXPERTS, LINEAR, SMALL
from tests.engine.families.qwen3_5 import VISION

CLASSES = "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"
CONFIG = SMALL | LINEAR | EXPERTS
VARIANTS = {
    "qwen3_5_moe_with_vision": {
        "text_config": CONFIG,
        "vision_config": VISION,
        "tie_word_embeddings": True,
    }
}
VARIANT_CLASSES = {
    "qwen3_5_moe_with_vision": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration")
}
