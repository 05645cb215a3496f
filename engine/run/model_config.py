"""A model's shape, read from a Hugging Face ``config.json``: what the layers, the pools and the
loader need to know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Architecture = Literal["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3"]
LayerType = Literal["linear_attention", "full_attention"]

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3_next": "qwen3_next",
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3": "qwen3",
}
"""``model_type`` of a config.json to the family that serves it."""


MOST_LAYERS = 10_000


class ModelError(ValueError):
    """A model that can not be served, in one sentence that says why."""


@dataclass(frozen=True, slots=True)
class LinearAttentionShape:
    """A Gated DeltaNet layer."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Per head."""
    value_dim: int
    """Per head."""
    conv_width: int
    """Taps of the causal convolution."""

    @property
    def conv_channels(self) -> int:
        """Queries, keys and values of all heads: what the convolution runs over."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def window_shape(self) -> tuple[int, int]:
        """Of one layer's conv state."""
        return self.conv_channels, self.conv_width - 1

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of one layer's recurrent state."""
        return self.num_value_heads, self.key_dim, self.value_dim


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """A mixture-of-experts block."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    renormalise: bool
    """Whether the weights of the chosen experts are made to sum to one."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. Sizes are in elements."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    layer_types: tuple[LayerType, ...]
    expert_layers: tuple[bool, ...]
    """Per layer: experts (True) or a dense MLP."""
    intermediate_size: int
    """Of the dense MLPs."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    """Leading dimensions of a head that are rotated."""
    rope_theta: float
    norm_eps: float
    attention_bias: bool
    tie_embeddings: bool
    max_position: int
    dtype: str
    """The checkpoint's own: float32, bfloat16 ..."""
    eos_token_ids: tuple[int, ...]
    linear: LinearAttentionShape | None
    experts: ExpertsShape | None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def num_full_layers(self) -> int:
        return self.layer_types.count("full_attention")

    @property
    def num_linear_layers(self) -> int:
        return self.layer_types.count("linear_attention")

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """From the ``config.json`` of a model directory. Raises ModelError."""
        return cls.from_dict(read_config(model_dir))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """From a parsed ``config.json``, the text part nested in ``text_config`` or not. Raises
        ModelError."""
        text = config.get("text_config") or config
        if not isinstance(text, Mapping):
            raise ModelError("text_config in config.json must be an object.")
        model_type = text.get("model_type", config.get("model_type"))
        architecture = ARCHITECTURES.get(str(model_type))
        if architecture is None:
            supported = ", ".join(sorted(set(ARCHITECTURES.values())))
            raise ModelError(
                f"models of type {model_type!r} are not supported; supported are {supported}."
            )
        if "quantization_config" in config or "quantization_config" in text:
            raise ModelError(
                "pre-quantised weights are not supported: give the model's bfloat16 directory, and "
                "--quantization int8 or fp8."
            )
        try:
            parsed = _parse(architecture, text, config)
        except KeyError as error:
            raise ModelError(f"the model's config.json has no {error.args[0]!r}.") from None
        except ModelError:
            raise
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ModelError(
                f"the model's config.json has a value of the wrong type: {error}."
            ) from None
        _check_sizes(parsed)
        return parsed


