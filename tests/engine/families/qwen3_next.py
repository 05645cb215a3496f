from tests.engine.families import EXPERTS, LINEAR, SMALL

CLASSES = "Qwen3NextConfig", "Qwen3NextForCausalLM"
CONFIG = (
    SMALL | LINEAR | EXPERTS | {"mlp_only_layers": [1], "linear_key_head_dim": 20, "head_dim": 40}
)
VARIANTS = {
    "qwen3_next_no_renormalise": SMALL
    | LINEAR
    | EXPERTS
    | {"norm_topk_prob": False, "decoder_sparse_step": 2}
}
