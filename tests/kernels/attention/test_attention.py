"""Attention over a KV pool: equality with the formula, and bits independent of chunks and batch."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.activation import reference as activation
from kernels.attention import reference
from kernels.attention.sequences import Sequences
from kernels.packed import Packed, running_sum
from tests.kernels.compiled import assert_close, backends

fused = pytest.importorskip("kernels.attention.fused")
fused_activation = pytest.importorskip("kernels.activation.fused")
splits = pytest.importorskip("kernels.attention.splits")
PROMPTS = pytest.mark.parametrize(("backend", "dtype"), backends("attention"))
DECODES = pytest.mark.parametrize(("backend", "dtype"), backends("attention", prompts=False))


class Cache(SimpleNamespace):
    """KV pool with sequences in scattered pages and NaN elsewhere."""

    @classmethod
    def filled(cls, lengths, heads, kv_heads, size, dtype, device, page_size=1, seed=0) -> Cache:
        torch.manual_seed(seed)
        num_pages = sum(-(-length // page_size) for length in lengths) + 3
        pages = torch.randperm(num_pages)
        pools = torch.full((2, num_pages * page_size, kv_heads, size), torch.nan, dtype=dtype)
        table = torch.full((len(lengths) + 2, max(lengths, default=0) + 5), 2**30).int()
        rows = torch.randperm(len(table))[: len(lengths)].tolist()
        queries = []
        for row, length in zip(rows, lengths, strict=True):
            num = -(-length // page_size)
            indices = pages[:num, None] * page_size + torch.arange(page_size)
            pages = pages[num:]
            table[row, :length] = indices.flatten()[:length]
            pools[:, table[row, :length].long()] = torch.randn(2, length, kv_heads, size).to(dtype)
            queries.append(torch.randn(length, heads, size).to(dtype).to(device))
        return cls(
            keys=pools[0].to(device),
            values=pools[1].to(device),
            table=table.to(device),
            rows=rows,
            queries=queries,
            scale=size**-0.5,
            device=device,
        )

    def places(self, spans: Sequence[tuple[int, int, int]], most: int | None = None):
        """Return queries, pools and places of the tokens [start, end) of each (sequence, start,
        end). With ``most``, the host has only this bound on the lengths."""
        ends = [end for _, _, end in spans]
        host_lens = ends if most is None else [most] * len(ends)
        sequences = Sequences.of([self.rows[b] for b, _, _ in spans], host_lens, self.device)
        sequences.kv_len_table.copy_(torch.tensor(ends))
        query = torch.cat([self.queries[b][start:end] for b, start, end in spans])
        where = {"table": self.table, "sequences": sequences, "scale": self.scale}
        return (query, self.keys, self.values), where

    def prefill(
        self, backend, spans: Sequence[tuple[int, int, int]], tile: int = 64
    ) -> list[torch.Tensor]:
        """Return the attention of tokens [start, end) of each (sequence, start, end)."""
        tensors, where = self.places(spans)
        lengths = [end - start for _, start, end in spans]
        packed = Packed.from_lengths(lengths, self.device, tile)
        return list(backend.prefill_attention(*tensors, packed=packed, **where).split(lengths))

    def decode(
        self, backend, ends: Sequence[tuple[int, int]], most: int | None = None
    ) -> torch.Tensor:
        """Return the attention of token end - 1 of each (sequence, end)."""
        tensors, where = self.places([(b, end - 1, end) for b, end in ends], most)
        return backend.decode_attention(*tensors, **where)

    def verify(self, backend, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Return the attention of the tokens [start, end) of each (sequence, start, end)."""
        tensors, where = self.places(spans)
        packed = Packed.from_lengths([end - start for _, start, end in spans], self.device)
        return backend.verify_attention(*tensors, packed=packed, **where)

    def formula(self, b: int) -> torch.Tensor:
        """Return the attention of all tokens of sequence b, computed in float64."""
        query = self.queries[b].double()
        indices = self.table[self.rows[b], : len(query)].long()
        group = query.shape[1] // self.keys.shape[1]
        keys, values = (
            pool[indices].double().repeat_interleave(group, dim=1)
            for pool in (self.keys, self.values)
        )
        scores = torch.einsum("thd,jhd->htj", query, keys) * self.scale
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return torch.einsum("htj,jhd->thd", weights, values).to(self.queries[b].dtype)


