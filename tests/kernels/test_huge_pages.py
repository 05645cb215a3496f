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
def test_it_is_a_tensor_of_its_own(rows: int):
    x = huge_pages.empty(rows, 1024, dtype=torch.bfloat16)
    other = huge_pages.empty(rows, 1024, dtype=torch.bfloat16)
    assert x.shape == (rows, 1024) and x.dtype is torch.bfloat16 and x.is_contiguous()
    x.fill_(1), other.fill_(2)
    assert (x == 1).all() and (other == 2).all()
    if x.nbytes >= PAGE // 2 and hasattr(mmap, "MADV_HUGEPAGE"):
        assert x.data_ptr() % PAGE == 0


def test_a_tensor_that_is_no_cpu_s_is_made_where_it_should_be():
    assert huge_pages.empty(4096, 4096, dtype=torch.float32, device="meta").is_meta


def test_what_does_not_fit_is_an_error_of_the_allocator():
    with pytest.raises(RuntimeError):
        huge_pages.empty(1 << 40, 1 << 10, dtype=torch.float32)


def resident_bytes(x: torch.Tensor) -> int:
    """Return how much of a tensor has pages, from the kernel's list of them.

    The size of the whole process says nothing: other pages of it may be taken away meanwhile.
    """
    first = x.data_ptr() // mmap.PAGESIZE
    num_pages = (x.data_ptr() + x.nbytes - 1) // mmap.PAGESIZE - first + 1
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * num_pages), np.uint64)
    return int((entries >> 62 != 0).sum()) * mmap.PAGESIZE  # present, or swapped out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are listed in /proc")
def test_promised_pages_are_given_and_hold_what_they_held():
    memory = torch.frombuffer(mmap.mmap(-1, 1 << 25), dtype=torch.uint8)  # has no pages yet
    memory[5], memory[-1] = 7, 9
    part = memory[100:-100]  # which begins and ends within a page
    assert resident_bytes(part) < part.nbytes * 0.5
    if not huge_pages.populate(part):
        pytest.skip("this system only gives pages that are written")
    assert resident_bytes(part) > part.nbytes * 0.9
    assert int(memory.sum()) == 7 + 9
