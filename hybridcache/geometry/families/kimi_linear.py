"""Kimi Linear: Kimi Delta Attention and latent attention."""

from __future__ import annotations

from hybridcache.geometry.config_format import Config, Entry, Schema, Values, checked, table
from hybridcache.geometry.families import fields
from hybridcache.geometry.mixers import DeltaSizes
from hybridcache.geometry.sizes import ModelSizes, SizesError

SORTS = "linear_attention", "full_attention"
LINEAR_KEYS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
"""Keys of ``linear_attn_config`` and the fields that they override."""
LISTS = "full_attn_layers", "kda_layers"


def complete(values: Values) -> None:
    """Move ``linear_attn_config`` of the published checkpoints into the fields of transformers.

    Unknown keys remain in ``linear_attn_config``.
    """
    count, linear = fields.num_layers(values), dict(values.get("linear_attn_config", {}))
    for key, name in LINEAR_KEYS.items():
        if key in linear:
            values[name] = checked(f"{key} of linear_attn_config", linear.pop(key), int)
    full, kda = (linear.pop(key, None) for key in LISTS)
    values["linear_attn_config"] = linear
    if values["layer_types"] is None and full is not None and kda is not None:
        values["layer_types"] = _named(count, full, kda)
    elif values["layer_types"] is None:
        values["layer_types"] = [SORTS[bool(layer) and layer % 4 == 0] for layer in range(count)]
    num_dense = values.pop("first_k_dense_replace", 1)
    if values["mlp_layer_types"] is None:
        kinds = "sparse", "dense"
        values["mlp_layer_types"] = [kinds[layer < num_dense] for layer in range(count)]


def _named(count: int, full: object, kda: object) -> list[str]:
    """Build ``layer_types`` from two lists of layers that count from one. Raises SizesError."""
    words: dict[int, str] = {}
    for layers, word in ((full, SORTS[1]), (kda, SORTS[0])):
        if not isinstance(layers, list):
            raise SizesError(f"{LISTS[word == SORTS[0]]} of linear_attn_config must be a list.")
        words |= dict.fromkeys(layers, word)
    if set(words) != set(range(1, count + 1)):
        raise SizesError(
            f"full_attn_layers and kda_layers of linear_attn_config must name the layers 1 to "
            f"{count}, as num_hidden_layers says."
        )
    return [words[layer] for layer in range(1, count + 1)]


FORMATS = {
    "kimi_linear": Schema(
        table(
            vocab_size=163840,
            hidden_size=2304,
            intermediate_size=9216,
            moe_intermediate_size=1024,
            num_hidden_layers=27,
            num_attention_heads=32,
            num_key_value_heads=Entry(int | None, 32),
            n_shared_experts=1,
            routed_scaling_factor=2.446,
            kv_lora_rank=512,
            q_lora_rank=Entry(int | None),
            qk_rope_head_dim=64,
            v_head_dim=128,
            qk_nope_head_dim=128,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            hidden_act="silu",
            max_position_embeddings=1048576,
            rms_norm_eps=1e-5,
            attention_bias=False,
            num_local_experts=256,
            mlp_layer_types=Entry(list[str] | None),
            layer_types=Entry(list[str] | None),
            linear_head_dim=128,
            linear_num_heads=32,
            linear_conv_kernel_dim=4,
        ),
        aliases={
            "model_max_length": "max_position_embeddings",
            "moe_renormalize": "norm_topk_prob",
            "num_expert_group": "n_group",
            "num_experts": "num_local_experts",
            "num_experts_per_token": "num_experts_per_tok",
            "num_shared_experts": "n_shared_experts",
        },
        extras={
            "linear_attn_config": dict,
            "first_k_dense_replace": int,
            "mla_use_nope": bool,
            "moe_layer_freq": int,
            "moe_router_activation_func": str,
        },
        complete=complete,
    )
}


def sizes(config: Config) -> ModelSizes:
    heads, dim, width = (
        fields.size_of(config, f"linear_{word}")
        for word in ("num_heads", "head_dim", "conv_kernel_dim")
    )
    kda = DeltaSizes(heads, heads, dim, dim, width)
    mla = fields.latent_attention(config)
    experts, dense = fields.experts(config), fields.dense(config)
    kinds = fields.sorts(config, ("dense", "sparse"), "mlp_layer_types")
    if experts is None and "sparse" in kinds:
        raise SizesError("num_experts must be at least 1 in config.json: layers are sparse.")
    mlps = [dense if kind == "dense" else experts for kind in kinds]
    return fields.by_type(config, {"linear_attention": kda, "full_attention": mla}, mlps)
