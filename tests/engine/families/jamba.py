from tests.engine.families import SMALL

CLASSES = "JambaConfig", "JambaForCausalLM"
SHARED = SMALL | {
    "num_hidden_layers": 3,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 12,
}
CONFIG = SHARED | {"num_experts": 4, "num_experts_per_tok": 2}
VARIANTS = {"jamba_dense": SHARED | {"num_experts": 1, "mamba_dt_rank": 6, "mamba_proj_bias": True}}
