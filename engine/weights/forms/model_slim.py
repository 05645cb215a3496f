"""The form of Ascend's ModelSlim, which lists the kind of every tensor in a file of its own."""

from __future__ import annotations

import json
from pathlib import Path

from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from engine.weights.scheme import EightBitScheme, Quantization


def read_description(path: Path) -> Quantization | None:
    """Read Ascend's file with the kind of every tensor: FLOAT, W8A8_DYNAMIC ..."""
    if not path.is_file():
        return None
    try:
        kinds = json.loads(path.read_text(encoding="utf-8"))
        listed = {
            name.removesuffix(".weight"): kind
            for name, kind in kinds.items()
            if name.endswith(".weight") and isinstance(kind, str)
        }
    except (ValueError, AttributeError):
        raise ModelError(f"{path.name} is not a valid description of weights.") from None
    for module, kind in listed.items():
        if kind not in ("FLOAT", "W8A8_DYNAMIC"):
            raise ModelError(
                f"{module} is {kind} in {path.name}, which is not supported; W8A8_DYNAMIC is, and "
                "the model in full precision with --quantization int8 or fp8."
            )
    quantized = Names.of(module for module, kind in listed.items() if kind == "W8A8_DYNAMIC")
    if not quantized.names:
        return None
    scheme = EightBitScheme("int8", (1, None), "weight_scale")
    return Quantization(((scheme, quantized),), Names.of(()))
