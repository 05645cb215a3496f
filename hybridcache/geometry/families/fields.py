"""Fields that the configs of many families share, each read here and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hybridcache.geometry.mixers import (
    AttentionSizes,
    DeltaSizes,
    LatentAttentionSizes,
    MambaSizes,
)
from hybridcache.geometry.sizes import (
    MOST_LAYERS,
    ExpertsSizes,
    LayerSizes,
    MLPSizes,
    ModelSizes,
    SizesError,
)

Fields = Mapping[str, Any]


def model(text: Fields, layers: tuple[LayerSizes, ...]) -> ModelSizes:
    """A model of these layers. Raises SizesError where one keeps nothing or less, or has an MLP
    without width."""
    made = ModelSizes(hidden(text), int(text.get("vocab_size", 0)), layers)
    for spec in made.specs():
        if min(spec.shape) < 1:
            shape = " x ".join(map(str, spec.shape))
            raise SizesError(
                f"sizes in config.json must be at least 1: a layer would keep {shape} numbers "
                f"({spec.name})."
            )
    for layer in layers:
        if isinstance(layer.mlp, MLPSizes):
            check_size("intermediate_size", layer.mlp.intermediate)
    return made


def hidden(text: Fields) -> int:
    """Width of the residual stream."""
    return check_size("hidden_size", int(text["hidden_size"]))


def num_layers(text: Fields) -> int:
    """Raises SizesError for a number that no model has."""
    count = check_size("num_hidden_layers", int(text["num_hidden_layers"]))
    if count > MOST_LAYERS:
        raise SizesError(f"num_hidden_layers can not be {count} in config.json.")
    return count


def layer_types(text: Fields, known: Collection[str], *, default_interval: int = 1) -> list[str]:
    """One word a layer; where none are named every ``full_attention_interval``-th attends. Raises
    SizesError for a word that is not ``known``."""
    count = num_layers(text)
    types = text.get("layer_types")
    if not types:
        interval = int(text.get("full_attention_interval") or default_interval)
        words = "full_attention", "linear_attention"
        return [words[(layer + 1) % interval > 0] for layer in range(count)]
    unknown = set(types) - set(known)
    if unknown:
        raise SizesError(f"layers of unknown sort: {', '.join(sorted(unknown))}")
    if len(types) != count:
        raise SizesError(f"layer_types in config.json must name {count} layers.")
    return list(types)


def attention(text: Fields, *, gated: bool = False) -> AttentionSizes:
    """Grouped queries."""
    heads = int(text["num_attention_heads"])
    dim = text.get("head_dim") or text.get("attention_head_dim") or hidden(text) // heads
    kv_heads = int(text.get("num_key_value_heads") or heads)
    for name, size in (
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("head_dim", int(dim)),
    ):
        check_size(name, size)
    check_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    return AttentionSizes(heads, kv_heads, int(dim), gated)


def latent_attention(text: Fields) -> LatentAttentionSizes:
    """As DeepSeek names it."""
    return LatentAttentionSizes(
        num_heads=check_size("num_attention_heads", int(text["num_attention_heads"])),
        rank=check_size("kv_lora_rank", int(text["kv_lora_rank"])),
        rope_dim=check_size("qk_rope_head_dim", int(text["qk_rope_head_dim"])),
        nope_dim=int(text.get("qk_nope_head_dim") or 128),
        value_dim=int(text.get("v_head_dim") or 128),
    )


def gated_delta_net(text: Fields) -> DeltaSizes:
    """As Qwen3-Next names it."""
    made = DeltaSizes(
        num_key_heads=int(text["linear_num_key_heads"]),
        num_value_heads=int(text["linear_num_value_heads"]),
        key_dim=int(text["linear_key_head_dim"]),
        value_dim=int(text["linear_value_head_dim"]),
        conv_width=int(text["linear_conv_kernel_dim"]),
    )
    check_size("linear_num_key_heads", made.num_key_heads)
    check_multiple(
        "linear_num_value_heads", made.num_value_heads, "linear_num_key_heads", made.num_key_heads
    )
    return made


def mamba2(text: Fields) -> MambaSizes:
    """As Bamba names it, and Granite and Falcon after it."""
    heads = check_size("mamba_n_heads", int(text["mamba_n_heads"]))
    groups = check_size("mamba_n_groups", int(text["mamba_n_groups"]))
    check_multiple("mamba_n_heads", heads, "mamba_n_groups", groups)
    dim = text.get("mamba_d_head") or "auto"
    if dim == "auto":
        inner = int(text.get("mamba_d_ssm") or int(text.get("mamba_expand") or 2) * hidden(text))
        check_multiple("mamba_d_ssm", inner, "mamba_n_heads", heads)
        dim = inner // heads
    return MambaSizes(
        num_heads=heads,
        head_dim=int(dim),
        state_dim=int(text["mamba_d_state"]),
        num_groups=groups,
        conv_width=int(text["mamba_d_conv"]),
    )


def dense(text: Fields, *, matrices: int = 3) -> MLPSizes:
    """A dense feed-forward block."""
    return MLPSizes(int(text.get("intermediate_size") or 0), matrices)


def experts(text: Fields, *, matrices: int = 3) -> ExpertsSizes | None:
    """None for a model without."""
    count = _first(text, "num_experts", "n_routed_experts", "num_local_experts")
    if not count:
        return None
    per_token = _first(text, "num_experts_per_tok", "num_experts_per_token") or 1
    size = _first(text, "moe_intermediate_size", "intermediate_size")
    shared = _first(
        text, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"
    ) or size * _first(text, "num_shared_experts", "n_shared_experts")
    if not 1 <= per_token <= count:
        raise SizesError("num_experts_per_tok must be from 1 to num_experts in config.json.")
    return ExpertsSizes(
        num_experts=count,
        experts_per_token=per_token,
        intermediate=size,
        shared_intermediate=shared,
        width=_first(text, "moe_latent_size", "routed_expert_hidden_size") or None,
        matrices=matrices,
    )


def _first(text: Fields, *names: str) -> int:
    """The first of the fields that is set; 0 where none is."""
    return next((int(text[name]) for name in names if text.get(name)), 0)


def check_size(name: str, size: int) -> int:
    """Raises SizesError for less than one."""
    if size < 1:
        raise SizesError(f"{name} must be at least 1 in config.json, not {size}.")
    return size


def check_multiple(name: str, size: int, of_name: str, of: int) -> None:
    """Raises SizesError where it is none."""
    if size % of:
        raise SizesError(f"{name} must be a multiple of {of_name} in config.json.")
