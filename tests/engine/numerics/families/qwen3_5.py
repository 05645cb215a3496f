from tests.engine.numerics.families import LINEAR, SMALL

CLASSES = "Qwen3_5TextConfig", "Qwen3_5ForCausalLM"
CONFIG = SMALL | LINEAR | {"tie_word_embeddings": True}
