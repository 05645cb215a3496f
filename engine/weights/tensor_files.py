"""Weight files of a model: safetensors, single or sharded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.weights.layer_names import INDEX_NAME, INDEX_NAMES, MODEL_SLIM_FILE, WEIGHTS_NAME
from engine.weights.model_config import ModelError
from hybridcache.geometry.gguf import unreadable
from hybridcache.geometry.units import enumerated as enumerated
from hybridcache.geometry.units import format_bytes

FULL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightsError(ModelError):
    """The weight files cannot be read or do not match the model; the message names the fault."""


def open_file(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of one file, in its order. Bytes are read when they are used, and the mapping
    ends with the last of the tensors.

    Raises WeightsError for a truncated or corrupted file.
    """
    if (fault := unreadable(path)) is not None:
        raise WeightsError(f"{path} {fault}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (RuntimeError, MemoryError) as error:  # As a rule, the file is larger than the memory.
        needed, cause = format_bytes(path.stat().st_size), str(error).rsplit(": ", 1)[-1]
        why = f"the weights need {needed} ({path}), which cannot be mapped into memory ({cause})"
        said = "use a smaller model, one with fewer bits, or one in several files"
        raise WeightsError(f"{why}: {said}.") from None
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} {_damage(path) or f'cannot be read: {error}'}.") from None


OTHER_KINDS = {
    b"PK\x03\x04": "is a file of PyTorch or a ZIP archive",
    b"\x1f\x8b": "is compressed by gzip",
    b"GGUF": "is a GGUF file",
    b"<": "is a web page or XML, perhaps the error of a download",
}
"""Beginnings of other files -> what they are."""


def _damage(path: Path) -> str | None:
    """Return the fault of a file that is not whole safetensors, or None if it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        for beginning, kind in OTHER_KINDS.items():
            if start.lstrip().startswith(beginning) and not 0 < length <= size - 8:
                return f"{kind}, not safetensors: download the safetensors file"
        if length > size - 8:
            return (
                f"is truncated, or not safetensors: its header would have {length:,} bytes, and "
                f"{size:,} bytes are there; download it again"
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "is damaged: its header is not that of safetensors; download it again"
    whole = 8 + length + max(ends, default=0)
    if whole == size:
        return None
    kind = "is truncated" if whole > size else "is damaged"
    return f"{kind}: it has {size:,} bytes instead of {whole:,}; download it again"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: bfloat16 ..."""
    return str(dtype).removeprefix("torch.")


def find_files(model_dir: Path) -> list[Path]:
    """List the weight files of a model: those that transformers' ``from_pretrained`` reads.

    That is ``model.safetensors``, or else the files in its index. Without both it is those of
    ModelSlim. Other files in the folder are not read. Raises WeightsError.
    """
    single = model_dir / WEIGHTS_NAME
    if os.path.lexists(single):
        return [single]
    for name in INDEX_NAMES:
        if os.path.lexists(model_dir / name):
            return _indexed(model_dir / name)
    others = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if others and (model_dir / MODEL_SLIM_FILE).is_file():
        return [model_dir / name for name in others]
    found = f"; found {enumerated(others)}, which transformers does not read either" * bool(others)
    raise WeightsError(
        f"there is no {WEIGHTS_NAME} and no {INDEX_NAME} in {model_dir}{found} (.bin is not "
        "supported): convert them to safetensors, or name a model that has them. In Python, "
        "EngineConfig(load_format='dummy') tries a model without weights."
    )


def _indexed(index: Path) -> list[Path]:
    """Return the files that an index lists. Raises WeightsError."""
    if (fault := unreadable(index)) is not None:
        raise WeightsError(f"{index} {fault}.")
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({os.fspath(name) for name in found})  # TypeError for anything but text.
    except (ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index.name} is not a valid index of safetensors files.") from None
    absent = [name for name in names if not os.path.lexists(index.parent / name)]
    if absent:
        raise WeightsError(f"files named in {index.name} are missing: {enumerated(absent)}.")
    return [index.parent / name for name in names]
