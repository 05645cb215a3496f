"""Which implementation of each kernel serves: plain PyTorch (``reference``) or Triton (``fused``).

``Kernels`` is chosen once, at start, handed to the layers, and shown to whoever starts the engine.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Literal

from engine.environment import check_no_foreign_kernels
from engine.run.device import Device
from engine.run.model_config import ModelError

Backend = Literal["reference", "fused"]
BACKENDS: tuple[Backend, ...] = ("reference", "fused")


@dataclass(frozen=True, slots=True)
class Kernels:
    """One module per kernel; the functions in it have the same signatures whatever the backend."""

    activation: ModuleType
    attention: ModuleType
    cache_write: ModuleType
    conv1d: ModuleType
    gdn: ModuleType
    linear: ModuleType
    moe: ModuleType
    norm: ModuleType
    rotary: ModuleType
    state_copy: ModuleType

    @classmethod
    def choose(cls, device: Device, overrides: str = "") -> Kernels:
        """``fused`` wherever the device runs Triton and it is installed, else ``reference``;
        ``overrides`` as in ``attention=reference,gdn=fused``. Raises ModelError."""
        check_no_foreign_kernels()
        usable = device.traits.has_triton and importlib.util.find_spec("triton") is not None
        words: dict[str, Backend] = {
            field.name: "fused" if usable else "reference" for field in fields(cls)
        }
        words.update(parse_overrides(overrides, words))
        return cls(**{name: _load(name, word) for name, word in words.items()})

    def words(self) -> dict[str, str]:
        """Kernel to backend."""
        return {f.name: getattr(self, f.name).__name__.rpartition(".")[2] for f in fields(self)}


def parse_overrides(text: str, known: Mapping[str, str]) -> dict[str, Backend]:
    """``attention=reference,gdn=fused`` as a dict. Raises ModelError."""
    chosen: dict[str, Backend] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, word = item.partition("=")
        if name not in known:
            raise ModelError(f"there is no kernel {name!r}; there are {', '.join(known)}.")
        if word not in BACKENDS:
            raise ModelError(f"kernel {name} has no backend {word!r}; reference or fused.")
        chosen[name] = word
    return chosen


def _load(name: str, word: Backend) -> ModuleType:
    try:
        return importlib.import_module(f"kernels.{name}.{word}")
    except ImportError as error:
        raise ModelError(f"kernel {name} can not be loaded as {word}: {error}.") from None
