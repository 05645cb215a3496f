from tests.engine.families import EXPERTS
from tests.engine.families.lfm2 import CONFIG as DENSE

CLASSES = "Lfm2MoeConfig", "Lfm2MoeForCausalLM"
UNKNOWN = ("block_multiple_of", "shared_expert_intermediate_size")
CONFIG = {name: value for name, value in (DENSE | EXPERTS).items() if name not in UNKNOWN} | {
    "num_dense_layers": 1,
    "routed_scaling_factor": 1.5,
}
VARIANTS = {"lfm2_moe_without_bias": CONFIG | {"use_expert_bias": False, "norm_topk_prob": False}}
