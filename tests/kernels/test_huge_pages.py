"""Memory for weights, in pages of 2 MiB."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest
import torch

from kernels import huge_pages
from kernels.huge_pages import PAGE


@pytest.mark.parametrize("rows", [0, 3, 1024, 1536, 2049])
def test_empty_returns_a_separate_tensor(rows: int):
    x = huge_pages.empty(rows, 1024, dtype=torch.bfloat16)
    other = huge_pages.empty(rows, 1024, dtype=torch.bfloat16)
    assert x.shape == (rows, 1024) and x.dtype is torch.bfloat16 and x.is_contiguous()
    x.fill_(1), other.fill_(2)
    assert (x == 1).all() and (other == 2).all()
    if x.nbytes >= PAGE // 2 and hasattr(mmap, "MADV_HUGEPAGE"):
        assert x.data_ptr() % PAGE == 0


def resident_bytes(x: torch.Tensor) -> int:
    """Return the bytes of a tensor that have pages, from the kernel's page map.

    The size of the process is useless here, because other pages may be freed at the same time.
    """
    first = x.data_ptr() // mmap.PAGESIZE
    num_pages = (x.data_ptr() + x.nbytes - 1) // mmap.PAGESIZE - first + 1
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * num_pages), np.uint64)
    return int((entries >> 62 != 0).sum()) * mmap.PAGESIZE  # Present or swapped out.


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the page map is in /proc")
def test_populate_allocates_pages_and_keeps_their_contents():
    memory = torch.frombuffer(mmap.mmap(-1, 1 << 25), dtype=torch.uint8)  # Has no pages yet.
    memory[5], memory[-1] = 7, 9
    part = memory[100:-100]  # Starts and ends within a page.
    assert resident_bytes(part) < part.nbytes * 0.5
    if not huge_pages.populate(part):
        pytest.skip("this system only allocates pages on a write")
    assert resident_bytes(part) > part.nbytes * 0.9
    assert int(memory.sum()) == 7 + 9
