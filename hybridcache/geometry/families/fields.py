"""Readers of config fields that several model families share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import inf
from typing import Any

from hybridcache.geometry.config_format import Config, Entry, Values, table
from hybridcache.geometry.mixers import AttentionSizes, DeltaSizes, LatentAttentionSizes, MambaSizes
from hybridcache.geometry.sizes import (
    MOST_LAYERS,
    ExpertsSizes,
    LayerSizes,
    MixerSizes,
    MLPSizes,
    ModelSizes,
    SizesError,
)

Fields = Mapping[str, Any]
MLP = MLPSizes | ExpertsSizes | None

DECODER: Mapping[str, object] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""Fields of most families, with their usual defaults."""

MAMBA2: Mapping[str, object] = {
    "mamba_n_heads": 128,
    "mamba_d_head": Entry(int | str, "auto"),
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": Entry(list[float], [0.0, inf]),
}
"""Fields of Bamba's Mamba-2, which Granite and Falcon share (``mamba2``)."""

EXPERT_KEYS = (
    "decoder_sparse_step",
    "expert_layer_offset",
    "expert_layer_period",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts_per_tok",
    "shared_expert_intermediate_size",
)
"""Keys that have no effect in a model without experts."""

LEGACY_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


def model(text: Fields, layers: tuple[LayerSizes, ...]) -> ModelSizes:
    """Build a model from its layers. Raises SizesError if an MLP has no width."""
    for layer in layers:
        if isinstance(layer.mlp, MLPSizes):
            check_size("intermediate_size", layer.mlp.intermediate)
    return ModelSizes(size_of(text, "hidden_size"), int(text.get("vocab_size", 0)), layers)


def decoder(**own: object) -> Mapping[str, Entry]:
    """Build a table of ``DECODER`` and a family's own fields, or other defaults."""
    return table(**{**DECODER, **own})


def by_type(
    text: Fields, mixers: Mapping[str, MixerSizes], mlps: MLP | Sequence[MLP]
) -> ModelSizes:
    """Build a model with one layer per type in ``layer_types``.

    Args:
        text: Fields of the config.
        mixers: Mixer of each type.
        mlps: Feed-forward block of all layers, or one block per layer.
    """
    types = sorts(text, mixers)
    each = mlps if isinstance(mlps, Sequence) else [mlps] * len(types)
    return model(
        text, tuple(LayerSizes((mixers[sort],), mlp) for sort, mlp in zip(types, each, strict=True))
    )


def num_layers(text: Fields) -> int:
    """Return the number of layers. Raises SizesError if it is below 1 or too large."""
    count = size_of(text, "num_hidden_layers")
    if count > MOST_LAYERS:
        raise SizesError(
            f"num_hidden_layers must be at most {MOST_LAYERS} in config.json (got {count})."
        )
    return count


def sorts(text: Fields, known: Collection[str], name: str = "layer_types") -> list[str]:
    """Return one type per layer, with legacy names replaced. Raises SizesError if a type is not in
    ``known``, or their number is not the number of layers."""
    given = text[name] or ()
    words = [word if word in known else LEGACY_LAYER_TYPES.get(word, word) for word in given]
    unknown = {spelled for spelled, word in zip(given, words, strict=True) if word not in known}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise SizesError(f"{name} has unknown types: {names} (docs/how-to/own-model.md).")
    if len(words) != num_layers(text):
        raise SizesError(
            f"{name} in config.json must name {num_layers(text)} layers, the value of "
            f"num_hidden_layers (got {len(words)})."
        )
    return words


def fill_mamba_head_dim(values: Values, inner: int | None, name: str) -> None:
    """Compute ``mamba_d_head`` if it is ``auto``.

    Args:
        values: Fields of the config, changed in place.
        inner: Channels of all heads, or None for ``mamba_expand`` times the hidden size.
        name: Key that states ``inner``, for error messages.
    """
    expand = values.pop("mamba_expand")
    inner = expand * values["hidden_size"] if inner is None else inner
    heads = check_size("mamba_n_heads", values["mamba_n_heads"])
    check_multiple(name, inner, "mamba_n_heads", heads)
    if values["mamba_d_head"] == "auto":
        values["mamba_d_head"] = inner // heads
    if values["mamba_d_head"] != inner // heads:
        raise SizesError(
            f"mamba_d_head times mamba_n_heads must equal {name} in config.json, {inner} (got "
            f"{values['mamba_d_head']} x {heads})."
        )


def every_nth_attends(text: Fields, interval: int) -> list[str]:
    """Return one type per layer: each ``interval``-th is full attention, the others linear."""
    words = "full_attention", "linear_attention"
    return [words[layer % interval > 0] for layer in range(1, num_layers(text) + 1)]


