"""Weight files of a model: safetensors, single or sharded."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.weights.layer_names import INDEX_NAME, INDEX_NAMES, MODEL_SLIM_FILE, WEIGHTS_NAME
from engine.weights.model_config import ModelError
from hybridcache.geometry.gguf import LFS_POINTER
from hybridcache.geometry.units import enumerated as enumerated

FULL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightsError(ModelError):
    """The weight files cannot be read or do not match the model; the message names the fault."""


def open_file(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of one file, in its order. Bytes are read when they are used, and the mapping
    ends with the last of the tensors.

    Raises WeightsError for a truncated or corrupted file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except PermissionError:
        raise WeightsError(f"{path} cannot be read: check its permissions.") from None
    except (OSError, SafetensorError) as error:
        if _is_pointer(path):
            raise WeightsError(
                f"{path.name} is a pointer of Git LFS, not the weights: run `git lfs pull`."
            ) from None
        raise WeightsError(
            f"{path.name} is truncated or corrupted ({error}); download it again."
        ) from None


def _is_pointer(path: Path) -> bool:
    """Return True if Git LFS has not fetched the file yet."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: bfloat16 ..."""
    return str(dtype).removeprefix("torch.")


def find_files(model_dir: Path) -> list[Path]:
    """List the weight files of a model: those that transformers' ``from_pretrained`` reads.

    That is ``model.safetensors``, or else the files in its index. Without both it is those of
    ModelSlim. Other files in the folder are not read. Raises WeightsError.
    """
    single = model_dir / WEIGHTS_NAME
    if single.is_file():
        return [single]
    for name in INDEX_NAMES:
        if (model_dir / name).is_file():
            return _indexed(model_dir / name)
    others = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if others and (model_dir / MODEL_SLIM_FILE).is_file():
        return [model_dir / name for name in others]
    found = f"; found {enumerated(others)}, which transformers does not read either" * bool(others)
    raise WeightsError(
        f"there is no {WEIGHTS_NAME} and no {INDEX_NAME} in {model_dir}{found} (.bin is not "
        "supported): use EngineConfig(load_format='dummy') to try without weights."
    )


def _indexed(index: Path) -> list[Path]:
    """Return the files that an index lists. Raises WeightsError."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({os.fspath(name) for name in found})  # TypeError for anything but text.
    except (ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index.name} is not a valid index of safetensors files.") from None
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise WeightsError(f"files named in {index.name} are missing: {enumerated(absent)}.")
    return [index.parent / name for name in names]
