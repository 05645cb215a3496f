import torch

from tests.engine.families import LINEAR, SMALL

CLASSES = "OlmoHybridConfig", "OlmoHybridForCausalLM"
CONFIG = {name: value for name, value in (SMALL | LINEAR).items() if name != "head_dim"}
WITHOUT_ROPE = {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}
VARIANTS = {
    "olmo_hybrid_without_rope": CONFIG
    | WITHOUT_ROPE
    | {"linear_allow_neg_eigval": False, "num_hidden_layers": 5}
}


def official(tensors):
    """Split the convolution by the widths of its parts, and rename the norm after attention.

    transformers splits the convolution into thirds, and names that norm like one of linear layers.
    """
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".linear_attn.")
        if suffix == "q_conv1d.weight":
            convs = [tensors[f"{stem}.linear_attn.{x}_conv1d.weight"] for x in "qkv"]
            widths = [len(tensors[f"{stem}.linear_attn.{x}_proj.weight"]) for x in "qkv"]
            parts = torch.cat(convs).split(widths)
            for x, part in zip("qkv", parts, strict=True):
                renamed[f"{stem}.linear_attn.{x}_conv1d.weight"] = part.contiguous()
        elif not suffix.endswith("conv1d.weight"):
            layer = name.rpartition(".feedforward_layer_norm")[0]
            is_behind = bool(layer) and f"{layer}.self_attn.q_proj.weight" in tensors
            renamed[f"{layer}.post_attention_layernorm.weight" if is_behind else name] = tensor
    return renamed
