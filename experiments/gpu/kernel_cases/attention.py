"""Attention of Qwen3-Next, 16 query heads and 2 KV heads of 256, and latent attention of
Kimi-Linear, 32 heads, latents of 512 and shared keys of 64. KV rows are scattered over a pool.

torch has no attention over scattered rows. It is timed with the gathering that an engine would
need, and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from experiments.gpu.kernel_cases import Case, Rivals, Setup, num_bytes
from kernels.attention import fused, reference
from kernels.attention.sequences import Sequences
from kernels.mla import fused as mla
from kernels.mla import reference as mla_reference
from kernels.packed import Packed

STEPS = 4
"""Tokens of a sequence that are verified at once."""


def plans(is_dry: bool) -> Iterator[tuple[Any, ...]]:
    """Yield prompts from zero and after cached tokens, decoding, and verification, for few and many
    sequences, and the products around latent attention."""
    for sizes in ((0, 70), (64, 20)) if is_dry else ((0, 1024), (0, 8192), (7168, 1024)):
        yield prefill, *sizes
    for sizes in ((2, 70),) if is_dry else ((1, 1024), (1, 8192), (64, 1024), (64, 8192)):
        yield from ((work, *sizes) for work in (decode, verify, mla_decode))
    after = (0, 1024), (0, 8192), (8128, 64), (7168, 1024)
    for sizes in ((64, 20),) if is_dry else after:
        yield mla_prefill, *sizes
    for num_tokens in (5,) if is_dry else (1, 64, 8192):
        yield mla_heads, num_tokens


def scattered(setup: Setup, num: int, length: int) -> dict[str, Any]:
    """Return the layout of ``num`` sequences whose rows are scattered over a pool."""
    table = setup.int32(torch.randperm(num * length).tolist()).view(num, length)
    return {"table": table, "sequences": Sequences.of(range(num), [length] * num, setup.device)}


class Pool:
    """Queries, and the KV rows of sequences scattered over a pool."""

    def __init__(self, setup: Setup, num: int, length: int, num_queries: int) -> None:
        heads, group, size = (1, 2, 32) if setup.is_dry else (2, 8, 256)
        self.query = setup.randn(num_queries, group * heads, size)
        self.keys, self.values = (setup.randn(num * length, heads, size) for _ in range(2))
        self.layout = scattered(setup, num, length) | {"scale": size**-0.5}

    def in_order(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return KV rows in order of position, ``[B, HKV, L, D]``, views."""
        return tuple(rows_of[rows].transpose(-3, -2) for rows_of in (self.keys, self.values))

    def case(self, work: str, num_flops: int, rivals: Rivals, **layout: Any) -> Case:
        """Return the case of a kernel and its reference, with more arguments for both."""
        tensors, where = (self.query, self.keys, self.values), self.layout | layout
        return Case(
            run=partial(getattr(fused, work), *tensors, **where),
            expected=partial(getattr(reference, work), *(x.double() for x in tensors), **where),
            num_bytes=num_bytes(tensors, self.query),
            num_flops=num_flops,
            rivals=rivals,
        )


def prefill(setup: Setup, cached: int, new: int) -> Case:
    pool = Pool(setup, 1, cached + new, new)
    query, rows = pool.query.transpose(0, 1)[None], pool.layout["table"].long()
    ordered, mask = pool.in_order(rows), causal_lower_right(new, cached + new)
    rivals = {
        "torch, gathering": lambda: _torch_prefill(query, *pool.in_order(rows), mask),
        "torch, contiguous": lambda: _torch_prefill(query, *ordered, mask),
    }
    if not cached:
        rivals["flex, contiguous"] = _flex_prefill(query, *ordered, setup)
    num_flops = int(4 * query.numel() * (cached + (new + 1) / 2))
    packed = Packed.from_lengths([new], setup.device)
    return pool.case("prefill_attention", num_flops, rivals, packed=packed)


