"""Latent attention of Kimi-Linear, with rows scattered over a pool.

32 heads, latents of 512 and shared keys of 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from experiments.gpu.kernel_cases import Case, Setup, scattered
from kernels.mla import fused, reference
from kernels.packed import Packed


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts from zero and after cached tokens, decoding, and the products around them."""
    for cached, new in (
        ((64, 20),) if setup.is_dry else ((0, 1024), (0, 8192), (8128, 64), (7168, 1024))
    ):
        yield _prefill(setup, cached, new)
    for num, length in (
        ((2, 70),) if setup.is_dry else ((1, 1024), (1, 8192), (64, 1024), (64, 8192))
    ):
        yield _decode(setup, num, length)
    for num_tokens in (5,) if setup.is_dry else (1, 64, 8192):
        yield _products(setup, num_tokens)


def _sizes(setup: Setup) -> tuple[int, int, int]:
    """Return heads, size of latents and size of shared keys."""
    return (2, 32, 16) if setup.is_dry else (32, 512, 64)


def _pool(setup: Setup, num: int, length: int) -> tuple[torch.Tensor, dict]:
    _, rank, shared = _sizes(setup)
    pool = setup.randn(num * length, rank + shared)
    return pool, scattered(setup, num, length) | {"scale": 192**-0.5, "rank": rank}


def _prefill(setup: Setup, cached: int, new: int) -> Case:
    (heads, rank, shared), (pool, layout) = _sizes(setup), _pool(setup, 1, cached + new)
    layout["packed"] = Packed.from_lengths([new], setup.device)
    query = setup.randn(new, heads, rank + shared)
    seen = cached + (new + 1) / 2
    return Case(
        name=f"mla prefill {new} after {cached}",
        run=partial(fused.prefill_mla, query, pool, **layout),
        expected=partial(reference.prefill_mla, query.double(), pool.double(), **layout),
        num_bytes=2 * query.nbytes + pool.nbytes,
        num_flops=int(2 * new * seen * heads * (2 * rank + shared)),
    )


def _decode(setup: Setup, num: int, length: int) -> Case:
    (heads, rank, shared), (pool, layout) = _sizes(setup), _pool(setup, num, length)
    query = setup.randn(num, heads, rank + shared)
    return Case(
        name=f"mla decode {num} x {length}",
        run=partial(fused.decode_mla, query, pool, **layout),
        expected=partial(reference.decode_mla, query.double(), pool.double(), **layout),
        num_bytes=2 * query.nbytes + pool.nbytes,
        num_flops=2 * num * length * heads * (2 * rank + shared),
        rivals={"torch": partial(reference.decode_mla, query, pool, **layout)},
    )


def _products(setup: Setup, num_tokens: int) -> Case:
    heads, rank, _ = _sizes(setup)
    x, weight = setup.randn(num_tokens, heads, 128), setup.randn(heads, 128, rank)
    return Case(
        name=f"mla heads {num_tokens}",
        run=partial(fused.multiply_heads, x, weight),
        expected=partial(reference.multiply_heads, x.double(), weight.double()),
        num_bytes=x.nbytes + weight.nbytes + x.element_size() * num_tokens * heads * rank,
        num_flops=2 * num_tokens * weight.numel(),
        rivals={"torch": lambda: torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)},
    )
