"""Which implementation of each kernel serves: plain PyTorch (``reference``), Triton (``fused``), or
C++ for the CPU (``native``) where there is a compiler.

``Kernels`` is chosen once, at start, and handed to the layers; a kernel is loaded when the first
layer asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Literal

from engine.environment import check_no_foreign_kernels
from engine.runner.device import Device
from engine.weights.model_config import ModelError
from kernels import native

Backend = Literal["reference", "fused", "native"]
BACKENDS: tuple[Backend, ...] = ("reference", "fused", "native")


@cache
def backends_of() -> dict[str, tuple[Backend, ...]]:
    """Every kernel there is, and the backends it has: the folders and files of ``kernels``."""
    found: dict[str, tuple[Backend, ...]] = {}
    for folder in pkgutil.iter_modules(importlib.import_module("kernels").__path__):
        if folder.ispkg:
            files = pkgutil.iter_modules(importlib.import_module(f"kernels.{folder.name}").__path__)
            names = {file.name for file in files}
            found[folder.name] = tuple(word for word in BACKENDS if word in names)
    return dict(sorted(found.items()))


class Kernels(Mapping[str, ModuleType]):
    """One module per kernel, by name; the functions in it have the same signatures whatever the
    backend. Loads a module when it is first asked for."""

    def __init__(self, chosen: Mapping[str, Backend]) -> None:
        self._chosen = dict(chosen)
        self._loaded: dict[str, ModuleType] = {}

    @classmethod
    def choose(cls, device: Device, overrides: str = "") -> Kernels:
        """``fused`` wherever the device runs Triton, it is installed and the kernel has it,
        ``native`` for those that have it on a CPU with a compiler, else ``reference``;
        ``overrides`` as in ``attention=reference,gdn=fused``. Raises ModelError."""
        check_no_foreign_kernels()
        word: Backend = "reference"
        if device.traits.has_triton and importlib.util.find_spec("triton") is not None:
            word = "fused"
        elif device.is_cpu and native.shared_library() is not None:
            word = "native"
        words: dict[str, Backend] = {
            name: word if word in backends else "reference"
            for name, backends in backends_of().items()
        }
        asked = parse_overrides(overrides)
        for name, wanted in asked.items():  # Told at the start, used or not.
            _load(name, wanted)
        return cls(words | asked)

    def __getitem__(self, name: str) -> ModuleType:
        """Raises ModelError where the kernel can not be loaded."""
        if name not in self._loaded:
            self._loaded[name] = _load(name, self._chosen[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def words(self) -> dict[str, str]:
        """Kernel to backend, of those that are in use."""
        return {name: word for name, word in self._chosen.items() if name in self._loaded}


def all_fused() -> str:
    """The overrides that take Triton for every kernel that has it, whatever the device."""
    return ",".join(f"{name}=fused" for name, words in backends_of().items() if "fused" in words)


def all_plain() -> str:
    """The overrides that take plain PyTorch for every kernel."""
    return ",".join(f"{name}=reference" for name in backends_of())


def parse_overrides(text: str) -> dict[str, Backend]:
    """``attention=reference,gdn=fused`` as a dict. Raises ModelError."""
    chosen: dict[str, Backend] = {}
    known = backends_of()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, word = item.partition("=")
        if name not in known:
            raise ModelError(f"there is no kernel {name!r}; there are {', '.join(known)}.")
        if word not in known[name]:
            raise ModelError(f"kernel {name} has no backend {word!r}; {' or '.join(known[name])}.")
        chosen[name] = word
    return chosen


def _load(name: str, word: Backend) -> ModuleType:
    if word == "native" and native.shared_library() is None:
        raise ModelError(f"kernel {name} can not be loaded as native: no C++ compiler works here.")
    try:
        return importlib.import_module(f"kernels.{name}.{word}")
    except ImportError as error:
        raise ModelError(f"kernel {name} can not be loaded as {word}: {error}.") from None
