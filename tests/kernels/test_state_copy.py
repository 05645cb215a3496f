"""Copies of states between slots: kernel and reference against indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.state_copy import reference
from tests.kernels.compiled import native

fused = pytest.importorskip("kernels.state_copy.fused")
IMPLEMENTATIONS = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(reference, id="reference"),
        pytest.param(fused, id="fused"),
        native("state_copy"),
    ],
)


@IMPLEMENTATIONS
@settings(max_examples=10)
@given(
    num_layers=st.integers(1, 3),
    width=st.sampled_from([1, 3, 48, 1000]),
    order=st.permutations(range(7)),
    num_copies=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_moves_exactly_what_is_asked(kernel, num_layers, width, order, num_copies, seed) -> None:
    torch.manual_seed(seed)
    pools = [
        torch.randn(num_layers, 7, 2, width, 5),
        torch.randn(num_layers, 7, width, 3).bfloat16(),
        torch.randn(num_layers, 7, 4),
    ]
    before = [pool.clone() for pool in pools]
    sources, targets = order[:num_copies], order[num_copies : 2 * num_copies]
    kernel.copy_states(
        pools, torch.tensor(sources, dtype=torch.int32), torch.tensor(targets, dtype=torch.int32)
    )
    for pool, old in zip(pools, before, strict=True):
        old[:, targets] = old[:, sources]
        assert torch.equal(pool, old)


@IMPLEMENTATIONS
def test_layers_and_slots_may_be_strided(kernel, device) -> None:
    storage = torch.randn(9, 4, 2, 6, 8, device=device)
    pool = storage[::2, :, 1].transpose(0, 1)  # [L=4, S=5, 6, 8], slots outermost in memory
    before, untouched = pool.clone(), storage[1::2].clone()
    kernel.copy_states([pool], _int32([4, 0], device), _int32([1, 2], device))
    before[:, [1, 2]] = before[:, [4, 0]]
    assert torch.equal(pool, before)
    assert torch.equal(storage[1::2], untouched)


def test_a_state_scattered_in_its_slot_is_refused(device) -> None:
    pool = torch.randn(2, 4, 6, 8, device=device).transpose(2, 3)
    with pytest.raises(ValueError, match="contiguous"):
        fused.copy_states([pool], _int32([0], device), _int32([1], device))


def _int32(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
