"""Descriptions of quantised checkpoints, one file for each kind. A file has

- ``METHOD``: its ``quant_method`` in ``quantization_config`` of a config.json;
- ``SERVED``: the supported part of it, for errors;
- ``read(section, tensors)``: reads that section, with the tensors of all files by name, and returns
  the formats. Raises ModelError, or the errors of a value with the wrong type.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from engine.weights.layer_names import MODEL_SLIM_FILE
from engine.weights.model_config import ModelError, RawConfig
from engine.weights.scheme import Quantization, Section, UnsupportedError

Read = Callable[[Section, Mapping[str, torch.Tensor]], Quantization | None]


@cache
def readers() -> dict[str, tuple[Read, str]]:
    """Map each ``METHOD`` to its reader, and to the supported part of it."""
    files = [import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    return {file.METHOD: (file.read, file.SERVED) for file in files if hasattr(file, "METHOD")}


def read_quantization(
    config: RawConfig,
    model_dir: Path | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Quantization | None:
    """Read the formats of a checkpoint's weights from its ``config.json``, or else from ModelSlim's
    file in its directory. ``tensors`` are those of its files.

    Returns None if no weight is quantised. Raises ModelError, also for unsupported formats.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    section = config.get("quantization_config") or nested
    if not section:
        if model_dir is None:
            return None
        from engine.weights.forms.model_slim import read_description

        return read_description(model_dir / MODEL_SLIM_FILE)
    if not isinstance(section, Mapping):
        raise ModelError("quantization_config in config.json must be an object.")
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
        raise ModelError(
            f"quantization_config in config.json lacks a value, or one has the wrong type: {error}."
        ) from None
