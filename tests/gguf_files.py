"""Writer of GGUF files from checkpoints of Hugging Face, as llama.cpp's converter writes them.

Names come from the package ``gguf``. It is an argument, because the benchmark has its own copy.
Source: ``conversion/*.py`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from hybridcache.geometry.families import read, text_part

ARCHITECTURES = {
    "qwen3": "QWEN3",
    "qwen3_next": "QWEN3NEXT",
    "qwen3_5": "QWEN35",
    "qwen3_5_text": "QWEN35",
    "qwen3_5_moe": "QWEN35MOE",
    "qwen3_5_moe_text": "QWEN35MOE",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2MOE",
    "granitemoehybrid": "GRANITE_HYBRID",
    "nemotron_h": "NEMOTRON_H",
    "falcon_h1": "FALCON_H1",
    "jamba": "JAMBA",
    "kimi_linear": "KIMI_LINEAR",
}
"""Architecture of the package, by ``model_type``."""
SIGMOID = 2
"""Value of ``expert_gating_func`` for routers by sigmoids."""
COMMON = {
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps norm_eps layer_norm_epsilon",
    "expert_count": "num_experts num_local_experts n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "moe_latent_size": "moe_latent_size",
    "leading_dense_block_count": "num_dense_layers",
    "shortconv.l_cache": "conv_L_cache",
    "ssm.conv_kernel": "mamba_d_conv conv_kernel linear_conv_kernel_dim",
    "ssm.state_size": "mamba_d_state ssm_state_size linear_key_head_dim",
    "ssm.group_count": "mamba_n_groups n_groups linear_num_key_heads",
    "ssm.time_step_rank": "mamba_n_heads mamba_num_heads mamba_dt_rank linear_num_value_heads",
    "kda.head_dim": "linear_head_dim",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attention.scale": "attention_multiplier",
}
"""Metadata with the value of the first of some keys of config.json."""
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
HEAD = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
HEAD |= {"norm": "shared_head_norm"}
"""Names of Qwen's multi-token head outside its layer."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens."""

ZERO_BYTE = "\u0100"
"""Text of the token of a zero byte."""

Tensors = Iterator[tuple[str, torch.Tensor]]


