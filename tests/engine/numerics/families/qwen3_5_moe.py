from tests.engine.numerics.families import EXPERTS, LINEAR, SMALL

CLASSES = "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"
CONFIG = SMALL | LINEAR | EXPERTS