@PROMPTS
@pytest.mark.parametrize(
    "heads, kv_heads, size",
    [(4, 2, 64), (3, 1, 128), (2, 2, 256), (17, 1, 40)],
    ids=["HQ4-HKV2-D64", "HQ3-HKV1-D128", "HQ2-HKV2-D256", "HQ17-HKV1-D40"],
)
def test_attention_equals_the_formula(backend, heads, kv_heads, size, dtype, device) -> None:
    cache = Cache.filled([63, 0, 1, 130], heads, kv_heads, size, dtype, device)
    expected = [cache.formula(b) for b in range(4)]
    spans = [(3, 0, 130), (1, 0, 0), (0, 0, 63), (2, 0, 1)]
    if not backend.__name__.endswith("fused"):  # Native kernels use their memory again.
        no_numbers = torch.full_like(cache.values, torch.nan)
        Cache(**vars(cache) | {"values": no_numbers}).prefill(backend, spans)
    for (b, _, _), out in zip(spans, cache.prefill(backend, spans), strict=True):
        assert_close(out, expected[b])
    decoded = cache.decode(backend, [(0, 63), (3, 130), (2, 1)])
    assert_close(decoded, torch.stack([expected[0][-1], expected[3][-1], expected[2][-1]]))


@PROMPTS
@settings(max_examples=6)
@given(
    length=st.integers(1, 150),
    page_size=st.sampled_from([1, 3, 16]),
    resumed_tiles=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_any_page_size_and_start_equal_the_formula(
    backend, dtype, length, page_size, resumed_tiles, seed, device
) -> None:
    cache = Cache.filled([length, 30], 2, 1, 32, dtype, device, page_size, seed)
    start = min(resumed_tiles * 64, (length - 1) // 64 * 64)
    out, _ = cache.prefill(backend, [(0, start, length), (1, 0, 30)])
    assert_close(out, cache.formula(0)[start:])


@PROMPTS
@pytest.mark.parametrize(
    "heads, kv_heads, size, num_threads, tile",
    [
        *[(4, 1, 64, 1, 64), (20, 1, 64, 2, 64), (3, 1, 128, 1, 64), (2, 2, 256, 1, 64)],
        *[(4, 2, 32, 1, 16), (4, 2, 32, 1, 32)],
    ],
)
def test_resume_changes_no_bit(
    backend, heads, kv_heads, size, dtype, num_threads, tile, device
) -> None:
    """Resumes at tiles up to any length, in a batch with other sequences."""
    torch.set_num_threads(num_threads)
    starts, lengths = (0, tile, 512 - tile, 512, 640), (700, 560, 70)
    if backend.__name__.endswith("fused"):
        starts, lengths = (0, tile), (100, 90, 7)
        heads, kv_heads, size = 2, 1, 32
    cache = Cache.filled(lengths, heads, kv_heads, size, dtype, device)
    cold = [cache.prefill(backend, [(b, 0, n)], tile)[0] for b, n in enumerate(lengths)]
    for start in starts:
        for end in (start + 1, start + 60, start + 300):
            spans = [(2, 0, lengths[2]), (0, start, min(end, lengths[0]))]
            spans.append((1, starts[-2], lengths[1]))
            resumed = cache.prefill(backend, spans, tile)
            for (b, first, last), out in zip(spans, resumed, strict=True):
                assert torch.equal(out, cold[b][first:last])


@pytest.mark.full("bf16-fused", "fp32-native")
@DECODES
def test_decode_is_independent_of_the_batch(backend, dtype, device) -> None:
    lengths = [600, 40, 257, 1, *range(65, 81)]
    cache = Cache.filled(lengths, 2, 1, 17, dtype, device)  # rows that are not aligned
    ends = list(enumerate(lengths))
    batched = cache.decode(backend, ends)
    for i, end in enumerate(ends):
        assert torch.equal(cache.decode(backend, [end])[0], batched[i])
    assert torch.equal(cache.decode(backend, ends[::-1]), batched.flip(0))


@pytest.mark.full("4-2-fp32-fused", "20-1-bf16-native", "20-1-fp32-reference")
@DECODES
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (20, 1)])
def test_verification_equals_decode(backend, heads, kv_heads, dtype, device, monkeypatch) -> None:
    """The spans cross a split, fill several blocks of tokens, and do not see later tokens."""
    cache = Cache.filled([270, 40, 3], heads, kv_heads, 16, dtype, device)
    spans = [(0, 252, 262), (2, 0, 3), (1, 38, 39)]
    out = cache.verify(backend, spans)
    ends = [(b, end + 1) for b, start, last in spans for end in range(start, last)]
    assert torch.equal(out, cache.decode(backend, ends))
    monkeypatch.setattr(splits, "workspace_bytes", lambda: 1)
    monkeypatch.setattr(splits, "PROGRAMS", 1)  # Splits follow each other.
    spans *= 2
    assert torch.equal(cache.verify(backend, spans), torch.cat([out, out]))
    assert torch.equal(out, cache.decode(backend, ends))
    assert not len(cache.verify(backend, [(0, 5, 5)]))


