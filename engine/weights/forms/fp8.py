"""The form of DeepSeek and Qwen: e4m3 with a scale for each block."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.weights.layer_names import Names
from engine.weights.scheme import EightBitScheme, Quantization, Section, block_size, check_served

METHOD, SERVED = "fp8", "fp8 in blocks"


def read(section: Section, tensors: Mapping[str, torch.Tensor]) -> Quantization:
    """Read the section. Without a list of exceptions everything except the head is in 8 bits, as in
    Qwen3's dense models."""
    check_served("fp8 weights", section, {"fmt": ("e4m3",), "activation_scheme": ("dynamic",)})
    size = section.get("weight_block_size")
    key = "ignored_layers" if "ignored_layers" in section else "modules_to_not_convert"
    scheme = EightBitScheme("fp8", block_size(size, "weight_block_size"), "weight_scale_inv")
    ignored = Names.of(section.get(key) or ("lm_head",), anywhere=True)
    return Quantization(((scheme, None),), ignored)
