"""What two engines must have in common before one resumes from what the other computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.run.model_config import read_config
from engine.run.model_runner import ModelRunner

SAMPLE_BYTES, NUM_SAMPLES = 1 << 16, 64
ADVICE = {
    "model": "serve the same config.json",
    "weights": "serve the same weights",
    "numbers": "give both the same dtype, state_dtype, checkpoint_dtype and quantization",
    "layout": "give both the same draft, and both cache_gib or both kv_gib and state_gib",
    "kernels": "run both on the same kind of device, with the same kernels and version of torch",
    "places": "give both the same grid, page_size and exact",
}
"""What to do where a part differs."""


def fingerprint(config: EngineConfig, runner: ModelRunner) -> dict[str, str]:
    """By what may differ. Reads a sample of large weight files."""
    device = runner.device.torch_device
    if runner.device.is_cpu:
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = str(runner.device.module.get_device_name(device))
    return {
        "model": _digest(json.dumps(read_config(config.model_dir), sort_keys=True, default=str)),
        "weights": _weights(config),
        "numbers": f"{runner.dtype} {config.state_dtype} {config.checkpoint_dtype} "
        f"{config.quantization}",
        "layout": _digest(runner.unit.layout),
        "kernels": f"{name}, torch {torch.__version__}, {sorted(runner.kernels.words().items())}",
        "places": f"{config.grid} {config.page_size} {config.exact}",
    }


def difference(own: Mapping[str, str], other: object) -> str | None:
    """What differs and what to do, the end of a sentence; None: nothing."""
    if not isinstance(other, dict):
        return "it says nothing of its model"
    for part, advice in ADVICE.items():
        if own[part] != other.get(part):
            return f"{part} differ: {advice}"
    return None


def _weights(config: EngineConfig) -> str:
    """Of small files every byte, of larger ones evenly spread samples: two that differ between the
    samples alone count as the same."""
    if config.load_format == "dummy":
        return f"seed {config.seed}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(config.model_dir.glob("*.safetensors")):
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}".encode())
    step = max(SAMPLE_BYTES, size // NUM_SAMPLES)
    with file.open("rb") as data:
        for first in range(0, size, step):
            data.seek(first)
            digest.update(data.read(SAMPLE_BYTES))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