def _torch_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: CausalBias
) -> torch.Tensor:
    """Compute attention. Without cached tokens, ``is_causal`` is equivalent and has faster
    kernels."""
    is_whole = query.shape[2] == keys.shape[2]
    how = {"is_causal": True} if is_whole else {"attn_mask": mask}
    mixed = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True, **how)
    return mixed[0].transpose(0, 1)


def _flex_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, setup: Setup
) -> Callable[[], torch.Tensor]:
    """Compute FlexAttention without cached tokens. On the CPU it is not compiled."""
    size = query.shape[2]
    attend = flex_attention if setup.is_dry else torch.compile(flex_attention)
    blocks = create_block_mask(
        lambda b, h, i, j: j <= i, None, None, size, size, device=setup.device
    )
    given = {"block_mask": blocks, "enable_gqa": True}
    return lambda: attend(query, keys, values, **given)[0].transpose(0, 1)


def decode(setup: Setup, num: int, length: int) -> Case:
    pool = Pool(setup, num, length, num)
    rows = pool.layout["table"].long()
    ordered = pool.in_order(rows)
    rivals = {
        "torch, gathering": lambda: _torch_decode(pool.query, *pool.in_order(rows)),
        "torch, contiguous": lambda: _torch_decode(pool.query, *ordered),
    }
    return pool.case("decode_attention", 4 * length * pool.query.numel(), rivals)


def _torch_decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def verify(setup: Setup, num: int, length: int) -> Case:
    pool = Pool(setup, num, length, num * STEPS)
    ends = [length - STEPS + 1 + step for _ in range(num) for step in range(STEPS)]
    rows = [row for row in range(num) for _ in range(STEPS)]
    apart = pool.layout | {"sequences": Sequences.of(rows, ends, setup.device)}
    tensors = pool.query, pool.keys, pool.values
    rivals = {"token by token": partial(fused.decode_attention, *tensors, **apart)}
    packed = Packed.from_lengths([STEPS] * num, setup.device)
    return pool.case("verify_attention", 4 * length * pool.query.numel(), rivals, packed=packed)


# --- Latent attention -----------------------------------------------------------------------------


def _latents(
    setup: Setup, work: str, num: int, length: int, num_queries: int, seen: float, **layout: Any
) -> Case:
    """Return the case of queries that see ``seen`` tokens each, on average."""
    heads, rank, shared = (2, 32, 16) if setup.is_dry else (32, 512, 64)
    pool = setup.randn(num * length, rank + shared)
    where = scattered(setup, num, length) | {"scale": 192**-0.5, "rank": rank} | layout
    query, plain = setup.randn(num_queries, heads, rank + shared), getattr(mla_reference, work)
    return Case(
        run=partial(getattr(mla, work), query, pool, **where),
        expected=partial(plain, query.double(), pool.double(), **where),
        num_bytes=2 * query.nbytes + pool.nbytes,
        num_flops=int(2 * num_queries * seen * heads * (2 * rank + shared)),
        rivals={} if layout else {"torch": partial(plain, query, pool, **where)},
    )


def mla_prefill(setup: Setup, cached: int, new: int) -> Case:
    packed, seen = Packed.from_lengths([new], setup.device), cached + (new + 1) / 2
    return _latents(setup, "prefill_mla", 1, cached + new, new, seen, packed=packed)


def mla_decode(setup: Setup, num: int, length: int) -> Case:
    return _latents(setup, "decode_mla", num, length, num, length)


def mla_heads(setup: Setup, num_tokens: int) -> Case:
    heads, rank = (2, 32) if setup.is_dry else (32, 512)
    x, weight = setup.randn(num_tokens, heads, 128), setup.randn(heads, 128, rank)
    return Case(
        run=partial(mla.multiply_heads, x, weight),
        expected=partial(mla_reference.multiply_heads, x.double(), weight.double()),
        num_bytes=x.nbytes + weight.nbytes + x.element_size() * num_tokens * heads * rank,
        num_flops=2 * num_tokens * weight.numel(),
        rivals={"torch": lambda: torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)},
    )