def write_gguf(
    gguf: ModuleType,
    model_dir: Path,
    path: Path,
    kind: str = "F32",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint in ``model_dir`` to ``path``.

    Matrices are stored as ``kind``: F32, F16, BF16, Q8_0, Q4_0 or another type that the package
    writes; as F16 if their rows are no whole blocks. ``extra`` has further metadata.
    """
    raw = json.loads((model_dir / "config.json").read_text())
    config = text_config(raw)
    architecture = getattr(gguf.MODEL_ARCH, _architecture(config))
    arch = gguf.MODEL_ARCH_NAMES[architecture]
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        tensors |= load_file(file)
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    has_head = any(name.startswith("mtp.") for name in tensors)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**metadata(arch, config, has_head), **(extra or {})}.items():
        kind_of_value = gguf.GGUFValueType.get_type(value)
        if kind_of_value == gguf.GGUFValueType.INT32:  # llama.cpp reads no signed sizes.
            kind_of_value = gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, kind_of_value)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"] + 1)
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    for name, tensor in stacked(changed(arch, config, tensors)):
        own = name if "nextn" in name else names.get_name(name, (".weight", ".bias"))
        if own is None:
            raise ValueError(f"files of the architecture {arch} have no place for {name}.")
        values, format = np.ascontiguousarray(tensor.float().numpy()), wanted
        if tensor.ndim == 1 or not is_matrix(own):
            format = gguf.GGMLQuantizationType.F32
        elif tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            format = gguf.GGMLQuantizationType.F16
        stored = gguf.quants.quantize(values, format)
        writer.add_tensor(own, stored, raw_dtype=format)
    finish(writer)


def finish(writer: Any) -> None:
    """Write the file of a ``GGUFWriter`` with what was added to it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(folder: Path, pre: str) -> dict[str, Any]:
    """Return the metadata of a byte-level ``tokenizer.json``, whose words are split as ``pre``
    says: ``qwen2``, ``llama-bpe`` or another kind of llama.cpp."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids: dict[str, int] = dict(raw["model"]["vocab"])
    special = {token["content"]: token for token in raw["added_tokens"]}
    ids |= {text: token["id"] for text, token in special.items()}
    config = json.loads((folder / "config.json").read_text())
    size = max(text_part(config)["vocab_size"], max(ids.values()) + 1)
    tokens, types = [f"[PAD{token_id}]" for token_id in range(size)], [UNUSED] * size
    for text, token_id in ids.items():
        tokens[token_id], types[token_id] = text, NORMAL
        if text in special:
            is_control = special[text]["special"] or (text[:2], text[-2:]) == ("<|", "|>")
            types[token_id] = CONTROL if is_control else USER_DEFINED
    merges = [one if isinstance(one, str) else " ".join(one) for one in raw["model"]["merges"]]
    found: dict[str, Any] = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
    if not merges and UNUSED in types:  # llama.cpp needs one: two zero bytes, which no text has.
        spare, merges = types.index(UNUSED), [f"{ZERO_BYTE} {ZERO_BYTE}"]
        tokens[spare], types[spare] = 2 * ZERO_BYTE, NORMAL
    found |= {"merges": merges} if merges else {}
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        found |= {f"{name}_token_id": ids[token]} if token in ids else {}
    if "add_bos_token" in settings:
        found["add_bos_token"] = settings["add_bos_token"]
    made = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = folder / "chat_template.jinja"
    source = template.read_text() if template.exists() else settings.get("chat_template")
    return made | ({"tokenizer.chat_template": source} if source else {})


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text part of a config.json with all defaults."""
    _, config = read(text_part(raw))
    assert config is not None
    return {**config.data, "model_type": text_part(raw)["model_type"]}


def _architecture(config: Mapping[str, Any]) -> str:
    name = ARCHITECTURES[config["model_type"]]
    if name == "QWEN3NEXT" and not config["num_experts"]:
        return "QWEN35"  # The same layers.
    is_sparse = "moe" in (config.get("layers_block_type") or ())
    return f"{name}_MOE" if name == "NEMOTRON_H" and is_sparse else name


def metadata(arch: str, config: Mapping[str, Any], has_head: bool) -> dict[str, Any]:
    """Return the metadata of a model."""
    found: dict[str, Any] = {}
    for key, words in COMMON.items():
        value = next((config[word] for word in words.split() if config.get(word) is not None), None)
        found |= {} if value is None else {key: value}
    if not found.get("expert_count"):
        found = {key: value for key, value in found.items() if not key.startswith("expert")}
    kinds = config.get("layers_block_type") or config.get("layer_types") or ()
    if arch == "jamba":
        period, offset = config["attn_layer_period"], config["attn_layer_offset"]
        layers = range(config["num_hidden_layers"])
        kinds = ["full_attention" if layer % period == offset else "" for layer in layers]
        found["ssm.inner_size"] = config["mamba_expand"] * config["hidden_size"]
    elif "ssm.time_step_rank" in found:
        words = "mamba_d_head", "mamba_head_dim", "linear_value_head_dim"
        dim = next(config[word] for word in words if word in config)
        found["ssm.inner_size"] = found["ssm.time_step_rank"] * dim
    rope = {**config, **(config.get("rope_parameters") or {})}
    if rope.get("rope_theta"):
        found["rope.freq_base"] = float(rope["rope_theta"])
    if arch.startswith("qwen3") and arch != "qwen3":
        part = rope.get("partial_rotary_factor") or 0.25
        found["rope.dimension_count"] = int(config["head_dim"] * part)
        found["rope.dimension_sections"] = [11, 11, 10, 0]  # For images. Text has one position.
        recurrent = [kind == "linear_attention" for kind in kinds]
        found["attention.recurrent_layers"] = [*recurrent, *([False] * has_head)]
    elif arch not in ("qwen3", "falcon-h1"):
        count = 1 if arch == "kimi-linear" else found["attention.head_count_kv"]
        attends = [count if kind == "full_attention" else 0 for kind in kinds]
        found["attention.head_count_kv"] = attends
    if arch.startswith("nemotron_h"):
        found["attention.layer_norm_epsilon"] = found["attention.layer_norm_rms_epsilon"]
        sizes = {"mlp": config["intermediate_size"], "moe": config.get("moe_intermediate_size")}
        found["feed_forward_length"] = [sizes.get(kind, 0) for kind in kinds]
        if "moe" not in kinds:
            found = {key: value for key, value in found.items() if not key.startswith("expert")}
    if arch in ("kimi-linear", "lfm2moe", "nemotron_h_moe"):
        found["expert_gating_func"] = SIGMOID
    if arch == "falcon-h1":
        del found["embedding_scale"]  # It is in the weights.
    if arch == "granitehybrid":
        found["rope.scaling.finetuned"] = config["position_embedding_type"] == "rope"
    if arch == "kimi-linear":
        dims = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        found["attention.key_length_mla"] = dims
        rank = config["kv_lora_rank"]
        found["attention.value_length"] = rank
        found["attention.key_length"] = rank + config["qk_rope_head_dim"]
        found["leading_dense_block_count"] = config["mlp_layer_types"].count("dense")
    if has_head:
        found |= {"block_count": config["num_hidden_layers"] + 1, "nextn_predict_layers": 1}
    return {f"{arch}.{key}": value for key, value in found.items()}


def changed(
    arch: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint as the converter changes them, with names that the package
    knows."""
    for published, tensor in tensors.items():
        name = published.replace("model.language_model.", "model.").replace(
            "model.visual", "visual"
        )
        if name.startswith("visual."):
            continue
        if name.startswith("mtp.layers.0."):
            name = name.replace("mtp.layers.0", f"model.layers.{config['num_hidden_layers']}")
        elif name.startswith("mtp."):
            word = HEAD[name.split(".")[1]]
            name = f"blk.{config['num_hidden_layers']}.nextn.{word}.weight"
        if arch.startswith("qwen3") and arch != "qwen3":
            yield from _qwen(arch, config, name, tensor.float())
        else:
            other = OTHERS.get(arch)
            yield from other(config, name, tensor.float()) if other else [(name, tensor.float())]


def _qwen(arch: str, config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    """Undo the interleaving of Qwen3-Next. Tile the value heads of Qwen3.5, which are grouped by
    key head."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    group = values // keys
    stem, part = name.rsplit(".linear_attn.", 1) if ".linear_attn." in name else (name, "")
    part = part.removesuffix(".weight")
    if name.endswith("norm.weight") and part != "norm":
        tensor = tensor + 1
    elif part == "conv1d":
        tensor = tensor.squeeze(1)
    elif part == "A_log":
        tensor = -tensor.exp()
    found = {part: tensor}
    if part == "in_proj_qkvz":
        widths = [key_dim, key_dim, group * dim, group * dim]
        *qkv, z = (
            kind.flatten(0, 1) for kind in tensor.view(keys, sum(widths), -1).split(widths, 1)
        )
        found = {"in_proj_qkv": torch.cat(qkv), "in_proj_z": z}
    elif part == "in_proj_ba" and arch != "qwen3next":
        pairs = tensor.view(keys, 2 * group, -1).split(group, 1)
        found = {
            f"in_proj_{word}": one.flatten(0, 1) for word, one in zip("ba", pairs, strict=True)
        }
    elif part == "":
        yield from _halves(name, tensor, "gate_up_proj", "gate_proj", "up_proj")
        return
    for word, one in found.items():
        if arch != "qwen3next":
            one = _tiled(word, one, keys, values, 2 * keys * key_dim, dim)
        ending = "" if word == "A_log" else ".weight"
        word = {"dt_bias": "dt_proj", "A_log": "A_log"}.get(word, word)
        yield f"{stem}.linear_attn.{word}{'.bias' if word == 'dt_proj' else ending}", one


def _tiled(
    part: str, tensor: torch.Tensor, keys: int, values: int, num_others: int, dim: int
) -> torch.Tensor:
    order = torch.arange(values).view(keys, -1).T.flatten()
    rows = (order[:, None] * dim + torch.arange(dim)).flatten()
    if part in ("in_proj_b", "in_proj_a", "A_log", "dt_bias"):
        return tensor[order]
    if part == "in_proj_z":
        return tensor[rows]
    if part in ("in_proj_qkv", "conv1d"):
        return torch.cat([tensor[:num_others], tensor[num_others:][rows]])
    return tensor[:, rows] if part == "out_proj" else tensor


def _halves(name: str, tensor: torch.Tensor, whole: str, *parts: str) -> Tensors:
    """Split a fused input; other tensors stay as they are."""
    if whole not in name:
        yield name, tensor
        return
    for part, half in zip(parts, tensor.chunk(2, dim=-2), strict=True):
        yield name.replace(whole, part), half


def _mamba(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    if name.endswith(("A_log", ".D")):
        tensor = tensor[:, None]
    elif name.endswith("conv1d.weight"):
        tensor = tensor.squeeze(1)
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        tensor = tensor.view(config.get("mamba_n_groups") or config["n_groups"], -1)
    yield name.replace(".dt_bias", ".dt_proj.bias"), tensor


def _rotated(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put the two dimensions of a rotated pair next to each other."""
    for word, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if word in name:
            heads = tensor.view(config[key], 2, -1, *tensor.shape[1:])
            return heads.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _granite(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    is_dense = not config["num_local_experts"]
    for own, part in _mamba(config, name, _rotated(config, name, tensor)):
        stem = own.rsplit(".", 2)[0]
        if "block_sparse_moe" in own:
            stem = stem.replace("block_sparse_moe", "mlp.experts")
        elif "shared_mlp" in own:
            stem = stem.replace("shared_mlp", "mlp" if is_dense else "mlp.shared_expert")
        if own.endswith("output_linear.weight"):
            yield f"{stem}.down_proj.weight", part
        elif own.endswith("input_linear.weight"):
            for word, half in zip(("gate", "up"), part.chunk(2, dim=-2), strict=True):
                yield f"{stem}.{word}_proj.weight", half
        else:
            yield own, part


def _nemotron(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    for own, part in _mamba(config, name, _rotated(config, name, tensor)):
        yield own.replace("e_score_correction_bias", "e_score_correction.bias"), part


def _falcon(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    """Multiply the weights, so that no multiplier remains."""
    gate, down = config["mlp_multipliers"]
    inputs = config["attention_in_multiplier"]
    factors = {
        "self_attn.q_proj": inputs,
        "self_attn.k_proj": inputs * config["key_multiplier"],
        "self_attn.v_proj": inputs,
        "self_attn.o_proj": config["attention_out_multiplier"],
        "feed_forward.gate_proj": gate,
        "feed_forward.down_proj": down,
        "mamba.out_proj": config["ssm_out_multiplier"],
        "mamba.in_proj": config["ssm_in_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }
    for part, factor in factors.items():
        tensor = tensor * factor if part in name else tensor
    if "mamba.in_proj" in name:
        inner = config["mamba_n_heads"] * config["mamba_d_head"]
        state = config["mamba_n_groups"] * config["mamba_d_state"]
        widths = [inner, inner, state, state, config["mamba_n_heads"]]
        each = zip(tensor.split(widths), config["ssm_multipliers"], strict=True)
        tensor = torch.cat([part * factor for part, factor in each])
    yield from _mamba(config, name, tensor)


def _jamba(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    yield name, tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor


def _lfm2(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    tensor = tensor.squeeze(1) if "conv.conv.weight" in name else tensor
    yield name.replace(".expert_bias", ".expert_bias.bias"), tensor


def _kimi(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> Tensors:
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    elif "_conv1d" in name:
        tensor = tensor.view(1, len(tensor), 1, -1)
    if "kv_b_proj" in name:
        dims = config["qk_nope_head_dim"], config["v_head_dim"]
        keys, values = tensor.view(config["num_attention_heads"], sum(dims), -1).split(dims, dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.mT
        yield name.replace("kv_b_proj", "v_b_proj"), values
        return
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    yield name.replace(".dt_bias", ".dt_proj.bias"), tensor


OTHERS: Mapping[str, Callable[[Mapping[str, Any], str, torch.Tensor], Tensors]] = {
    "granitehybrid": _granite,
    "nemotron_h": _nemotron,
    "nemotron_h_moe": _nemotron,
    "falcon-h1": _falcon,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2,
    "kimi-linear": _kimi,
}
"""Changes by architecture."""


def stacked(tensors: Tensors) -> Tensors:
    """Stack the experts of each layer."""
    experts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        found = EXPERT.fullmatch(name)
        if found is None:
            stem, dot, word = name.rpartition(".experts.")
            known = word.removesuffix(".weight")
            if dot and known in EXPERT_PARTS.values():  # A stack already.
                name = f"model.layers.{stem.split('.')[2]}.mlp.experts.{known}.weight"
            yield name, tensor
            continue
        word = EXPERT_PARTS.get(found[3], found[3])
        name = f"model.layers.{found[1].split('.')[2]}.mlp.experts.{word}.weight"
        experts[name][int(found[2])] = tensor
    for name, each in experts.items():
        yield name, torch.stack([each[expert] for expert in range(len(each))])


VECTORS = re.compile(r".*(ssm_conv1d|ssm_norm|ssm_a|ssm_d|shortconv\.conv|ffn_gate_inp).*")


def is_matrix(name: str) -> bool:
    """Return True if the converter stores a tensor in the type of the file, and not in float32."""
    return name.endswith(".weight") and VECTORS.fullmatch(name) is None
