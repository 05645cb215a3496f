from tests.engine.families import SMALL

CLASSES = "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM"
SHARED = SMALL | {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 64,
    "shared_intermediate_size": 36,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.1,
}
CONFIG = SHARED | {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 20,
    "time_step_limit": [0.05, 2.0],
}
VARIANTS = {
    "granite_moe_hybrid_dense": SHARED
    | {"num_local_experts": 0, "position_embedding_type": "rope", "mamba_proj_bias": True}
}
