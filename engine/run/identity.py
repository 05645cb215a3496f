"""What the bits of KV and states depend on: whoever reads them back must be the same in all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from engine.run.tensor_files import find_files

CHUNK_BYTES = 1 << 24


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def json_digest(value: Mapping[str, Any]) -> str:
    """Of plain data, whatever the order of its keys."""
    return digest_of(json.dumps(value, sort_keys=True, default=str).encode())


def weights_digest(model_dir: Path, num_workers: int, memo: Path | None = None) -> str:
    """Of every byte of the model's weight files, not of their names. O(bytes) at the speed of
    reading; where ``memo`` is given, that file remembers it for as long as size and time of each
    are the same. WeightsError, OSError."""
    files = find_files(model_dir)
    stamps = [[str(file.resolve()), *_stamp(file)] for file in files]
    known = _read_memo(memo)
    if known is not None and known.get("stamps") == stamps:
        return str(known.get("digest"))
    with ThreadPoolExecutor(num_workers) as pool:
        chunks = [
            (file, first)
            for file in files
            for first in range(0, file.stat().st_size, CHUNK_BYTES)
        ]
        digest = digest_of("".join(pool.map(_chunk_digest, chunks)).encode())
    if memo is not None:
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(json.dumps({"stamps": stamps, "digest": digest}), encoding="utf-8")
    return digest


def machine_words(device: torch.device) -> dict[str, str]:
    """What computes: another may round otherwise."""
    if device.type == "cpu":
        name = torch.backends.cpu.get_cpu_capability()
    else:
        name = str(torch.get_device_module(device).get_device_name(device))
    return {"device": f"{device.type}, {name}", "torch": torch.__version__}


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _read_memo(memo: Path | None) -> dict[str, Any] | None:
    try:
        found = None if memo is None else json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _chunk_digest(chunk: tuple[Path, int]) -> str:
    path, first = chunk
    with open(path, "rb") as file:
        file.seek(first)
        return digest_of(file.read(CHUNK_BYTES))
