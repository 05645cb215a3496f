"""Weights of files before they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.linear.formats import Format, Matrix


@dataclass(frozen=True, slots=True)
class Source:
    """One weight, with the name, shape and order of the model, in the storage of its file."""

    shape: tuple[int, ...]
    """Shape of the model's weight."""
    format: Format
    read: Callable[[], Matrix]
    """Returns the weight in the order of the file: views of the mapping if possible. One dimension
    is a vector."""
    rows: torch.Tensor | None = None
    """File row of each row of the model, int64, or None if the order is the same."""
    columns: torch.Tensor | None = None
    """File column of each column of the model, int64, or None if the order is the same."""
