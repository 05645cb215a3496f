"""Import of SGLang on a CPU, with placeholders for modules that have no CPU build.

The placeholders are never called: device kernels, image and sound readers, a notebook's display.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from importlib import metadata
from types import ModuleType
from typing import Any

STOOD_IN = (
    "IPython",
    "aiohttp",
    "cuda",
    "flashinfer",
    "gguf",
    "loguru",
    "partial_json_parser",
    "pybase64",
    "sentencepiece",
    "soundfile",
    "torch_memory_saver",
    "torchcodec",
    "torchvision",
)


class _Answer(type):
    """Metaclass that makes every attribute of a class another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _answer(name)


def _answer(name: str) -> type:
    def call(self: Any, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    return _Answer(name, (), {"__init__": lambda self, *a, **k: None, "__call__": call})


class _Module(ModuleType):
    """Placeholder module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _answer(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that creates placeholder modules."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


def is_installed() -> bool:
    return importlib.util.find_spec("sglang") is not None


def version() -> str:
    """Return the version of the installed SGLang."""
    return metadata.version("sglang")


def stand_in() -> None:
    """Make ``import sglang`` work on a CPU. Call it once per process, before the import."""
    warnings.filterwarnings("ignore", module="sglang")
    # transformers also looks for some of these modules. Import it before they appear.
    from transformers import AutoProcessor  # noqa: F401

    sys.meta_path.append(_Finder(frozenset(STOOD_IN)))