@DECODES
def test_outputs_are_gated_with_the_bits_of_the_activation(backend, dtype, device) -> None:
    cache = Cache.filled([70, 40], 4, 2, 16, dtype, device)
    spans, multiply = [(0, 64, 70), (1, 38, 40)], activation.sigmoid_mul
    tensors, where = cache.places(spans)
    gate = torch.randn(8, 100, device=device).to(dtype)[:, 36:]
    packed = Packed.from_lengths([6, 2], device)
    for compute in (backend.prefill_attention, backend.verify_attention):
        out = compute(*tensors, packed=packed, **where).flatten(1)
        found = compute(*tensors, packed=packed, gate=gate, **where).flatten(1)
        torch.testing.assert_close(found, multiply(out, gate), rtol=0.01, atol=1e-6)
        if backend is reference or backend is fused:
            own = fused_activation.sigmoid_mul if backend is fused else multiply
            assert torch.equal(found, own(out, gate))


SPANS = [(b % 3, 5 * b, 5 * b + 1 + b * 7 % 5) for b in range(11)]
"""Spans of 11 sequences: 1 to 5 tokens each, 31 in total."""


@pytest.mark.full
@pytest.mark.parametrize("max_tokens", [1, 8, 20, 30, 31])
def test_chunks_are_split_by_tokens(max_tokens, device, monkeypatch) -> None:
    """Chunks have groups of four sequences, as many as fit, and the bits of a single chunk."""
    cache = Cache.filled([80, 70, 60], 4, 2, 16, torch.float32, device)
    out = cache.verify(fused, SPANS)
    starts = running_sum([end - start for _, start, end in SPANS])
    chunks = list(fused._chunks(starts, max_tokens))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == 11 and (len(chunks) == 1) == (max_tokens >= 31)
    for chunk in chunks:
        assert chunk.start % 4 == 0
        assert (
            chunk.stop - chunk.start <= 4 or starts[chunk.stop] - starts[chunk.start] <= max_tokens
        )
        next_size = starts[min(chunk.stop + 4, 11)] - starts[chunk.start]
        assert chunk.stop == 11 or next_size > max_tokens
    monkeypatch.setattr(fused, "group_size", lambda *sizes: max_tokens)
    assert torch.equal(cache.verify(fused, SPANS), out)


@pytest.mark.full
def test_verification_reads_lengths_from_the_device(device, monkeypatch) -> None:
    """Lengths on the host are only bounds; the number of sequences may differ."""
    cache = Cache.filled([80, 70, 60], 4, 2, 16, torch.float32, device)
    exact = cache.verify(fused, SPANS)
    monkeypatch.setattr(splits, "workspace_bytes", lambda: 36 * 4 * 4 * 16)
    assert splits.is_one_chunk(36, 256, 4, 16) and not splits.is_one_chunk(37, 256, 4, 16)
    assert not splits.is_one_chunk(36, 257, 4, 16)
    lengths = [end - start for _, start, end in SPANS]
    bounds = Packed.from_lengths([5] * 6 + [1] + [0] * 24, device)
    cu_seqlens = bounds.cu_seqlens.fill_(31)
    cu_seqlens[:12] = torch.tensor(running_sum(lengths))
    rows = [cache.rows[b] for b, _, _ in SPANS] + [0] * 20
    sequences = Sequences.of(rows, [80] * 31, device)
    sequences.kv_len_table.fill_(1)
    sequences.kv_len_table[:11] = torch.tensor([end for _, _, end in SPANS])
    tensors, where = cache.places(SPANS)
    bounded = fused.verify_attention(*tensors, packed=bounds, **where | {"sequences": sequences})
    assert torch.equal(bounded, exact)


