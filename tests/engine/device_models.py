"""Models for tests of a device: geometries, and model directories that the engine can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.config import BUILTIN_DIR
from engine.models import read_model
from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.weights.checkpoint import Dummy
from engine.weights.parameters import Build, Parameter, WeightSpec

QWEN3_NEXT_80B: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000.0,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""Qwen3-Next-80B-A3B."""

DENSE_2B: dict[str, Any] = QWEN3_NEXT_80B | {"num_hidden_layers": 24, "num_experts": 0}
"""Half the layers of Qwen3-Next-80B-A3B, with dense MLPs: about 2 billion parameters."""

SMALL: dict[str, Any] = QWEN3_NEXT_80B | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_experts": 16,
}
"""All kinds of layers and the head sizes of the large one, with 4 layers and 16 experts.

Has 0.4 GB, which the CPU computes in a second or two.
"""

SMALL_DENSE: dict[str, Any] = SMALL | {"num_experts": 0}
"""Geometry for comparisons in bfloat16. Routing could flip near-equal experts by rounding."""

TINY: dict[str, Any] = QWEN3_NEXT_80B | {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 1024,
    "dtype": "float32",
}
"""Geometry for the interpreter."""


def write_geometry(directory: Path, config: dict[str, Any]) -> str:
    """Write a model directory without weights, for ``load_format="dummy"``. Returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def write_tokenizer(directory: Path) -> None:
    """Copy the tokenizer of the built-in model, with one token per byte, as a server requires
    one."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUILTIN_DIR / name, directory)


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int = 0) -> str:
    """Write a model directory with seeded weights, the same for every device. Returns its path."""
    path = write_geometry(directory, config)
    family, shape = read_model(config)
    outline = WeightSpec(torch.device("meta"), torch.float32)
    kernels = Kernels(Device.resolve("cpu"))
    plan = family(shape, Build(kernels, outline))
    dummy = Dummy(seed)
    tensors = {}
    for name, parameter in plan.parameters():
        tensors[name] = torch.empty(parameter.target.shape)
        dummy.draw(name, Parameter(tensors[name], parameter.role))
    save_file(tensors, directory / "model.safetensors")
    return path
