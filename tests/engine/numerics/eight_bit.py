"""Writer of 8-bit checkpoints in published layouts, with their dequantised weights.

It shares no arithmetic with the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Coded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Stored codes, their scales, and the dequantised weight in float32."""

QUANTIZED = re.compile(
    r".*(in_proj_qkvz|in_proj_qkv|in_proj_z|out_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)$"
)
"""Modules that Qwen's fp8 checkpoints quantise."""


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> Coded:
    """Quantise a weight block by block."""
    rows, columns = (-(-n // size) for n, size in zip(weight.shape, block, strict=True))
    scale = torch.empty(rows, columns, dtype=scale_dtype)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    widened = torch.empty(weight.shape)
    for i in range(rows):
        for j in range(columns):
            tile = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale[i, j] = weight[tile].abs().max() / 400
            stored[tile] = (weight[tile] / scale[i, j].float()).to(torch.float8_e4m3fn)
            widened[tile] = stored[tile].float() * scale[i, j].float()
    return stored, scale, widened


def channels(weight: torch.Tensor, dtype: torch.dtype) -> Coded:
    """Quantise a weight with one scale per row, ``[M, 1]``."""
    largest = 127 if dtype is torch.int8 else 448
    scale = weight.abs().amax(dim=1, keepdim=True) / largest
    scaled = weight / scale
    stored = (scaled.round() if dtype is torch.int8 else scaled).to(dtype)
    return stored, scale, stored.float() * scale


def split_experts(tensors: Tensors) -> Tensors:
    """Split stacked experts into 2-D tensors, as in published 8-bit checkpoints."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or tensor.ndim != 3:
            split[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            if kind == "gate_up_proj":
                gate, up = weight.chunk(2)
                split[f"{stem}.{expert}.gate_proj.weight"] = gate.contiguous()
                split[f"{stem}.{expert}.up_proj.weight"] = up.contiguous()
            else:
                split[f"{stem}.{expert}.down_proj.weight"] = weight.contiguous()
    return split


def stack_experts(tensors: Tensors) -> Tensors:
    """Stack experts, as in Qwen3.5's full-precision checkpoints."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, is_expert, rest = name.partition(".experts.")
        if not is_expert:
            found[name] = tensor
        elif rest == "0.gate_proj.weight":
            count = sum(n.startswith(f"{stem}.experts.") for n in tensors) // 3
            gate, up, down = (
                torch.stack(
                    [tensors[f"{stem}.experts.{e}.{kind}_proj.weight"] for e in range(count)]
                )
                for kind in ("gate", "up", "down")
            )
            found[f"{stem}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            found[f"{stem}.experts.down_proj"] = down
    return found


def rewrite(
    path: Path,
    code: Callable[[torch.Tensor], Coded],
    scale_name: str,
    section: Callable[[list[str]], dict[str, Any]],
    *,
    prefix: str = "model.",
    is_quantized: Callable[[str], object] = QUANTIZED.fullmatch,
) -> Path:
    """Quantise the checkpoint at ``path`` and write its dequantised weights to a second directory.

    ``section`` returns the part of config.json for the full names of the unquantised modules.
    Returns the path of the second directory.
    """
    tensors = {
        name.replace("model.", prefix, 1): tensor
        for name, tensor in split_experts(load_file(path / "model.safetensors")).items()
    }
    stored, widened, exceptions = {}, dict(tensors), []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and is_quantized(module):
            stored[name], stored[f"{module}.{scale_name}"], widened[name] = code(tensor)
        else:
            stored[name] = tensor
            exceptions += [module] if name.endswith(".weight") else []
    plain = path.with_name(path.name + "_widened")
    plain.mkdir()
    config = json.loads((path / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config))
    save_file(widened, plain / "model.safetensors")
    save_file(stored, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps(config | {"quantization_config": section(exceptions)})
    )
    return plain


def fp8_section(exceptions: list[str], block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """Return ``quantization_config`` as in Qwen's checkpoints."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": exceptions,
    }


def compressed_section(
    ignore: list[str], weights: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Return ``quantization_config`` as llm-compressor writes it for W8A8."""
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**shared, "strategy": "channel", "dynamic": False} | (weights or {}),
        "input_activations": {**shared, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "quantization_status": "compressed",
        **more,
    }
