"""What a model's prefixes cost: bytes to keep them, FLOPs and seconds to compute them again.

>>> geometry = ModelGeometry.preset("qwen3-next")
>>> geometry.kv_bytes_per_token, geometry.state_bytes, round(geometry.state_tokens)
(24576, 77266944, 3144)
>>> geometry.flops(0, 2048) > geometry.flops(1024, 2048)
True
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.geometry.shapes import (
    Shape,
    preset_name,
    presets,
    shape_of_config,
)

Lengths = npt.NDArray[np.int64]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """One model as the cache and the cost model see it. Bytes and FLOPs are sums over all
    layers."""

    name: str
    num_full_layers: int
    """Full-attention layers: one KV row a token each."""
    num_linear_layers: int
    """Linear-attention (GDN, KDA, Mamba ...) layers: one state a sequence each; 0: an
    attention-only model."""
    kv_bytes_per_token: int
    recurrent_elements: int
    """Numbers in the recurrent state of one sequence."""
    conv_bytes: int
    """The conv state of one sequence."""
    state_dtype: str
    """Of the recurrent state: a key of ``DTYPE_BYTES``. int8 counts its fp32 scales: one per 128
    numbers."""
    active_params: int
    """Weights a token is multiplied with, embeddings excluded."""
    total_params: int
    scan_flops_per_token: int
    """Of the linear layers' recurrences: 6 per state number."""
    attention_flops_per_pair: int
    """Of one query with one key, QK and PV, all full layers and heads."""

    @classmethod
    def preset(cls, name: str, **dtypes: str) -> ModelGeometry:
        """A model that comes with the project, by name or an unambiguous beginning of it
        (``qwen3-next``).

        Raises KeyError listing the names there are.
        """
        full_name = preset_name(name)
        return cls.from_shape(full_name, presets()[full_name], **dtypes)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], name: str = "model", **dtypes: str
    ) -> ModelGeometry:
        """From a Hugging Face ``config.json`` as a dict, nested ``text_config`` or not.

        ``dtypes``: ``kv_dtype`` (default bfloat16), ``state_dtype`` (float32), ``conv_dtype``
        (bfloat16).
        """
        return cls.from_shape(name, shape_of_config(config), **dtypes)

    @classmethod
    def load(cls, word: str, **dtypes: str) -> ModelGeometry:
        """``--model``: a preset's name, or the path of a ``config.json`` or of the directory that
        holds one. Named after the file, or after the directory if the file is ``config.json``.

        Raises KeyError for a name that is none, OSError for a file that can not be read, and
        ValueError, with the path, for one that is no config of a model this project knows.
        """
        path = Path(word)
        if path.is_dir():
            path = path / "config.json"
        if path.suffix == ".json":
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
                name = path.resolve().parent.name if path.stem == "config" else path.stem
                return cls.from_config(config, name, **dtypes)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not JSON ({error})") from error
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return cls.preset(word, **dtypes)

    @classmethod
    def from_shape(
        cls,
        name: str,
        shape: Shape,
        *,
        kv_dtype: str = "bfloat16",
        state_dtype: str | None = None,
        conv_dtype: str = "bfloat16",
    ) -> ModelGeometry:
        """From a shape (see ``hybridcache.geometry.shapes``). ``state_dtype``: None is the shape's
        own, float32 where it has none."""
        state_dtype = state_dtype or shape.get("state_dtype", "float32")
        _refuse_unknown(kv_dtype=kv_dtype, state_dtype=state_dtype, conv_dtype=conv_dtype)
        linear = _linear_layers(shape)
        active, total = _params(shape, linear.params)
        return cls(
            name=name,
            num_full_layers=shape["full_attn_layers"],
            num_linear_layers=linear.num_layers,
            kv_bytes_per_token=shape["full_attn_layers"] * _kv_row(shape) * DTYPE_BYTES[kv_dtype],
            recurrent_elements=linear.num_layers * linear.state,
            conv_bytes=linear.num_layers * linear.conv * DTYPE_BYTES[conv_dtype],
            state_dtype=state_dtype,
            active_params=active,
            total_params=total,
            scan_flops_per_token=6 * linear.num_layers * linear.state,
            attention_flops_per_pair=shape["full_attn_layers"] * _pair_flops(shape),
        )

    @property
    def recurrent_bytes(self) -> int:
        """Of one sequence's recurrent state; int8 with one fp32 scale per 128 numbers."""
        scales = self.recurrent_elements // 128 * 4 if self.state_dtype == "int8" else 0
        return self.recurrent_elements * DTYPE_BYTES[self.state_dtype] + scales

    @property
    def state_bytes(self) -> int:
        """Of one checkpoint: conv + recurrent state of all linear layers. 0 for an attention-only
        model."""
        return self.recurrent_bytes + self.conv_bytes

    @property
    def state_tokens(self) -> float:
        """Tokens whose KV weighs as much as one checkpoint."""
        return self.state_bytes / self.kv_bytes_per_token

    def with_state_dtype(self, state_dtype: str) -> ModelGeometry:
        """The same model with its checkpoints kept in another precision."""
        _refuse_unknown(state_dtype=state_dtype)
        return replace(self, state_dtype=state_dtype)

    def flops(self, start: int, end: int) -> int:
        """Forward FLOPs of a prefill of tokens [start, end) after ``start`` reused ones. O(1)."""
        num_pairs = (end * (end + 1) - start * (start + 1)) // 2
        per_token = 2 * self.active_params + self.scan_flops_per_token
        return (end - start) * per_token + num_pairs * self.attention_flops_per_pair


