"""Copies of states between slots, compared with indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.state_copy import reference
from kernels.state_copy.reference import StateLayout
from tests.kernels.compiled import by_backend, int32, native
from tests.refused import refused

fused = pytest.importorskip("kernels.state_copy.fused")
native_only = pytest.mark.parametrize("kernel", [native("state_copy")])
BACKENDS = by_backend("state_copy")


@BACKENDS
@settings(max_examples=10)
@given(
    num_layers=st.integers(1, 3),
    width=st.sampled_from([1, 3, 48, 1000]),
    order=st.permutations(range(7)),
    seed=st.integers(0, 9),
)
def test_copy_changes_only_the_target_slots(
    backend, device, num_layers, width, order, seed
) -> None:
    torch.manual_seed(seed)
    pools = [
        torch.randn(num_layers, 7, 2, width, 5, device=device),
        torch.randn(num_layers, 7, width, 3, device=device).bfloat16(),
        torch.randn(num_layers, 7, 4, device=device),
        torch.randn(14, num_layers, 2, 6, 8, device=device)[::2, :, 1].transpose(0, 1),
    ]
    storage, kept = pools[-1]._base, pools[-1]._base.clone()
    before = [pool.clone() for pool in pools]
    for num_copies in range(4):
        sources, targets = order[:num_copies], order[num_copies : 2 * num_copies]
        backend.copy_states(pools, int32(sources, device), int32(targets, device))
        for pool, old in zip(pools, before, strict=True):
            old[:, targets] = old[:, sources]
            assert torch.equal(pool, old)
    kept[::2, :, 1] = storage[::2, :, 1]
    assert torch.equal(storage, kept), "the bytes between strided states stay"


CODES = torch.int8, torch.float8_e4m3fn


@native_only
@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    codes=st.sampled_from([*CODES, torch.float32, torch.bfloat16]),
    dims=st.sampled_from([(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 4)]),
    order=st.permutations(range(5)),
    width=st.sampled_from([1, 16, 33]),
    seed=st.integers(0, 9),
)
def test_native_checkpoints_equal_the_reference(
    kernel, dtype, codes, dims, order, width, seed
) -> None:
    """Bits are equal after narrowing and widening, in strided slots; no other byte is written."""
    torch.manual_seed(seed)
    shape = (3, 5, 2, 17, width)
    pool = (torch.randn(shape) * torch.logspace(-3, 3, width)).to(dtype)
    pool[1, 2, 1] = 0
    form = StateLayout(codes, dims if codes in CODES else None, 16, 32 + pool[:, 0].numel() * 4)
    sources, stored, targets = (
        torch.tensor(order[:3]),
        torch.tensor(order[1:4]),
        torch.tensor(order[2:]),
    )
    results = []
    for backend in (kernel, reference):
        slots = torch.full((6, 30_000), 7, dtype=torch.uint8)[:, :25_000]
        restored = torch.full_like(pool, 7)
        backend.narrow_states(pool, sources, slots, stored, form)
        backend.widen_states(slots, stored, restored, targets, form)
        results.append((slots, restored))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours.view(torch.uint8), plain.view(torch.uint8))


@native_only
@pytest.mark.parametrize("codes", CODES)
def test_codes_and_ties_between_them_are_rounded(kernel, codes) -> None:
    """With a scale of 1, ties round to even, also for subnormal numbers."""
    all_codes = torch.arange(256, dtype=torch.uint8).view(codes).float()
    exact = all_codes[all_codes.isfinite() & (all_codes > -128 if codes is torch.int8 else True)]
    exact = exact.sort().values
    ties = (exact[1:] + exact[:-1]) / 2
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (-1e9, 1e9)]
    pool = torch.cat([exact, ties, *near])[None, None, None, None]
    results = []
    for backend in (kernel, reference):
        slots, restored = torch.zeros(1, 2048, dtype=torch.uint8), torch.zeros_like(pool)
        first, form = torch.tensor([0]), StateLayout(codes, (0, 1, 2), 0, 2000)
        backend.narrow_states(pool, first, slots, first, form)
        backend.widen_states(slots, first, restored, first, form)
        assert slots[0, 2000:2004].view(torch.float32) == 1
        assert torch.equal(restored.flatten()[: len(exact)], exact)
        results.append(slots)
    assert torch.equal(*results)


def test_non_contiguous_state_is_refused(device) -> None:
    pool = torch.randn(2, 4, 6, 8, device=device).transpose(2, 3)
    refused("contiguous", fused.copy_states, [pool], int32([0], device), int32([1], device))
