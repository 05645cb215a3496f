"""Edge cases: states at odd addresses, exports at the ends of sequences, ties, unused experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gdn import reference as gdn_reference
from kernels.moe import reference as moe_reference
from kernels.packed import Exports, Packed

pytest.importorskip("triton")
from kernels.gdn import fused as gdn
from kernels.moe import fused as moe

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 128]), min_size=1, max_size=3)
STATE_DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SLOTS = 11


def scattered_pool(*state: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return a pool ``[SLOTS, *state]`` of NaN with gaps between the states."""
    storage = torch.full((2 * SLOTS + 1, *state), torch.nan, dtype=dtype, device=device)
    return storage[1::2]


def export_at_both_ends(lengths: list[int], free: list[int]) -> list[tuple[int, int, int]]:
    """Return exports after the first tile and at the end of each sequence."""
    ends = [
        (b, end)
        for b, length in enumerate(lengths)
        if length
        for end in sorted({min(64, length), length})
    ]
    return [(b, end, slot) for (b, end), slot in zip(ends, free, strict=False)]


def plan(lengths: list[int], seed: int, device: str) -> tuple[dict[str, Any], list[int]]:
    """Return random slots, resumes and exports as arguments, and the slots of resumed sequences."""
    torch.manual_seed(seed)
    order = torch.randperm(SLOTS).tolist()
    slots, free = order[: len(lengths)], order[len(lengths) :]
    resumed = torch.rand(len(lengths)) < 0.5
    packed = Packed.from_lengths(lengths, device)
    where = {
        "packed": packed,
        "slots": torch.tensor(slots, dtype=torch.int32, device=device),
        "resumed": resumed.to(device),
        "exports": Exports.plan(packed, export_at_both_ends(lengths, free)),
    }
    return where, [
        slot for slot, is_resumed in zip(slots, resumed.tolist(), strict=True) if is_resumed
    ]


@settings(max_examples=6)
@given(
    lengths=LENGTHS,
    sizes=st.sampled_from([(1, 4, 16, 16), (2, 2, 64, 16), (1, 1, 20, 40)]),
    state_dtype=STATE_DTYPES,
    seed=st.integers(0, 99),
)
def test_states_at_odd_addresses_and_exports_at_both_ends(
    lengths, sizes, state_dtype, seed, device
) -> None:
    """Kernel and reference leave equal contents in all slots, with NaN in unwritten ones."""
    where, given_slots = plan(lengths, seed, device)
    heads, value_heads, key_dim, value_dim = sizes
    count = sum(lengths)
    query, key = torch.randn(2, count, heads, key_dim, device=device)
    value = torch.randn(count, value_heads, value_dim, device=device)
    gate = -torch.rand(count, value_heads, device=device)
    beta = torch.rand(count, value_heads, device=device)
    initial = torch.randn(SLOTS, *sizes[1:], device=device).to(state_dtype)
    results = []
    for backend in (gdn_reference, gdn):
        states = scattered_pool(*sizes[1:], dtype=state_dtype, device=device)
        states[given_slots] = initial[given_slots]
        out = backend.chunk_gdn(query, key, value, gate, beta, states=states, **where)
        results.append((out, states))
    (expected, expected_states), (out, states) = results
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)
    tolerance = 1e-4 if state_dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        states, expected_states, atol=tolerance, rtol=tolerance, equal_nan=True
    )


@settings(max_examples=8)
@given(
    num_experts=st.sampled_from([1, 2, 5, 16, 33]),
    k=st.integers(1, 4),
    levels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_ties_in_routing_are_broken_by_index(num_experts, k, levels, seed, device) -> None:
    """Many experts share few scores; the lower index comes first."""
    k = min(k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (7, num_experts), generator=generator).float().to(device)
    weights, experts = moe.route(logits, k, True)
    expected_weights, expected = moe_reference.route(logits, k, True)
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights)
    by_hand = [
        sorted(range(num_experts), key=lambda e: (-row[e], e))[:k] for row in logits.tolist()
    ]
    assert experts.tolist() == by_hand