@dataclass(frozen=True, slots=True)
class _LinearLayers:
    num_layers: int
    state: int
    """Numbers in one layer's recurrent state."""
    conv: int
    """Numbers in one layer's conv state."""
    params: int
    """Weights of one layer."""


def _linear_layers(shape: Shape) -> _LinearLayers:
    hidden: int = shape["hidden"]
    kind: str = shape["kind"]
    taps = max(shape.get("conv_kernel", 0) - 1, 0)
    if kind in ("gated_deltanet", "kda+mla", "lightning"):
        heads = shape["linear_v_heads"]
        key_width = shape.get("linear_k_heads", heads) * shape["linear_k_dim"]
        value_width = heads * shape["linear_v_dim"]
        return _LinearLayers(
            shape["linear_layers"],
            state=heads * shape["linear_k_dim"] * shape["linear_v_dim"],
            conv=taps * (2 * key_width + value_width),
            params=hidden * (2 * key_width + 3 * value_width),  # q, k; v, gate, out
        )
    if kind in ("mamba1", "mamba2"):
        groups, states = shape.get("mamba_groups", 0), shape["mamba_d_state"]
        inner = shape.get("mamba_d_inner") or shape["mamba_heads"] * shape["mamba_head_dim"]
        conv_width = inner + 2 * groups * states
        return _LinearLayers(
            shape["mamba_layers"],
            state=inner * states,
            conv=taps * conv_width,
            params=hidden * (2 * inner + conv_width),  # x, B, C; gate; out
        )
    if kind == "shortconv":
        window = shape["conv_L_cache"]
        return _LinearLayers(shape["conv_layers"], 0, window * hidden, params=4 * hidden * hidden)
    if kind == "stated":
        state, conv = shape["state_elements"], shape["conv_elements"]
        return _LinearLayers(shape["linear_layers"], state, conv, params=0)
    if kind == "none":
        return _LinearLayers(0, 0, 0, 0)
    raise ValueError(f"linear layers of unknown kind {kind!r}")


def _kv_row(shape: Shape) -> int:
    """Numbers that one token leaves in one full-attention layer."""
    if "mla_kv_lora_rank" in shape:
        return int(shape["mla_kv_lora_rank"] + shape["mla_qk_rope_head_dim"])
    return int(2 * shape["kv_heads"] * shape["head_dim"])


def _num_heads(shape: Shape) -> int:
    return int(shape.get("attn_heads") or shape["hidden"] // shape["head_dim"])


def _pair_flops(shape: Shape) -> int:
    """FLOPs of one query-key pair in one full-attention layer: 2 for QK and 2 for PV, a head and a
    dimension."""
    if "mla_kv_lora_rank" in shape:
        # Expanded form: 128 content + rope dimensions for keys, 128 for values.
        return _num_heads(shape) * 2 * (2 * 128 + int(shape["mla_qk_rope_head_dim"]))
    return 4 * _num_heads(shape) * int(shape["head_dim"])


def _params(shape: Shape, linear_layer_params: int) -> tuple[int, int]:
    """(weights that one token meets, weights in all), embeddings excluded; published figures where
    a shape states them."""
    if "active_params" in shape:
        return int(shape["active_params"]), int(shape["total_params"])
    hidden, heads = shape["hidden"], _num_heads(shape)
    if "mla_kv_lora_rank" in shape:
        rank, rope = shape["mla_kv_lora_rank"], shape["mla_qk_rope_head_dim"]
        attention = hidden * heads * (128 + rope) + hidden * (rank + rope)
        attention += rank * heads * 256 + heads * 128 * hidden
    else:
        width = heads * shape["head_dim"]
        queries = 2 if shape.get("attention_gate") else 1
        attention = hidden * ((queries + 1) * width + 2 * shape["kv_heads"] * shape["head_dim"])
    mixers = shape["full_attn_layers"] * attention
    mixers += _linear_layers(shape).num_layers * linear_layer_params
    ffn_layers = shape.get("ffn_layers", shape["num_layers"])
    matrices = shape.get("ffn_matrices", 3)
    experts = shape.get("experts", 0)
    if not experts:
        dense = matrices * hidden * shape.get("intermediate", 0) * ffn_layers
        return mixers + dense, mixers + dense
    expert_hidden = shape.get("moe_hidden", hidden)
    expert = matrices * expert_hidden * shape.get("moe_intermediate", 0)
    narrowing = 2 * hidden * expert_hidden if expert_hidden != hidden else 0
    shared = shape.get("shared_expert_intermediate", 0) or shape.get(
        "shared_experts", 0
    ) * shape.get("moe_intermediate", 0)
    always = mixers + ffn_layers * (matrices * hidden * shared + hidden * experts + narrowing)
    active = always + ffn_layers * shape["topk"] * expert
    return active, always + ffn_layers * experts * expert


def _refuse_unknown(**dtypes: str) -> None:
    for name, word in dtypes.items():
        if word not in DTYPE_BYTES:
            raise ValueError(f"{name} {word!r} is none of {', '.join(DTYPE_BYTES)}")