def read_config(model_dir: Path) -> dict[str, Any]:
    """``config.json`` as it stands. Raises ModelError."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelError(f"there is no config.json in {model_dir}: give a model directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return config


def _parse(
    architecture: Architecture, text: Mapping[str, Any], outer: Mapping[str, Any]
) -> ModelConfig:
    num_layers = int(text["num_hidden_layers"])
    if num_layers > MOST_LAYERS:
        raise ModelError(f"num_hidden_layers can not be {num_layers} in config.json.")
    layer_types = _layer_types(architecture, text, num_layers)
    experts = _experts(architecture, text)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    theta, rotary_fraction = _rope(architecture, text)
    eos = text.get("eos_token_id", outer.get("eos_token_id"))
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(text["vocab_size"]),
        hidden_size=int(text["hidden_size"]),
        layer_types=layer_types,
        expert_layers=_expert_layers(text, num_layers, experts is not None),
        intermediate_size=int(text.get("intermediate_size") or 0),
        num_heads=int(text["num_attention_heads"]),
        num_kv_heads=int(text["num_key_value_heads"]),
        head_dim=head_dim,
        rotary_dim=int(head_dim * rotary_fraction),
        rope_theta=theta,
        norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        attention_bias=bool(text.get("attention_bias", False)),
        tie_embeddings=bool(text.get("tie_word_embeddings", outer.get("tie_word_embeddings"))),
        max_position=int(text.get("max_position_embeddings", 32768)),
        dtype=_dtype(text, outer),
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        linear=_linear(text) if "linear_attention" in layer_types else None,
        experts=experts,
    )


def _check_sizes(config: ModelConfig) -> None:
    """Raises ModelError for sizes that no model can have."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ModelError(f"{name} must be at least 1 in config.json, not {size}.")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            "num_attention_heads must be a multiple of num_key_value_heads in config.json."
        )
    if config.rotary_dim % 2:
        raise ModelError(
            f"{config.rotary_dim} dimensions of a head are rotated: head_dim must make it even."
        )
    experts = config.experts
    if experts is not None and not 1 <= experts.experts_per_token <= experts.num_experts:
        raise ModelError("num_experts_per_tok must be from 1 to num_experts in config.json.")


def _layer_types(
    architecture: Architecture, text: Mapping[str, Any], num_layers: int
) -> tuple[LayerType, ...]:
    if architecture == "qwen3":
        if text.get("use_sliding_window"):
            raise ModelError("sliding-window attention is not supported.")
        return tuple("full_attention" for _ in range(num_layers))
    named = text.get("layer_types")
    if named is None:
        every = int(text.get("full_attention_interval") or 4)
        return tuple(
            "linear_attention" if (layer + 1) % every else "full_attention"
            for layer in range(num_layers)
        )
    unknown = set(named) - {"linear_attention", "full_attention"}
    if unknown or len(named) != num_layers:
        raise ModelError(
            f"layer_types must name {num_layers} layers, each linear_attention or full_attention."
        )
    return tuple(named)


def _linear(text: Mapping[str, Any]) -> LinearAttentionShape:
    shape = LinearAttentionShape(
        num_key_heads=int(text["linear_num_key_heads"]),
        num_value_heads=int(text["linear_num_value_heads"]),
        key_dim=int(text["linear_key_head_dim"]),
        value_dim=int(text["linear_value_head_dim"]),
        conv_width=int(text["linear_conv_kernel_dim"]),
    )
    if shape.num_value_heads % shape.num_key_heads:
        raise ModelError(
            "linear_num_value_heads must be a multiple of linear_num_key_heads in config.json."
        )
    return shape


def _experts(architecture: Architecture, text: Mapping[str, Any]) -> ExpertsShape | None:
    if architecture not in ("qwen3_next", "qwen3_5_moe") or not text.get("num_experts"):
        return None
    return ExpertsShape(
        num_experts=int(text["num_experts"]),
        experts_per_token=int(text["num_experts_per_tok"]),
        intermediate_size=int(text["moe_intermediate_size"]),
        shared_intermediate_size=int(text["shared_expert_intermediate_size"]),
        renormalise=architecture == "qwen3_5_moe" or bool(text.get("norm_topk_prob", True)),
    )


def _expert_layers(text: Mapping[str, Any], num_layers: int, has_experts: bool) -> tuple[bool, ...]:
    dense = set(text.get("mlp_only_layers") or ())
    step = int(text.get("decoder_sparse_step") or 1)
    return tuple(
        has_experts and layer not in dense and (layer + 1) % step == 0
        for layer in range(num_layers)
    )


def _rope(architecture: Architecture, text: Mapping[str, Any]) -> tuple[float, float]:
    """Base and rotated fraction of a head. Text positions are the same on all axes of a multimodal
    rotary embedding."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelError(f"rotary embeddings of type {kind!r} are not supported; default is.")
    theta = rope.get("rope_theta", text.get("rope_theta", 10000.0))
    default = 1.0 if architecture == "qwen3" else 0.25
    fraction = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", default))
    return float(theta), float(fraction)


def _dtype(text: Mapping[str, Any], outer: Mapping[str, Any]) -> str:
    for config in (text, outer):
        for key in ("dtype", "torch_dtype"):
            if config.get(key):
                return str(config[key]).removeprefix("torch.")
    return "float32"
