"""Edge cases: states at odd addresses, exports at the ends of sequences, ties, unused experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import reference as attention_reference
from kernels.attention.sequences import Sequences
from kernels.conv1d import reference as conv1d_reference
from kernels.gdn import reference as gdn_reference
from kernels.moe import reference as moe_reference
from kernels.packed import Exports, Packed

pytest.importorskip("triton")
from kernels.attention import fused as attention
from kernels.conv1d import fused as conv1d
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


@settings(max_examples=6)
@given(lengths=LENGTHS, width=st.integers(2, 4), dtype=STATE_DTYPES, seed=st.integers(0, 99))
def test_windows_at_odd_addresses_and_exports_at_both_ends(
    lengths, width, dtype, seed, device
) -> None:
    where, given_slots = plan(lengths, seed, device)
    x = torch.randn(sum(lengths), 20, device=device).to(dtype)
    weight = torch.randn(20, width, device=device).to(dtype)
    initial = torch.randn(SLOTS, 20, width - 1, device=device).to(dtype)
    results = []
    for backend in (conv1d_reference, conv1d):
        states = scattered_pool(20, width - 1, dtype=dtype, device=device)
        states[given_slots] = initial[given_slots]
        out = backend.prefill_conv1d(x, weight, None, states=states, **where)
        results.append((out, states))
    (expected, expected_states), (out, states) = results
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(states, expected_states, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
@pytest.mark.parametrize("key_dim", [64, 128, 256])
def test_decode_from_strided_slots(key_dim, state_dtype, device) -> None:
    torch.manual_seed(0)
    slots = torch.tensor([9, 0, 4], dtype=torch.int32, device=device)
    query, key = torch.randn(2, 3, 1, key_dim, device=device)
    value = torch.randn(3, 2, 24, device=device)
    inputs = *torch.randn(2, 3, 2, device=device), *torch.randn(2, 2, device=device)
    initial = torch.randn(3, 2, key_dim, 24, device=device).to(state_dtype)
    results = []
    for backend in (gdn_reference, gdn):
        states = scattered_pool(2, key_dim, 24, dtype=state_dtype, device=device)
        states[slots.long()] = initial
        out = backend.decode_gdn(query, key, value, *inputs, states=states, slots=slots)
        results.append((out, states))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-2, rtol=1e-2, equal_nan=True)


@settings(max_examples=5)
@given(
    lengths=st.lists(st.sampled_from([1, 17, 64, 65, 100]), min_size=1, max_size=3),
    group=st.sampled_from([1, 2, 3, 8]),
    size=st.sampled_from([64, 128, 256]),
    page_size=st.sampled_from([1, 16, 64]),
    seed=st.integers(0, 99),
)
def test_attention_of_any_group_size_and_page(
    lengths, group, size, page_size, seed, device
) -> None:
    """Pages are in random order and unused rows are NaN; prompts and decodes are compared."""
    torch.manual_seed(seed)
    counts = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(sum(counts) + 2)
    pools = torch.full((2, len(pages) * page_size, 1, size), torch.nan, device=device)
    table = torch.full((len(lengths), max(lengths) + 3), 2**30, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own, pages = pages[:count], pages[count:]
        indices = (own[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        table[row, :length] = indices
        pools[:, indices.to(device)] = torch.randn(2, length, 1, size, device=device)
    query = torch.randn(sum(lengths), group, size, device=device)
    where = {
        "table": table.to(device),
        "sequences": Sequences.of(range(len(lengths)), lengths, device),
        "scale": size**-0.5,
    }
    packed = Packed.from_lengths(lengths, device)
    last = packed.cu_seqlens[1:].long() - 1
    expected, out = (
        backend.prefill_attention(query, *pools, packed=packed, **where)
        for backend in (attention_reference, attention)
    )
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    decoded = attention.decode_attention(query[last], *pools, **where)
    torch.testing.assert_close(decoded, expected[last], atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("num_tokens", [16, 17])
@pytest.mark.parametrize("chosen", [0, 4])
def test_all_tokens_may_use_one_expert(chosen, num_tokens, device) -> None:
    """Weights of the unused experts are NaN here and must not be read."""
    torch.manual_seed(chosen)
    w13 = torch.full((5, 2 * 24, 32), torch.nan, device=device)
    w2 = torch.full((5, 32, 24), torch.nan, device=device)
    w13[chosen], w2[chosen] = torch.randn(48, 32) * 0.3, torch.randn(32, 24) * 0.3
    hidden = torch.randn(num_tokens, 32, device=device)
    experts = torch.full((num_tokens, 1), chosen, dtype=torch.int32, device=device)
    weights = torch.rand(num_tokens, 1, device=device)
    arguments = hidden, weights, experts, w13, w2
    out = moe.experts(*arguments)
    torch.testing.assert_close(out, moe_reference.experts(*arguments), atol=1e-5, rtol=1e-4)
