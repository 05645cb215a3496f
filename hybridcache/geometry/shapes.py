"""Bundled models: one *shape* per model, as published.

A shape names the kind of the linear layers, the number of layers of each type, and their
dimensions. Kinds are ``gated_deltanet``, ``kda+mla``, ``mamba2``, ``mamba1``, ``lightning``,
``shortconv``, and ``stated`` if only the state size is known. Only this module reads shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from hybridcache.geometry.mixers import (
    AttentionSizes,
    DeltaSizes,
    LatentAttentionSizes,
    MambaSizes,
    ShortConvSizes,
    StatedSizes,
)
from hybridcache.geometry.sizes import (
    ExpertsSizes,
    LayerSizes,
    MixerSizes,
    MLPSizes,
    ModelSizes,
)

Shape = Mapping[str, Any]

_PRESETS_FILE = "presets.json"


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Return all bundled shapes, by full name."""
    text = files(__package__).joinpath(_PRESETS_FILE).read_text(encoding="utf-8")
    shapes: dict[str, dict[str, Any]] = json.loads(text)
    return shapes


def preset_name(name: str) -> str:
    """Resolve ``name`` to the full name of one preset.

    ``name`` is a name or the beginning of one. Case and punctuation are ignored.

    Raises:
        KeyError: no preset or several presets match. The message lists the names.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = list(presets())
    exact = [each for each in names if plain(each) == plain(name)]
    begins = [each for each in names if plain(each).startswith(plain(name))]
    found = exact or begins
    if len(found) == 1:
        return found[0]
    problem = f"means several: {', '.join(found)}" if found else f"is none of: {', '.join(names)}"
    raise KeyError(f"model {name!r} {problem}")


def sizes_of_shape(shape: Shape) -> ModelSizes:
    """Build layers with the counts of a shape. Their order has no meaning, only their sums do."""
    num_linear, linear = _linear(shape)
    full = LayerSizes((_attention(shape),))
    num_mlps: int = shape.get("ffn_layers", shape["num_layers"])
    layers = (full,) * shape["full_attn_layers"] + (LayerSizes((linear,)),) * num_linear
    mlps = (LayerSizes(mlp=_mlp(shape)),) * num_mlps
    return ModelSizes(shape["hidden"], shape.get("vocab", 0), layers + mlps)


def _attention(shape: Shape) -> MixerSizes:
    heads = int(shape.get("attn_heads") or shape["hidden"] // shape["head_dim"])
    if "mla_kv_lora_rank" in shape:
        rank, rope = shape["mla_kv_lora_rank"], shape["mla_qk_rope_head_dim"]
        return LatentAttentionSizes(heads, rank, rope)
    gated = bool(shape.get("attention_gate"))
    return AttentionSizes(heads, shape["kv_heads"], shape["head_dim"], gated)


def _linear(shape: Shape) -> tuple[int, MixerSizes]:
    """Return the number of linear layers and the sizes of each."""
    kind: str = shape["kind"]
    if kind in ("gated_deltanet", "kda+mla", "lightning"):
        heads = shape["linear_v_heads"]
        return shape["linear_layers"], DeltaSizes(
            num_key_heads=shape.get("linear_k_heads", heads),
            num_value_heads=heads,
            key_dim=shape["linear_k_dim"],
            value_dim=shape["linear_v_dim"],
            conv_width=shape["conv_kernel"],
        )
    if kind in ("mamba1", "mamba2"):
        return shape["mamba_layers"], MambaSizes(
            num_heads=shape.get("mamba_heads") or shape["mamba_d_inner"],
            head_dim=shape.get("mamba_head_dim", 1),
            state_dim=shape["mamba_d_state"],
            num_groups=shape.get("mamba_groups", 0),
            conv_width=shape["conv_kernel"],
        )
    if kind == "shortconv":
        return shape["conv_layers"], ShortConvSizes(shape["hidden"], shape["conv_L_cache"])
    if kind == "stated":
        return shape["linear_layers"], StatedSizes(shape["state_elements"], shape["conv_elements"])
    raise ValueError(f"linear layers of unknown kind {kind!r}")


def _mlp(shape: Shape) -> MLPSizes | ExpertsSizes:
    matrices = shape.get("ffn_matrices", 3)
    if not shape.get("experts"):
        return MLPSizes(shape.get("intermediate", 0), matrices)
    size = shape.get("moe_intermediate", 0)
    shared = shape.get("shared_expert_intermediate", 0) or shape.get("shared_experts", 0) * size
    return ExpertsSizes(
        num_experts=shape["experts"],
        experts_per_token=shape["topk"],
        intermediate=size,
        shared_intermediate=shared,
        width=shape.get("moe_hidden"),
        matrices=matrices,
    )
