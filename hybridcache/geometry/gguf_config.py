"""Models in GGUF files: the contents of a ``config.json``, from metadata and shapes of tensors.

Source: ``conversion/*.py`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np

from hybridcache.geometry.config_format import Values
from hybridcache.geometry.gguf import GgufFile, StoredTensor
from hybridcache.geometry.sizes import MOST_LAYERS, ModelError

BLOCK_NAME = re.compile(r"blk\.(\d{1,5})\.(.+)")
KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps norm_eps layer_norm_epsilon",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_experts num_local_experts n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "norm_top_k_prob": "norm_topk_prob",  # Ollama's
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "num_dense_layers first_k_dense_replace",
    "moe_latent_size": "moe_latent_size",
    "rope.dimension_count": "qk_rope_head_dim",
    "shortconv.l_cache": "conv_L_cache",
    "ssm.conv_kernel": "mamba_d_conv conv_kernel linear_conv_kernel_dim",
    "ssm.group_count": "mamba_n_groups n_groups linear_num_key_heads",
    "ssm.inner_size": "mamba_d_ssm",
    "ssm.state_size": "mamba_d_state ssm_state_size linear_key_head_dim",
    "ssm.time_step_rank": "mamba_n_heads mamba_num_heads mamba_dt_rank linear_num_value_heads",
}
"""Metadata of an architecture, and keys of a config.json with the same value."""
REQUIRED = "embedding_length", "context_length", "attention.head_count"
PRESENT = {
    "attn_q.bias": "attention_bias",
    "exp_probs_b.bias": "use_expert_bias",
    "ffn_up.bias": "mlp_bias",
    "shortconv.conv.bias": "conv_bias",
    "ssm_conv1d.bias": "mamba_conv_bias use_conv_bias",
    "ssm_in.bias": "mamba_proj_bias use_bias",
    "ssm_norm.weight": "mamba_rms_norm",
    "ssm_out.bias": "projectors_bias",
}
"""Tensors of a layer, and keys of a config.json that are true if a layer has them."""
ROWS = {
    "ffn_up.weight": "intermediate_size shared_intermediate_size",
    "ffn_up_shexp.weight": "shared_intermediate_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size",
}
"""Tensors of a layer, and keys of a config.json with the number of their rows."""
HEAD_DIMS = "mamba_d_head", "mamba_head_dim", "linear_value_head_dim"
ROPE = {
    "freq_base": "rope_theta",
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
    "scaling.yarn_attn_factor": "attention_factor",
}
ROPE_NEUTRAL = {
    "scaling.attn_factor": (1,),
    "scaling.yarn_log_multiplier": (0,),
    "scaling.yarn_ext_factor": (-1, 1),
}
"""Metadata of a rotary embedding that is not supported, with the values without effect."""


def check_architecture(arch: str, file: str) -> None:
    """Raise ModelError if ``general.architecture`` of a file is not supported."""
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"models of the architecture {arch[:80]!r} in {file} are not supported; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )


class GgufModel:
    """Config of the model in a GGUF file."""

    def __init__(self, file: GgufFile) -> None:
        """Raises ModelError if the architecture is not supported."""
        self.file, self.arch = file, str(file.metadata.get("general.architecture"))
        kind = file.metadata.get("general.type", "mmproj" if self.arch == "clip" else "model")
        if kind != "model":
            raise ModelError(
                f"{file.path.name} is not a model but a file of the kind {str(kind)[:40]!r}: name "
                "the file of the language model."
            )
        check_architecture(self.arch, file.path.name)
        blocks = (BLOCK_NAME.fullmatch(name) for name in file.tensors)
        self._words = {found[2] for found in blocks if found is not None}
        """Names of tensors inside blocks."""
        self.num_heads = self.whole("nextn_predict_layers", 0)
        """Number of blocks of multi-token prediction, after the layers."""
        self.num_layers = self.whole("block_count") - self.num_heads

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of the architecture, or the largest one of a list. Raises ModelError."""
        found = self.file.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(found, np.ndarray) and found.size:
            found = found.max().item()
        if not isinstance(found, int | float) or not math.isfinite(found):
            raise self._refusal(key, "a number", found)
        return found

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a number that is not negative. Raises ModelError."""
        found = self.number(key, default)
        if found != int(found) or not 0 <= found < 2**31:
            raise self._refusal(key, "a count", found)
        return int(found)

    def each(self, key: str) -> list[int]:
        """Return the numbers of all layers, from a list or from one number. Raises ModelError."""
        found = self.file.metadata.get(f"{self.arch}.{key}")
        if not isinstance(found, np.ndarray):
            return [self.whole(key, 0)] * self.num_layers
        if len(found) < self.num_layers or found.dtype.kind == "f":
            raise self._refusal(key, f"{self.num_layers} whole numbers", found)
        return [int(one) for one in found[: self.num_layers]]

    def _refusal(self, key: str, wanted: str, found: object) -> ModelError:
        name = f"{self.arch}.{key} in {self.file.path.name}"
        return ModelError(f"{name} must be {wanted} (got {str(found)[:80]}).")

    def has(self, word: str, block: int | None = None) -> bool:
        """Return True if a block, or the given one, has the tensor."""
        return word in self._words if block is None else f"blk.{block}.{word}" in self.file.tensors

    def _first(self, word: str) -> StoredTensor | None:
        """Return a tensor outside blocks, or that of the first block that has it, or None."""
        names = word, *(f"blk.{block}.{word}" for block in range(self.num_layers))
        return next((self.file.tensors[name] for name in names if name in self.file.tensors), None)

    def rows_of(self, word: str) -> int:
        """Return the number of rows of a tensor. Raises ModelError if it is missing."""
        found = self._first(word)
        if found is None:
            raise ModelError(f"{self.file.path.name} has no tensor {word}.")
        return found.shape[0]

    @cached_property
    def config(self) -> Values:
        """Contents of the model's ``config.json``. Raises ModelError. Keys of other families are
        not read."""
        if not 1 <= self.num_layers <= MOST_LAYERS:
            raise self._refusal("block_count", f"1 to {MOST_LAYERS:,} layers", self.num_layers)
        tensors = self.file.tensors
        is_exact = all(one.type.name == "F32" for one in tensors.values())
        model_type, read_own = ARCHITECTURES[self.arch]
        values: Values = {
            "model_type": model_type,
            "vocab_size": self.rows_of("token_embd.weight"),
            "num_hidden_layers": self.num_layers,
            "tie_word_embeddings": "output.weight" not in tensors,
            "mamba_norm_before_gate": False,
            "dtype": "float32" if is_exact else "bfloat16",
        }
        for key, words in KEYS.items():
            if f"{self.arch}.{key}" in self.file.metadata:
                values |= dict.fromkeys(words.split(), self.number(key))
        for word, names in PRESENT.items():
            values |= dict.fromkeys(names.split(), self.has(word))
        values["attention_bias"] |= self.has("attn_qkv.bias")
        for word, names in ROWS.items():
            if self.has(word):
                values |= dict.fromkeys(names.split(), self.rows_of(word))
        for key in REQUIRED:
            self.number(key)
        heads, inner = self.whole("ssm.time_step_rank", 0), self.whole("ssm.inner_size", 0)
        values |= dict.fromkeys(HEAD_DIMS, inner // heads if heads else 0)
        values["mamba_expand"] = inner // max(1, self.whole("embedding_length"))
        if "head_dim" not in values:
            output = self._first("attn_output.weight")
            width = values["hidden_size"] if output is None else output.shape[-1]
            values["head_dim"] = width // max(1, self.whole("attention.head_count"))
        values |= self._rope()
        return values | (read_own(self, values) if read_own else {})

    def _rope(self) -> Values:
        """Return the keys of a rotary embedding. As in llama.cpp, the type is linear if there is a
        factor and no type, and the factor has an older name. Raises ModelError."""
        metadata, place = self.file.metadata, f"{self.arch}.rope."
        for key, values in ROPE_NEUTRAL.items():
            if f"{place}{key}" in metadata and self.number(f"rope.{key}") not in values:
                raise ModelError(
                    f"{place}{key} {metadata[place + key]} in {self.file.path.name} is not "
                    f"supported; {values[0]} is."
                )
        factor = self.number("rope.scaling.factor", 0) or self.number("rope.scale_linear", 0)
        kind = str(metadata.get(f"{place}scaling.type", "linear"))
        if kind == "none" or (kind == "linear" and factor in (0, 1)):
            kind = "default"
        found: Values = {"rope_type": kind} | ({"factor": factor} if factor else {})
        for key, name in ROPE.items():
            if f"{place}{key}" in metadata:
                found[name] = self.number(f"rope.{key}")
        return {"rope_parameters": found}

    def kinds(self, attention: str, other: str) -> list[str]:
        """Return the type of each layer, by its number of KV heads."""
        return [attention if n else other for n in self.each("attention.head_count_kv")]


# --- Families -------------------------------------------------------------------------------------


def _qwen3_5(model: GgufModel, values: Values) -> Values:
    interval = max(1, model.whole("full_attention_interval", 4))
    linear = [layer % interval > 0 for layer in range(1, model.num_layers + 1)]
    if f"{model.arch}.attention.recurrent_layers" in model.file.metadata:
        linear = [bool(one) for one in model.each("attention.recurrent_layers")]
    dim = max(1, values["head_dim"])
    rope = values["rope_parameters"]
    rope["partial_rotary_factor"] = model.whole("rope.dimension_count", dim // 4) / dim
    kinds = "full_attention", "linear_attention"
    return {"layer_types": [kinds[one] for one in linear], "rope_parameters": rope}


def _granite(model: GgufModel, values: Values) -> Values:
    is_rotated = model.number("rope.scaling.finetuned", True)
    found: Values = {
        "layer_types": model.kinds("attention", "mamba"),
        "position_embedding_type": "rope" if is_rotated else "nope",
    }
    if not model.has("ffn_gate_inp.weight"):
        found |= {"num_local_experts": 0}
    return found


def _nemotron(model: GgufModel, values: Values) -> Values:
    kinds = model.kinds("attention", "mamba")
    for layer in range(model.num_layers):
        for word, kind in (("ffn_up.weight", "mlp"), ("ffn_gate_inp.weight", "moe")):
            kinds[layer] = kind if model.has(word, layer) else kinds[layer]
    return {"layers_block_type": kinds}


def _jamba(model: GgufModel, values: Values) -> Values:
    layers = range(model.num_layers)
    attends = [layer for layer, n in enumerate(model.each("attention.head_count_kv")) if n]
    sparse = [layer for layer in layers if model.has("ffn_gate_inp.weight", layer)]
    found: Values = {} if sparse else {"num_experts": 1}
    for word, own in (("attn", attends), ("expert", sparse)):
        offset = own[0] if own else 0
        period = own[1] - offset if len(own) > 1 else len(layers)
        if own and own != list(layers[offset::period]):
            raise ModelError(f"layers of Jamba with {word} must be at a fixed period (got {own}).")
        if own:
            found |= {f"{word}_layer_period": period, f"{word}_layer_offset": offset}
    return found


def _lfm2(model: GgufModel, values: Values) -> Values:
    kinds = model.kinds("full_attention", "conv")
    return {"layer_types": kinds, "block_auto_adjust_ff_dim": False}


def _kimi(model: GgufModel, values: Values) -> Values:
    kinds = list(enumerate(model.kinds("full", "kda"), start=1))
    rotated = model.whole("rope.dimension_count")
    return {
        "num_key_value_heads": model.whole("attention.head_count"),
        "linear_attn_config": {
            "full_attn_layers": [layer for layer, kind in kinds if kind == "full"],
            "kda_layers": [layer for layer, kind in kinds if kind == "kda"],
            "num_heads": model.rows_of("ssm_beta.weight"),
            "head_dim": model.whole("kda.head_dim"),
            "short_conv_kernel_size": model.whole("ssm.conv_kernel"),
        },
        "qk_nope_head_dim": model.whole("attention.key_length_mla") - rotated,
    }


Reader = Callable[[GgufModel, Values], Values]
ARCHITECTURES: Mapping[str, tuple[str, Reader | None]] = {
    "qwen3": ("qwen3", None),
    # Its inputs are fused in published files. In GGUF they are separate, as in Qwen3.5.
    "qwen3next": ("qwen3_5_moe_text", _qwen3_5),
    "qwen35": ("qwen3_5_text", _qwen3_5),
    "qwen35moe": ("qwen3_5_moe_text", _qwen3_5),
    "lfm2": ("lfm2", _lfm2),
    "lfm2moe": ("lfm2_moe", _lfm2),
    "granitehybrid": ("granitemoehybrid", _granite),
    "nemotron_h": ("nemotron_h", _nemotron),
    "nemotron_h_moe": ("nemotron_h", _nemotron),
    "falcon-h1": ("falcon_h1", None),
    "jamba": ("jamba", _jamba),
    "kimi-linear": ("kimi_linear", _kimi),
}
"""Supported values of ``general.architecture``, each with the ``model_type`` and the reader of the
keys that depend on the layers, if there are any."""
