"""Latent attention: equality with keys and values expanded in float64, and bits independent of
chunks and batch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from kernels.attention.sequences import Sequences
from kernels.native import shared_library
from kernels.packed import Packed
from tests.kernels.compiled import BY_DTYPE, assert_close, backends

fused = pytest.importorskip("kernels.mla.fused")
PROMPTS = pytest.mark.parametrize(("backend", "dtype"), backends("mla"))
BACKENDS = pytest.mark.parametrize(("backend", "dtype"), backends("mla", prompts=False))


class Cache(SimpleNamespace):
    """Pool of latents with sequences in scattered rows and NaN elsewhere.

    The pool is one layer's part of wider rows.
    """

    @classmethod
    def filled(cls, lengths, heads, rank, shared, head, dtype, device) -> Cache:
        torch.manual_seed(0)
        num_rows = sum(lengths) + 3
        order = torch.randperm(num_rows)
        pool = torch.full((num_rows, 2, rank + shared), torch.nan).to(dtype)[:, 1]
        table = torch.full((len(lengths) + 2, max(lengths) + 5), 2**30).int()
        rows = torch.randperm(len(table))[: len(lengths)].tolist()
        for row, length in zip(rows, lengths, strict=True):
            table[row, :length], order = order[:length], order[length:]
            pool[table[row, :length].long()] = torch.randn(length, rank + shared).to(dtype)
        expand = torch.randn(heads, head, rank).div_(head**0.5).to(dtype)
        queries = [torch.randn(n, heads, head + shared).to(dtype).to(device) for n in lengths]
        return cls(
            pool=pool.to(device),
            table=table.to(device),
            rows=rows,
            expand=expand.to(device),
            queries=queries,
            where={"scale": (head + shared) ** -0.5, "rank": rank, "table": table.to(device)},
            head=head,
            device=device,
        )

    def absorbed(self, backend, query: torch.Tensor) -> torch.Tensor:
        own, shared = query[..., : self.head], query[..., self.head :]
        return torch.cat([backend.multiply_heads(own, self.expand), shared], dim=-1)

    def places(self, backend, spans: Sequence[tuple[int, int, int]]):
        """Return absorbed queries, the pool and the sequences of each (sequence, start, end)."""
        rows, ends = [self.rows[b] for b, _, _ in spans], [end for _, _, end in spans]
        query = torch.cat([self.queries[b][start:end] for b, start, end in spans])
        where = self.where | {"sequences": Sequences.of(rows, ends, self.device)}
        return (self.absorbed(backend, query), self.pool), where

    def prefill(self, backend, spans: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Return the attention of tokens [start, end) of each (sequence, start, end)."""
        tensors, where = self.places(backend, spans)
        lengths = [end - start for _, start, end in spans]
        packed = Packed.from_lengths(lengths, self.device)
        out = backend.prefill_mla(*tensors, packed=packed, **where)
        return list(backend.multiply_heads(out, self.expand.mT).split(lengths))

    def decode(self, backend, ends: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the attention of token end - 1 of each (sequence, end)."""
        tensors, where = self.places(backend, [(b, end - 1, end) for b, end in ends])
        return backend.multiply_heads(backend.decode_mla(*tensors, **where), self.expand.mT)

    def formula(self, b: int) -> torch.Tensor:
        """Return the attention of sequence b in float64, with a key and a value per head."""
        query, rank = self.queries[b].double(), self.where["rank"]
        latent, shared = (
            self.pool[self.table[self.rows[b], : len(query)].long()]
            .double()
            .tensor_split([rank], dim=1)
        )
        values = torch.einsum("hdr,jr->jhd", self.expand.double(), latent)
        keys = torch.cat([values, shared[:, None].expand(-1, query.shape[1], -1)], dim=-1)
        scores = torch.einsum("thd,jhd->htj", query, keys) * self.where["scale"]
        scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        out = torch.einsum("htj,jhd->thd", scores.softmax(dim=-1), values)
        return out.to(self.queries[b].dtype)


@PROMPTS
@pytest.mark.parametrize(
    ("sizes", "length"),
    [((4, 64, 32, 32), 70), ((18, 24, 8, 16), 18)],
    ids=["H4-R64-P32", "H18-R24-P8"],
)
def test_attention_equals_expanded_keys_and_values(backend, sizes, length, dtype, device) -> None:
    cache = Cache.filled([15, 1, length], *sizes, dtype, device)
    expected = [cache.formula(b) for b in range(3)]
    spans = [(2, 0, length), (1, 0, 0), (0, 0, 15), (1, 0, 1)]
    # The absorbed query is rounded once more than that of the formula.
    for (b, _, end), out in zip(spans, cache.prefill(backend, spans), strict=True):
        assert_close(out, expected[b][:end], factor=2)
    decoded = cache.decode(backend, [(0, 15), (2, length), (1, 1)])
    last = torch.stack([expected[0][-1], expected[2][-1], expected[1][-1]])
    assert_close(decoded, last, factor=2)


@PROMPTS
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "sizes", [(4, 512, 64, 128), (3, 40, 8, 24)], ids=["H4-R512-P64", "H3-R40-P8"]
)
def test_resume_changes_no_bit(backend, sizes, num_threads, dtype, device) -> None:
    """Resumes at multiples of 64 up to any length, in a batch with other sequences."""
    torch.set_num_threads(num_threads)
    lengths, spans = (400, 70), ((0, 1), (64, 65), (64, 190), (256, 257), (320, 400))
    if backend is fused:
        sizes, lengths, spans = (3, 32, 16, 16), (130, 70), ((64, 130), (128, 129))
    cache = Cache.filled(lengths, *sizes, dtype, device)
    cold = [cache.prefill(backend, [(b, 0, n)])[0] for b, n in enumerate(lengths)]
    for start, end in spans:
        batch = [(1, 0, 70), (0, start, end), (1, 64, 70)]
        for (b, i, j), out in zip(batch, cache.prefill(backend, batch), strict=True):
            assert torch.equal(out, cold[b][i:j])


@pytest.mark.full("fp32-reference")
@BACKENDS
def test_decode_is_independent_of_the_batch(backend, dtype, device, monkeypatch) -> None:
    """The batch has several tokens of one sequence, as in a verification, and more tokens than fit
    into a workspace."""
    lengths = [270, 40, 257, 1, 64]
    cache = Cache.filled(lengths, 3, 32, 16, 16, dtype, device)
    ends = [*enumerate(lengths), (0, 256), (0, 257)]
    batched = cache.decode(backend, ends)
    for i, end in enumerate(ends):
        assert torch.equal(cache.decode(backend, [end])[0], batched[i])
    monkeypatch.setattr(fused, "group_size", lambda *sizes: 4)
    assert torch.equal(cache.decode(backend, ends), batched)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("inner, width", [(512, 128), (128, 512)])
@BY_DTYPE
def test_head_products_of_real_sizes_are_independent_of_the_batch(
    backend, inner, width, dtype
) -> None:
    """Sizes of Kimi Linear, for each number of rows up to two blocks of the native product."""
    if backend == "native" and shared_library() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(1)
    product = import_module(f"kernels.mla.{backend}").prepare_heads(
        torch.randn(8, inner, width).to(dtype)
    )
    x = torch.randn(130, 8, inner).to(dtype)
    whole = product(x)
    for count in range(1, 131):
        assert torch.equal(product(x[:count]), whole[:count])
        assert torch.equal(product(x[-count:]), whole[-count:])


@BACKENDS
def test_head_products_are_independent_of_the_batch(backend, dtype, device) -> None:
    """Inputs are slices of wider rows."""
    torch.manual_seed(1)
    x = torch.randn(70, 3, 50, device=device).to(dtype)[..., :40]
    weight = torch.randn(3, 24, 40, device=device).to(dtype).mT
    whole = backend.multiply_heads(x, weight)
    assert_close(whole, torch.einsum("thm,hmn->thn", x.double(), weight.double()).to(dtype))
    for count in (0, 1, 2, 5, 64, 67):
        assert torch.equal(backend.multiply_heads(x[:count], weight), whole[:count])
