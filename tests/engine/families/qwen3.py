from tests.engine.families import SMALL

CLASSES = "Qwen3Config", "Qwen3ForCausalLM"
CONFIG = SMALL | {"attention_bias": True}
