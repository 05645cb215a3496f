from tests.engine.families import SMALL

CLASSES = "KimiLinearConfig", "KimiLinearForCausalLM"
CONFIG = {name: value for name, value in SMALL.items() if name != "head_dim"} | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "linear_attn_config": {
        "num_heads": 3,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
        "full_attn_layers": [3],
        "kda_layers": [1, 2, 4],
    },
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "moe_intermediate_size": 20,
}
VARIANTS = {
    "kimi_linear_with_four_heads": CONFIG
    | {"linear_attn_config": CONFIG["linear_attn_config"] | {"num_heads": 4}}
}


def official(tensors):
    """Rename the MLP of dense layers, which transformers stores under the name of the experts."""
    projections = ("gate_proj", "up_proj", "down_proj")
    dense = tuple(f"block_sparse_moe.{projection}.weight" for projection in projections)
    return {
        name.replace("block_sparse_moe", "mlp") if name.endswith(dense) else name: tensor
        for name, tensor in tensors.items()
    }
