"""Compiled kernels in tests: native backends as parameters, and Triton functions of a folder."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import Any

import pytest

from kernels.native import shared_library

ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"


def native(name: str) -> Any:
    """Return ``kernels.NAME.native`` as a parameter; skipped without a compiler or on a GPU."""
    usable = ON_CPU and shared_library() is not None
    return pytest.param(
        importlib.import_module(f"kernels.{name}.native"),
        id="native",
        marks=pytest.mark.skipif(not usable, reason="no C++ compiler, or tensors on a GPU"),
    )


def triton_functions(folder: str) -> dict[str, Any]:
    """Return the functions of ``kernels.FOLDER`` that Triton compiles, by name."""
    package = importlib.import_module(f"kernels.{folder}")
    functions: dict[str, Any] = {}
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"kernels.{folder}.{module.name}"))
        for name, member in members.items():
            if type(member).__name__ in {"JITFunction", "InterpretedFunction"}:
                functions[name] = member.fn
    return functions
