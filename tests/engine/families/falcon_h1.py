from tests.engine.families import SMALL

CLASSES = "FalconH1Config", "FalconH1ForCausalLM"
MAMBA = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 20,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_d_ssm": 96,
    "mamba_chunk_size": 64,
}
SHARED = SMALL | MAMBA | {"num_hidden_layers": 2}
CONFIG = SHARED | {
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": False,
    "ssm_multipliers": [0.7, 1.3, 0.9, 1.1, 0.8],
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 1.4,
    "key_multiplier": 0.5,
    "mlp_multipliers": [0.8, 1.2],
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.4,
    "time_step_limit": [0.05, 2.0],
}
VARIANTS = {
    "falcon_h1_without_norm": SHARED,
    "falcon_h1_norm_before_gate": SHARED | {"mamba_rms_norm": True, "projectors_bias": True},
}
