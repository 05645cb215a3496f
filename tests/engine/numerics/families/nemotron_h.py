from tests.engine.numerics.families import SMALL

CLASSES = "NemotronHConfig", "NemotronHForCausalLM"
MAMBA = {
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 20,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
}
SORTS = ["linear_attention", "mlp", "full_attention", "linear_attention"]
SHARED = {name: value for name, value in SMALL.items() if name != "num_hidden_layers"} | MAMBA
CONFIG = SHARED | {"layers_block_type": SORTS, "use_bias": True, "mlp_bias": True}
