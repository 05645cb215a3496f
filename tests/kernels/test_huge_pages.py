"""Memory for weights, in pages of 2 MiB."""

from __future__ import annotations

import mmap

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
