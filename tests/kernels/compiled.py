"""The native kernels as a case of the tests that the others pass."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from kernels.native import shared_library

ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"


def native(name: str) -> Any:
    """``kernels.NAME.native`` as a parameter; skipped where nothing compiles it, or tensors are on
    a GPU."""
    usable = ON_CPU and shared_library() is not None
    return pytest.param(
        importlib.import_module(f"kernels.{name}.native"),
        id="native",
        marks=pytest.mark.skipif(not usable, reason="no C++ compiler, or tensors on a GPU"),
    )
