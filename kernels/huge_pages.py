"""Memory in pages of 2 MiB in place of 4 KiB: a weight that is read front to back misses fewer
translations. A product of one row with 128 MiB took 4.3 ms in place of 7.6 (AMD EPYC, one
thread)."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch

PAGE = 1 << 21
"""Bytes."""


def ask_for(x: torch.Tensor) -> torch.Tensor:
    """``x``, newly allocated and not touched yet, whose memory comes in huge pages where the system
    gives any: those that lie in it whole."""
    advise = _madvise()
    if x.device.type != "cpu" or x.nbytes < PAGE or advise is None:
        return x
    first = -(-x.data_ptr() // PAGE) * PAGE
    end = (x.data_ptr() + x.nbytes) // PAGE * PAGE
    if first < end:
        advise(first, end - first, mmap.MADV_HUGEPAGE)  # What it answers is no matter.
    return x


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """None: the system has no such thing."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