def attention(text: Fields, *, gated: bool = False) -> AttentionSizes:
    """Read grouped-query attention."""
    heads = size_of(text, "num_attention_heads")
    kv_heads = size_of(text, "num_key_value_heads", heads)
    check_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    if text.get("head_dim") is None:
        width = size_of(text, "hidden_size")
        dim = check_size("hidden_size / num_attention_heads", width // heads)
    else:
        dim = size_of(text, "head_dim")
    return AttentionSizes(heads, kv_heads, dim, gated)


def latent_attention(text: Fields) -> LatentAttentionSizes:
    """Read latent attention with the key names of DeepSeek."""
    return LatentAttentionSizes(
        num_heads=size_of(text, "num_attention_heads"),
        rank=size_of(text, "kv_lora_rank"),
        rope_dim=size_of(text, "qk_rope_head_dim"),
        nope_dim=size_of(text, "qk_nope_head_dim", 128),
        value_dim=size_of(text, "v_head_dim", 128),
    )


def gated_delta_net(text: Fields) -> DeltaSizes:
    """Read Gated DeltaNet with the key names of Qwen3-Next."""
    made = DeltaSizes(
        num_key_heads=size_of(text, "linear_num_key_heads"),
        num_value_heads=size_of(text, "linear_num_value_heads"),
        key_dim=size_of(text, "linear_key_head_dim"),
        value_dim=size_of(text, "linear_value_head_dim"),
        conv_width=size_of(text, "linear_conv_kernel_dim"),
    )
    check_multiple(
        "linear_num_value_heads", made.num_value_heads, "linear_num_key_heads", made.num_key_heads
    )
    return made


def mamba2(text: Fields) -> MambaSizes:
    """Read Mamba-2 with the key names of Bamba."""
    heads, groups = size_of(text, "mamba_n_heads"), size_of(text, "mamba_n_groups")
    check_multiple("mamba_n_heads", heads, "mamba_n_groups", groups)
    return MambaSizes(
        num_heads=heads,
        head_dim=size_of(text, "mamba_d_head"),
        state_dim=size_of(text, "mamba_d_state"),
        num_groups=groups,
        conv_width=size_of(text, "mamba_d_conv"),
    )


def dense(text: Fields, *, matrices: int = 3) -> MLPSizes:
    """Read a dense feed-forward block."""
    return MLPSizes(int(text.get("intermediate_size") or 0), matrices)


def experts(text: Fields, *, matrices: int = 3) -> ExpertsSizes | None:
    """Read a mixture of experts, or return None if the model has no experts."""
    name = _first(text, "num_experts", "n_routed_experts", "num_local_experts")
    count = int(text[name]) if name else 0
    if count == 0:
        ignore_experts(text)
        return None
    check_size(name, count)
    per_token = int(text[_first(text, "num_experts_per_tok", "num_experts_per_token")])
    if not 1 <= per_token <= count:
        raise SizesError(
            f"num_experts_per_tok must be from 1 to {name} in config.json (got {per_token} of "
            f"{count})."
        )
    size = size_of(text, _first(text, "moe_intermediate_size", "intermediate_size"))
    width = _first(text, "moe_latent_size", "routed_expert_hidden_size")
    return ExpertsSizes(
        num_experts=count,
        experts_per_token=per_token,
        intermediate=size,
        shared_intermediate=_shared_intermediate(text, size),
        width=size_of(text, width) if width else None,
        matrices=matrices,
    )


def ignore_experts(text: Fields) -> None:
    """Mark the keys of experts as read, because a model without experts does not use them."""
    if isinstance(text, Config):
        text.ignore(*EXPERT_KEYS)


def _shared_intermediate(text: Fields, size: int) -> int:
    """Return the inner width of all shared experts together, each ``size`` wide by default."""
    name = _first(text, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    if name:
        return size_of(text, name)
    count = _first(text, "num_shared_experts", "n_shared_experts")
    if count and int(text[count]) < 0:
        raise SizesError(f"{count} must be at least 0 in config.json (got {text[count]}).")
    return size * int(text[count]) if count else 0


def _first(text: Fields, *names: str) -> str:
    """Return the first name that has a value, or an empty string."""
    return next((name for name in names if text.get(name) is not None), "")


def size_of(text: Fields, name: str, default: int | None = None) -> int:
    """Return a size of at least one, or ``default`` if the file has no value. Raises KeyError if
    there is neither."""
    value = text[name] if default is None else text.get(name)
    return check_size(name, int(default if value is None else value))  # type: ignore[arg-type]


def check_size(name: str, size: int) -> int:
    """Return ``size`` if it is at least one. Raises SizesError otherwise."""
    if size < 1:
        raise SizesError(f"{name} must be at least 1 in config.json (got {size}).")
    return size


def check_multiple(name: str, size: int, of_name: str, of: int) -> None:
    """Raise SizesError unless ``size`` is a multiple of ``of``."""
    if size % of:
        raise SizesError(
            f"{name} must be a multiple of {of_name} in config.json (got {size} and {of})."
        )
