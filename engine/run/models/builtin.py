"""The model that comes with the engine: a small hybrid of Qwen3-Next's kind over bytes. Its weights
are seeded and untrained: it shows how serving behaves, not what language models say."""

from __future__ import annotations

from typing import Any

BUILTIN_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "eos_token_id": [256, 258],
    "dtype": "float32",
}
"""A ``config.json``. 7.4 M parameters; one checkpoint is as large as the KV of 214 tokens."""
