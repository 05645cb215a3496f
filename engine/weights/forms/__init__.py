"""Descriptions of quantised checkpoints, one file for each kind. A file has

- ``METHOD``: its ``quant_method`` in ``quantization_config`` of a config.json;
- ``SERVED``: the supported part of it, for errors;
- ``read(section, tensors)``: reads that section, with the tensors of all files by name, and returns
  the formats. Raises ModelError, or the errors of a value with the wrong type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from engine.weights.layer_names import MODEL_SLIM_FILE
from engine.weights.model_config import ModelError, RawConfig
from engine.weights.scheme import Quantization, Section, UnsupportedError
from hybridcache.geometry.families import defined

Read = Callable[[Section, Mapping[str, torch.Tensor]], Quantization | None]


@cache
def readers() -> dict[str, tuple[Read, str]]:
    """Map each ``METHOD`` to its reader, and to the supported part of it."""
    files = defined(__name__, "METHOD")
    return {method: (file.read, file.SERVED) for file, method in files}


OWN_FILES = (
    ("quantize_config.json", "gptq"),
    ("quant_config.json", "awq"),
    ("hf_quant_config.json", "modelopt"),
)
"""Files of AutoGPTQ, AutoAWQ and ModelOpt beside a config.json without a section, with their
method."""
PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
"""Ends of the names of tensors that only quantised weights have."""


def read_quantization(
    config: RawConfig,
    model_dir: Path | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Quantization | None:
    """Read the formats of a checkpoint's weights from its ``config.json``, or a file beside it.

    That is a file of AutoGPTQ, AutoAWQ or ModelSlim. ``tensors`` are those of the weight files.
    Returns None if no weight is quantised. Raises ModelError, also for unsupported formats, and for
    quantised weights without a description.
    """
    place, section = _described(config, model_dir, tensors or {})
    if section is None:
        return _undescribed(model_dir, tensors or {})
    if not isinstance(section, Mapping):
        raise ModelError(f"{place} must be an object.")
    method = str(section.get("quant_method", section.get("quant_algo", ""))).lower()
    served = ", ".join(served for _, served in readers().values())
    remedy = (
        f"supported are {served}, ModelSlim's W8A8_DYNAMIC, GGUF files, and the model in full "
        "precision with --quantization"
    )
    if method == "mxfp4":
        raise ModelError(
            "MXFP4 weights in `_blocks` and `_scales` are the form of gpt-oss, whose architecture "
            "is not supported: for other models use MXFP4 in compressed-tensors "
            "(mxfp4-pack-quantized) or in a GGUF file."
        )
    if method not in readers():
        raise ModelError(f"{method or 'unnamed'} weights are not supported; {remedy}.")
    try:
        return readers()[method][0](section, tensors or {})
    except UnsupportedError as error:
        raise ModelError(f"{error} is not supported; {remedy}.") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{place} lacks a value, or one has the wrong type: {error}.") from None


def _described(
    config: RawConfig, model_dir: Path | None, tensors: Mapping[str, torch.Tensor]
) -> tuple[str, object]:
    """Return the description of the weights after its place, or None if there is none."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    if section := config.get("quantization_config") or nested:
        return "quantization_config in config.json", section
    is_packed = any(name.endswith(PACKED) for name in tensors)
    for name, method in OWN_FILES:
        if model_dir is not None and is_packed and (path := model_dir / name).is_file():
            try:
                section = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise ModelError(f"{name} is not valid JSON: download it again.") from None
            return name, {"quant_method": method} | section if isinstance(
                section, dict
            ) else section
    return "", None


def _undescribed(
    model_dir: Path | None, tensors: Mapping[str, torch.Tensor]
) -> Quantization | None:
    """Return the formats by ModelSlim's file, or None for weights in full precision."""
    from engine.weights.forms.model_slim import read_description

    found = None if model_dir is None else read_description(model_dir / MODEL_SLIM_FILE)
    packed = next((name for name in tensors if name.endswith(PACKED)), None)
    if found is None and packed is not None:
        raise ModelError(
            f"{packed} is of a quantised model, and neither config.json (quantization_config) nor "
            "a file beside it (quantize_config.json, quant_config.json, "
            f"{MODEL_SLIM_FILE}) describes its form: download the missing file."
        )
    return found
