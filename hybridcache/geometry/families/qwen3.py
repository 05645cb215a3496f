"""Qwen3, dense: attention in every layer."""

from __future__ import annotations

from hybridcache.geometry.config_format import ROPE_KEYS, Config, Entry, Schema, Values
from hybridcache.geometry.families import fields
from hybridcache.geometry.sizes import ModelSizes


def complete(values: Values) -> None:
    """Build ``layer_types``: the last layers use a window if ``use_sliding_window`` is set."""
    window, first = values.pop("sliding_window"), values.pop("max_window_layers")
    has_windows = values.pop("use_sliding_window") and window is not None
    if values["layer_types"] is None:
        values["layer_types"] = [
            "sliding_attention" if has_windows and layer >= first else "full_attention"
            for layer in range(fields.num_layers(values))
        ]


FORMATS = {
    "qwen3": Schema(
        fields.decoder(
            vocab_size=151936,
            intermediate_size=22016,
            num_key_value_heads=Entry(int | None, 32),
            head_dim=128,
            max_position_embeddings=32768,
            attention_bias=False,
            use_sliding_window=False,
            sliding_window=Entry(int | None, 4096),
            max_window_layers=28,
            layer_types=Entry(list[str] | None),
        ),
        extras=ROPE_KEYS,
        complete=complete,
    )
}


def sizes(config: Config) -> ModelSizes:
    mixers = dict.fromkeys(("full_attention", "sliding_attention"), fields.attention(config))
    return fields.by_type(config, mixers, fields.dense(config))
