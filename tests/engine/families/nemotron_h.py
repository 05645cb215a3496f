from tests.engine.families import SMALL

CLASSES = "NemotronHConfig", "NemotronHForCausalLM"
MAMBA = {
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 20,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
    # transformers uses this value, which is for initial weights, as the limit of time steps. The
    # published code uses time_step_limit (transformers' pull request 48989).
    "time_step_min": 1e-9,
}
EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 36,
    "routed_scaling_factor": 1.5,
}
SHARED = {name: value for name, value in SMALL.items() if name != "num_hidden_layers"} | MAMBA
CONFIG = (
    SHARED
    | EXPERTS
    | {"layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"]}
)
VARIANTS = {
    "nemotron_h_dense": SHARED
    | {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "use_bias": True,
        "mlp_bias": True,
    },
    "nemotron_h_latent_experts": SHARED
    | EXPERTS
    | {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "moe_latent_size": 28,
        "norm_topk_prob": False,
    },
}
