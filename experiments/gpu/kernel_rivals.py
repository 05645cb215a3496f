"""Kernels of flash-linear-attention (fla-core 0.6) for comparison in `experiments.gpu.kernels`.

They are called with the same tensors. fla-core must be in a separate folder, because transformers
would use it if it found it. `make rivals` installs it into ``out/rivals``, like `pip install
--no-deps --target`. Only the benchmark uses that folder, with the same torch and triton. A rival
that is not installed is left out; one that fails is reported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

from experiments.gpu.kernel_cases import Rivals
from experiments.provenance import ROOT

FOLDER = ROOT / "out" / "rivals"


def find() -> None:
    """Add the folder of fla-core to the end of the import path."""
    if FOLDER.is_dir():
        sys.path.append(str(FOLDER))


def fla(path: str, run: Callable[[Callable[..., Any]], torch.Tensor]) -> Rivals:
    """Return the rival that passes the function ``path`` of the package to ``run``. It is imported
    by each call, so that a missing function is a failure of this rival only."""
    module, _, name = path.rpartition(".")
    if not importlib.util.find_spec("fla"):
        return {}
    return {"fla": lambda: run(getattr(importlib.import_module(f"fla.{module}"), name))}
