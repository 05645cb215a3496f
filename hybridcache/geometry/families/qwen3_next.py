"""Qwen3-Next and Qwen3.5: Gated DeltaNet and gated attention, dense or with experts."""

from __future__ import annotations

from hybridcache.geometry.config_format import ROPE_KEYS, Config, Entry, Schema, Values
from hybridcache.geometry.families import fields
from hybridcache.geometry.sizes import ModelSizes

SHARED: dict[str, object] = {
    "num_attention_heads": 16,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": Entry(list[str] | None),
}
EXPERTS: dict[str, object] = {
    "hidden_size": 2048,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
EXTRAS: dict[str, object] = {
    **ROPE_KEYS,
    "full_attention_interval": int,
    "attn_output_gate": bool,
    "mlp_only_layers": list | None,
}


def complete(values: Values) -> None:
    interval = values.pop("full_attention_interval", 4)
    fields.check_size("full_attention_interval", interval)
    if values["layer_types"] is None:
        values["layer_types"] = fields.every_nth_attends(values, interval)
    if values.get("mlp_only_layers", ()) is None:
        values["mlp_only_layers"] = []


def _format(**own: object) -> Schema:
    return Schema(fields.decoder(**SHARED, **own), extras=EXTRAS, complete=complete)


NEXT = _format(
    **EXPERTS,
    vocab_size=151936,
    intermediate_size=5632,
    num_hidden_layers=48,
    decoder_sparse_step=1,
    num_experts_per_tok=10,
    num_experts=512,
    norm_topk_prob=True,
    mlp_only_layers=Entry(list[int] | None),
)
DENSE = _format(
    vocab_size=248320,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=32,
    num_key_value_heads=4,
)
MOE = _format(
    **EXPERTS, vocab_size=248320, num_hidden_layers=40, num_experts_per_tok=8, num_experts=256
)
FORMATS = {
    "qwen3_next": NEXT,
    "qwen3_5": DENSE,
    "qwen3_5_text": DENSE,
    "qwen3_5_moe": MOE,
    "qwen3_5_moe_text": MOE,
}


def sizes(config: Config) -> ModelSizes:
    attention = fields.attention(config, gated=True)
    linear = fields.gated_delta_net(config)
    dense, experts = fields.dense(config), fields.experts(config)
    if experts is None and "intermediate_size" not in config:
        fields.check_size("num_experts", 0)  # the family has no dense blocks
    always_dense = set(config.get("mlp_only_layers", ()))
    step = fields.check_size("decoder_sparse_step", config.get("decoder_sparse_step", 1))
    mlps = [
        experts if experts and layer not in always_dense and (layer + 1) % step == 0 else dense
        for layer in range(fields.num_layers(config))
    ]
    return fields.by_type(config, {"linear_attention": linear, "full_attention": attention}, mlps)
