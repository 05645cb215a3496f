"""Properties that the bits of KV and states depend on. Saved entries are valid only if all are
equal."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.runner.backends import Kernels
from engine.weights.tensor_files import find_files
from hybridcache.geometry.checkpoints import CheckpointFormat

CHUNK_BYTES = 1 << 24


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def weights_digest(model_dir: Path, num_workers: int) -> str:
    """Return a digest of all bytes of the model's weight files, without their names.

    O(bytes), at reading speed. Raises WeightsError and OSError.
    """
    chunks = [
        (file, first)
        for file in find_files(model_dir)
        for first in range(0, file.stat().st_size, CHUNK_BYTES)
    ]
    with ThreadPoolExecutor(num_workers) as pool:
        return digest_of("".join(pool.map(_chunk_digest, chunks)).encode())


def identity_of(
    config: EngineConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    weights_digest: str | None = None,
) -> dict[str, str]:
    """Describe a runner that computes with ``kernels`` in ``dtype`` on ``device``. O(bytes of the
    weights), unless their digest is given."""
    checkpoints = CheckpointFormat.parse(config.checkpoint_dtype)
    return {
        "weights": _weights(config, weights_digest),
        "config": digest_of((config.model_dir / "config.json").read_bytes()),
        "dtype": str(dtype).removeprefix("torch."),
        "state dtype": config.state_dtype,
        "checkpoint dtype": "auto" if checkpoints is None else checkpoints.spec,
        "quantization": config.quantization or "none",
        "multi-token head": str(config.drafts.head_len > 0),
        "tile": str(config.tile_size),
        "kernels": ",".join(f"{name}={word}" for name, word in sorted(kernels.words().items())),
        **machine_words(device),
    }


def _weights(config: EngineConfig, known: str | None) -> str:
    if config.load_format == "dummy":
        return f"dummy, seed {config.seed}"
    return known or weights_digest(config.model_dir, config.load_workers or 1)


def machine_words(device: torch.device) -> dict[str, str]:
    """Return the properties of hardware and library that may change rounding."""
    if device.type == "cpu":
        name = torch.backends.cpu.get_cpu_capability()
    else:
        name = str(torch.get_device_module(device).get_device_name(device))
    return {"device": f"{device.type}, {name}", "torch": torch.__version__}


def _chunk_digest(chunk: tuple[Path, int]) -> str:
    path, first = chunk
    with open(path, "rb") as file:
        file.seek(first)
        return digest_of(file.read(CHUNK_BYTES))