def test_decode_is_independent_of_row_positions() -> None:
    """A contiguous sequence is read in place, a scattered one is gathered."""
    cache = Cache.filled([400], 4, 2, 64, torch.bfloat16, "cpu")
    scattered = cache.decode(reference, [(0, 400)])
    indices = cache.table[cache.rows[0], :400].clone().long()
    cache.keys, cache.values = cache.keys[indices].clone(), cache.values[indices].clone()
    cache.table[cache.rows[0], :400] = torch.arange(400)
    assert torch.equal(cache.decode(reference, [(0, 400)]), scattered)


@pytest.mark.full
def test_many_splits_are_joined_in_a_fixed_order(device, monkeypatch) -> None:
    """The order does not depend on the longest sequence or on the batch."""
    monkeypatch.setattr(fused, "SPLIT", 32)
    monkeypatch.setattr(fused, "COMBINED", 4)
    cache = Cache.filled([500, 20, 128, 129], 4, 2, 32, torch.float32, device)
    ends = [(b, len(query)) for b, query in enumerate(cache.queries)]
    batched = cache.decode(fused, ends)
    assert_close(batched, torch.stack([cache.formula(b)[-1] for b, _ in ends]))
    for i, end in enumerate(ends):
        assert torch.equal(cache.decode(fused, [end])[0], batched[i])
    assert torch.equal(cache.decode(fused, ends, most=1000), batched)


def test_long_sequences_are_decoded_in_groups(device, monkeypatch) -> None:
    """Groups are needed if the workspace is too small; bits do not change. A graph is launched for
    the longest possible sequence; the device has the real lengths."""
    cache = Cache.filled([300, 20, 290, 270, 64, 5], 2, 1, 32, torch.float32, device)
    ends = [(b, len(query)) for b, query in enumerate(cache.queries)]
    whole = cache.decode(fused, ends)
    assert torch.equal(cache.decode(fused, ends, most=305), whole)
    assert splits.group_size(2, 2, 32) > 6
    monkeypatch.setattr(splits, "workspace_bytes", lambda: 1)
    assert splits.group_size(2, 2, 32) == 4
    assert torch.equal(cache.decode(fused, ends), whole)
    monkeypatch.setattr(splits, "PROGRAMS", 3)  # Each has several splits.
    monkeypatch.setattr(splits, "SEQUENCES", type(splits.SEQUENCES)(2))
    assert torch.equal(cache.decode(fused, ends), whole)


def test_a_long_sequence_costs_short_ones_no_program() -> None:
    """63 sequences of 1,024 tokens, and one of 131,072, with 2 KV heads: as many programs as
    without it, and fewer than splits."""
    long, short = 131072 // splits.SPLIT, 1024 // splits.SPLIT
    without, launched = (2 * splits.num_programs(64 * most, 2) for most in (short, long))
    assert without == 2 * 64 * short and launched <= 2 * (63 * short + long)
    assert 2 * splits.num_programs(63 * 8, 2) > 0.95 * launched  # With the least bound of a graph.
    assert splits.num_programs(long, 2) == long  # Alone it has all of the device.


def test_workspace_follows_the_memory_of_the_device(monkeypatch) -> None:
    """An H200 decodes 256 sequences of 128k tokens of Qwen3-Next in 4 groups, not in 32."""
    size = splits.workspace_bytes.__wrapped__
    module = SimpleNamespace(
        get_device_properties=lambda: SimpleNamespace(total_memory=141 * 10**9)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    for is_available, expected in ((False, 2**26), (True, 141 * 10**9 // 256)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=is_available: found)
        assert size() == expected
    monkeypatch.setattr(splits, "workspace_bytes", size)
    assert -(-256 // splits.group_size(16, 131072 // splits.SPLIT, 257)) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_number_of_sequences_changes_no_bit(size, device, monkeypatch) -> None:
    """Single sequences, batches and groups, with the heads of a large model."""
    if device != "cuda":
        pytest.skip("the test is for tensor cores")
    lengths = [1, 63, 64, 65, 255, 256, 257, 700, 1500, 2048, 3001, 5000, 130]
    cache = Cache.filled(lengths, 16, 2, size, torch.bfloat16, device)
    ends = list(enumerate(lengths))
    batched = cache.decode(fused, ends)
    for count in (1, 2, 3, 5, 8, 12):
        assert torch.equal(cache.decode(fused, ends[:count]), batched[:count]), count
    for i, end in enumerate(ends):
        assert torch.equal(cache.decode(fused, [end])[0], batched[i]), end
    for group in (4, 8):
        monkeypatch.setattr(fused, "group_size", lambda *sizes, group=group: group)
        assert torch.equal(cache.decode(fused, ends), batched), group
