"""Model shapes as plain dictionaries: one vocabulary for presets and for Hugging Face configs.

A *shape* names the kind of the linear layers (``gated_deltanet``, ``kda+mla``, ``mamba2``,
``mamba1``, ``lightning``, ``shortconv``, ``stated`` where only the size of a state is known, or
``none``), how many layers of which sort there are, and their dimensions.
``hybridcache.geometry.model`` turns a shape into bytes and FLOPs; nothing else looks inside one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

Shape = Mapping[str, Any]

_PRESETS_FILE = "presets.json"


@cache
def presets() -> dict[str, dict[str, Any]]:
    """All shapes that come with the project, by full name."""
    text = files(__package__).joinpath(_PRESETS_FILE).read_text(encoding="utf-8")
    shapes: dict[str, dict[str, Any]] = json.loads(text)
    return shapes


def preset_name(word: str) -> str:
    """The full name of the one preset that ``word`` means: exact, or its beginning, ignoring case
    and punctuation.

    Raises KeyError, with the names there are, when it means none or several.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = list(presets())
    exact = [name for name in names if plain(name) == plain(word)]
    begins = [name for name in names if plain(name).startswith(plain(word))]
    found = exact or begins
    if len(found) == 1:
        return found[0]
    problem = f"means several: {', '.join(found)}" if found else f"is none of: {', '.join(names)}"
    raise KeyError(f"model {word!r} {problem}")


def shape_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a Hugging Face ``config.json`` (read with ``json.load``); a nested
    ``text_config`` is looked into.

    Raises ValueError when it is no config of a language model, or has layers of a sort this project
    does not know.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a JSON object was expected, not {type(config).__name__}")
    try:
        return _shape(config.get("text_config") or config)
    except KeyError as error:
        raise ValueError(f"a model without field {error} is not supported") from error


def _shape(text: Mapping[str, Any]) -> dict[str, Any]:
    shape = _attention(text) | _feed_forward(text)
    sorts = text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if sorts and "mamba_num_heads" in text:
        return shape | _nemotron(text, sorts)
    shape["num_layers"] = text["num_hidden_layers"]
    linear = text.get("linear_attn_config")
    if linear:
        return shape | _kimi(text, linear)
    return shape | _by_layer_types(text)


def _attention(text: Mapping[str, Any]) -> dict[str, Any]:
    heads = text["num_attention_heads"]
    shape = {
        "hidden": text["hidden_size"],
        "vocab": text.get("vocab_size", 0),
        "attn_heads": heads,
        "kv_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim")
        or text.get("attention_head_dim")
        or text["hidden_size"] // heads,
        "attention_gate": bool(text.get("attn_output_gate"))
        or str(text.get("model_type", "")).startswith(("qwen3_next", "qwen3_5")),
    }
    if text.get("kv_lora_rank"):
        shape["mla_kv_lora_rank"] = text["kv_lora_rank"]
        shape["mla_qk_rope_head_dim"] = text["qk_rope_head_dim"]
    return shape


def _feed_forward(text: Mapping[str, Any]) -> dict[str, Any]:
    experts = (
        text.get("num_experts")
        or text.get("n_routed_experts")
        or text.get("num_local_experts")
        or 0
    )
    shape = {"intermediate": text.get("intermediate_size") or 0}
    if not experts:
        return shape
    expert_dim = text.get("moe_intermediate_size") or text.get("intermediate_size") or 0
    shared = text.get("num_shared_experts") or text.get("n_shared_experts") or 0
    return shape | {
        "experts": experts,
        "topk": text.get("num_experts_per_tok") or text.get("num_experts_per_token") or 1,
        "moe_intermediate": expert_dim,
        "moe_hidden": text.get("moe_latent_size")
        or text.get("routed_expert_hidden_size")
        or text["hidden_size"],
        "shared_expert_intermediate": text.get("shared_expert_intermediate_size")
        or text.get("moe_shared_expert_intermediate_size")
        or shared * expert_dim,
    }


def _nemotron(text: Mapping[str, Any], sorts: str | Sequence[str]) -> dict[str, Any]:
    """``sorts``: one letter a layer (M mamba, * attention, - MLP, E experts), or one word."""
    return {
        "kind": "mamba2",
        "num_layers": len(sorts),
        "full_attn_layers": sorts.count("*") + sorts.count("attention"),
        "mamba_layers": sorts.count("M") + sorts.count("mamba"),
        "ffn_layers": sum(sorts.count(sort) for sort in ("-", "E", "mlp", "moe")),
        "ffn_matrices": 2,
        "mamba_heads": text["mamba_num_heads"],
        "mamba_head_dim": text["mamba_head_dim"],
        "mamba_d_state": text["ssm_state_size"],
        "mamba_groups": text["n_groups"],
        "conv_kernel": text["conv_kernel"],
    }


def _kimi(text: Mapping[str, Any], linear: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "kda+mla",
        "full_attn_layers": len(linear["full_attn_layers"]),
        "linear_layers": len(linear["kda_layers"]),
        "linear_k_heads": linear["num_heads"],
        "linear_v_heads": linear["num_heads"],
        "linear_k_dim": linear["head_dim"],
        "linear_v_dim": linear["head_dim"],
        "conv_kernel": linear.get("short_conv_kernel_size", 4),
    }


def _layer_types(text: Mapping[str, Any]) -> list[str]:
    types = text.get("layer_types")
    if types:
        return list(types)
    interval = text.get("full_attention_interval")
    num_layers = text["num_hidden_layers"]
    if interval:
        return [
            "full_attention" if (layer + 1) % interval == 0 else "linear_attention"
            for layer in range(num_layers)
        ]
    return ["full_attention"] * num_layers


def _by_layer_types(text: Mapping[str, Any]) -> dict[str, Any]:
    types = _layer_types(text)
    unknown = set(types) - {"full_attention", "attention", "linear_attention", "mamba", "conv"}
    if unknown:
        raise ValueError(f"layers of unknown sort: {', '.join(sorted(unknown))}")
    full = sum(sort in ("full_attention", "attention") for sort in types)
    shape: dict[str, Any] = {"kind": "none", "full_attn_layers": full}
    if "conv" in types:
        return shape | {
            "kind": "shortconv",
            "conv_layers": types.count("conv"),
            "conv_L_cache": text["conv_L_cache"],
        }
    if "mamba" in types:
        return shape | {
            "kind": "mamba2",
            "mamba_layers": types.count("mamba"),
            "mamba_heads": text["mamba_n_heads"],
            "mamba_head_dim": text["mamba_d_head"],
            "mamba_d_state": text["mamba_d_state"],
            "mamba_groups": text["mamba_n_groups"],
            "conv_kernel": text["mamba_d_conv"],
        }
    if "linear_attention" in types:
        # Kimi-Linear's own config class spells its heads without "key" and "value".
        is_kda = "linear_num_heads" in text
        key_dim = text["linear_head_dim"] if is_kda else text["linear_key_head_dim"]
        return shape | {
            "kind": "kda+mla" if is_kda else "gated_deltanet",
            "linear_layers": types.count("linear_attention"),
            "linear_k_heads": text["linear_num_heads"] if is_kda else text["linear_num_key_heads"],
            "linear_v_heads": text["linear_num_heads"]
            if is_kda
            else text["linear_num_value_heads"],
            "linear_k_dim": key_dim,
            "linear_v_dim": key_dim if is_kda else text["linear_value_head_dim"],
            "conv_kernel": text["linear_conv_kernel_dim"],
        }
    return shape
