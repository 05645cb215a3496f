"""Convolutions and attention with tiles of 16 and 32 tokens: exact after a resume at any tile."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import pytest
import torch

from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed
from tests.kernels.compiled import ON_CPU, shared_library

pytest.importorskip("triton")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        "fused",
        pytest.param("native", marks=pytest.mark.skipif(not ON_CPU, reason="tensors on a GPU")),
    ],
)
@DTYPES
@pytest.mark.parametrize("tile_size", [16, 32])
def test_conv_resumes_at_any_tile(backend, dtype, tile_size, device) -> None:
    if backend == "native" and shared_library() is None:
        pytest.skip("no C++ compiler")
    conv = importlib.import_module(f"kernels.conv1d.{backend}").prefill_conv1d
    torch.manual_seed(4)
    x, weight = torch.randn(70, 8, device=device).to(dtype), torch.randn(8, 4, device=device)
    states = torch.full((9, 8, 3), torch.nan, dtype=dtype, device=device)

    def convolve(first: int, slot: int, exports: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        packed = Packed.from_lengths([70 - first], device, tile_size)
        return conv(
            x[first:],
            weight.to(dtype),
            None,
            states=states,
            packed=packed,
            slots=torch.tensor([slot], dtype=torch.int32, device=device),
            resumed=torch.tensor([first > 0], device=device),
            exports=Exports.plan(packed, exports),
        )

    ends = range(tile_size, 70, tile_size)
    whole = convolve(0, 0, [(0, end, i + 1) for i, end in enumerate(ends)])
    for i, end in enumerate(ends):
        assert torch.equal(states[i + 1], x[end - 3 : end].mT)
        assert torch.equal(convolve(end, i + 1, []), whole[end:])


@pytest.mark.parametrize("backend", ["reference", "fused"])
@DTYPES
@pytest.mark.parametrize("tile_size", [16, 32])
def test_attention_resumes_at_any_tile(backend, dtype, tile_size, device) -> None:
    attend = importlib.import_module(f"kernels.attention.{backend}").prefill_attention
    torch.manual_seed(5)
    length = 150 if backend == "fused" else 600
    query = torch.randn(length, 4, 32, device=device).to(dtype)
    pools = torch.randn(2, length, 2, 32, device=device).to(dtype)

    def attended(first: int) -> torch.Tensor:
        return attend(
            query[first:],
            *pools,
            table=torch.arange(length, dtype=torch.int32, device=device)[None],
            sequences=Sequences.of([0], [length], device),
            packed=Packed.from_lengths([length - first], device, tile_size),
            scale=32**-0.5,
        )

    whole = attended(0)
    for first in (*range(tile_size, length, 5 * tile_size), length - length % tile_size):
        assert torch.equal(attended(first), whole[first:])
