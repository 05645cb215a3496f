"""Writer of quantised checkpoints in published layouts, with the weights that they mean.

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
Section = dict[str, Any]
Made = tuple[Tensors, torch.Tensor]
"""Tensors of a module by the last part of their names, and its weight in float32."""
GROUP = 32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

QUANTIZED = re.compile(
    r".*(in_proj_qkvz|in_proj_qkv|in_proj_z|out_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)$"
)
"""Modules that Qwen's fp8 checkpoints quantise."""


def fp8_blocks(
    weight: torch.Tensor, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16
) -> Made:
    """Quantise a weight block by block."""
    rows, columns = (-(-n // size) for n, size in zip(weight.shape, block, strict=True))
    scale = torch.empty(rows, columns, dtype=dtype)
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
    return {"weight": stored, "weight_scale_inv": scale}, widened


def int8_channels(weight: torch.Tensor) -> Made:
    """Quantise a weight with one scale per row, ``[M, 1]``."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def coded(
    weight: torch.Tensor, *, zeros: bool, dtype: torch.dtype, group: int = GROUP
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [M, N], scales and zeros [M, G], and the weight that they mean. The last group
    of a row may be smaller."""
    count = weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -count % group)).unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15 if zeros else groups.abs().amax(-1) / 7).to(dtype)
    zero = (-low / scale.float()).round().clamp(1, 15) if zeros else torch.full_like(low, 8)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    meant = (codes - zero[..., None]) * scale.float()[..., None]
    return (
        codes.flatten(1)[:, :count].int(),
        scale,
        zero.int(),
        meant.flatten(1)[:, :count].contiguous(),
    )


def words(
    numbers: torch.Tensor, order: tuple[int, ...] | None = None, bits: int = 4
) -> torch.Tensor:
    """Pack eight or four numbers of the last dimension into an int32; ``order`` has the number of
    each place. The last word may have fewer."""
    count = 32 // bits
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[-1] % count))
    each = padded.unflatten(-1, (-1, count))
    packed = sum(each[..., n] << bits * place for place, n in enumerate(order or range(count)))
    assert isinstance(packed, torch.Tensor)
    return packed.int()  # The highest bit becomes the sign.


def gptq(weight: torch.Tensor, zeros: bool = False) -> Made:
    codes, scale, zero, meant = coded(weight, zeros=zeros, dtype=torch.float16)
    tensors = {
        "qweight": words(codes).T,
        "qzeros": words(zero.T - 1),
        "scales": scale.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, meant


def awq(weight: torch.Tensor) -> Made:
    codes, scale, zero, meant = coded(weight, zeros=True, dtype=torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed = {"qweight": words(codes.T, order), "qzeros": words(zero.T, order)}
    return packed | {"scales": scale.T}, meant


def compressed(weight: torch.Tensor, zeros: bool = False, group: int = GROUP) -> Made:
    codes, scale, zero, meant = coded(weight, zeros=zeros, dtype=torch.bfloat16, group=group)
    tensors = {
        "weight_packed": words(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors | ({"weight_zero_point": words(zero.T).T} if zeros else {}), meant


def mxfp4(weight: torch.Tensor) -> Made:
    groups = weight.unflatten(1, (-1, GROUP))
    exponent = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups * (-exponent).exp2()[..., None]
    size = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    meant = E2M1[size] * scaled.sign() * exponent.exp2()[..., None]
    low, high = (size + 8 * (scaled < 0)).flatten(1).unflatten(1, (-1, 2)).unbind(-1)
    packed = {"weight_packed": (low + 16 * high).to(torch.uint8)}
    return packed | {"weight_scale": (exponent + 127).to(torch.uint8)}, meant.flatten(1)


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
    make: Callable[[torch.Tensor], Made],
    section: Callable[[list[str]], Section],
    *,
    prefix: str = "model.",
    group: int = 1,
) -> Path:
    """Quantise the checkpoint at ``path`` and write the weights that it means to another directory.

    ``section`` returns the part of config.json for the full names of the unquantised modules, which
    include those whose sizes are no multiples of ``group``. Returns the path of the second
    directory.
    """
    tensors = split_experts(load_file(path / "model.safetensors"))
    stored, meant, exceptions = {}, {}, []
    for name, tensor in tensors.items():
        name = name.replace("model.", prefix, 1)
        module, _, word = name.rpartition(".")
        is_whole = tensor.ndim == 2 and not any(size % group for size in tensor.shape)
        if word == "weight" and QUANTIZED.fullmatch(module) and is_whole:
            made, meant[name] = make(tensor)
            stored |= {f"{module}.{own}": part.contiguous() for own, part in made.items()}
        else:
            stored[name] = meant[name] = tensor
            exceptions += [module] if word == "weight" else []
    assert len(stored) > len(meant)
    plain = path.with_name(path.name + "_meant")
    plain.mkdir()
    config = json.loads((path / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config))
    save_file(meant, plain / "model.safetensors")
    save_file(stored, path / "model.safetensors")
    config |= {"quantization_config": section(exceptions)}
    (path / "config.json").write_text(json.dumps(config))
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
    ignore: list[str], layout: str = "int-quantized", **weights: Any
) -> dict[str, Any]:
    """Return ``quantization_config`` as llm-compressor writes it: for W8A8, or for ``weights`` of
    another layout in groups."""
    group: Section = {"targets": ["Linear"], "output_activations": None}
    if layout == "int-quantized":
        shared = {"num_bits": 8, "type": "int", "symmetric": True}
        group["weights"] = {**shared, "strategy": "channel", "dynamic": False} | weights
        group["input_activations"] = {**shared, "strategy": "token", "dynamic": True}
    else:
        grouped = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        group["weights"] = grouped | weights
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "version": "0.14.0",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "quantization_status": "compressed",
    }
