"""Selection of kernel implementations: PyTorch (``reference``), Triton (``fused``), or C++
(``native``, on a CPU), and properties of weights and machine that identify a runner."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from engine.runner.device import Device
from engine.weights.model_config import ModelError
from engine.weights.model_files import weight_files
from kernels import native

Backend = Literal["reference", "fused", "native"]
BACKENDS: tuple[Backend, ...] = ("reference", "fused", "native")
CHUNK_BYTES = 1 << 24


@cache
def backends_of() -> dict[str, tuple[Backend, ...]]:
    """Return every kernel with its backends, from the folders and files of ``kernels``."""
    found: dict[str, tuple[Backend, ...]] = {}
    for folder in pkgutil.iter_modules(importlib.import_module("kernels").__path__):
        if folder.ispkg:
            files = pkgutil.iter_modules(importlib.import_module(f"kernels.{folder.name}").__path__)
            names = {file.name for file in files}
            found[folder.name] = tuple(word for word in BACKENDS if word in names)
    return found


class Kernels(dict[str, ModuleType]):
    """Modules of the kernels in use, by name. A module is loaded on first use. Raises ModelError if
    it cannot be loaded."""

    def __init__(self, device: Device, overrides: str = "") -> None:
        """Choose a backend for each kernel.

        ``fused`` on a GPU if Triton is installed and the kernel has it; ``native`` on a CPU with a
        C++ compiler if the kernel has it; else ``reference``. ``overrides`` are written as
        ``attention=reference,gdn=fused``. Raises ModelError.
        """
        super().__init__()
        self._is_cpu = device.is_cpu
        word: Backend = "reference"
        if device.is_cpu and native.shared_library() is not None:
            word = "native"
        elif not device.is_cpu and importlib.util.find_spec("triton") is not None:
            word = "fused"
        self._chosen: dict[str, Backend] = {
            name: word if word in backends else "reference"
            for name, backends in backends_of().items()
        }
        for item in filter(None, (part.strip() for part in overrides.split(","))):
            name, _, wanted = item.partition("=")
            found = [one for one in backends_of().get(name, ()) if one == wanted]
            if not found:
                known = ", ".join(f"{n}={'|'.join(words)}" for n, words in backends_of().items())
                raise ModelError(f"kernels: {item!r} is not one of {known}.")
            self._chosen[name] = found[0]
            self._load(name)  # Reports a backend that cannot be loaded at once.

    def __missing__(self, name: str) -> ModuleType:
        self[name] = self._load(name)
        return self[name]

    def words(self) -> dict[str, str]:
        """Return the backend of each kernel that is in use."""
        return {name: word for name, word in self._chosen.items() if name in self}

    def _load(self, name: str) -> ModuleType:
        word = self._chosen[name]
        try:
            if word == "native" and native.shared_library() is None:
                raise ImportError("no working C++ compiler was found")
            if word == "fused" and self._is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
                raise ImportError("Triton needs a GPU")
            return importlib.import_module(f"kernels.{name}.{word}")
        except ImportError as error:
            raise ModelError(f"kernel {name} cannot be loaded as {word}: {error}.") from None


def override_all(word: Backend) -> str:
    """Return the overrides that select a backend for every kernel that has it, on any device."""
    return ",".join(f"{name}={word}" for name, words in backends_of().items() if word in words)


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_weights(model_dir: Path) -> str:
    """Return a digest of all bytes of the model's weight files. O(bytes), at reading speed. Raises
    WeightsError and OSError."""

    def digest_at(chunk: tuple[Path, int]) -> str:
        with open(chunk[0], "rb") as file:
            file.seek(chunk[1])
            return digest_of(file.read(CHUNK_BYTES))

    files = weight_files(model_dir)
    chunks = [(f, first) for f in files for first in range(0, f.stat().st_size, CHUNK_BYTES)]
    with ThreadPoolExecutor() as pool:
        return digest_of("".join(pool.map(digest_at, chunks)).encode())


def machine_words(device: torch.device) -> dict[str, str]:
    """Return the properties of hardware and libraries that may change rounding."""
    words = {"torch": str(torch.__version__)}
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device)
        return words | {"device": f"{device.type}, {name}"}
    methods = native.kernel_choices() if native.shared_library() is not None else {}
    return words | {
        "device": f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "native methods": ",".join(f"{name}={word}" for name, word in sorted(methods.items())),
    }
