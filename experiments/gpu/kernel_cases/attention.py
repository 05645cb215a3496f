"""Attention of Qwen3-Next: 16 query heads, 2 KV heads of 256, KV rows scattered over a pool.

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

from experiments.gpu.kernel_cases import Case, Kernels, Rivals, Setup, num_bytes, scattered
from kernels.attention import fused, reference
from kernels.attention.sequences import Sequences
from kernels.packed import Packed


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts from zero and after cached tokens, decoding, and verification, for few and many
    sequences."""
    for cached, new in (
        ((0, 70), (64, 20)) if setup.is_dry else ((0, 1024), (0, 8192), (7168, 1024))
    ):
        yield _prefill(setup, cached, new)
    for num, length in (
        ((2, 70),) if setup.is_dry else ((1, 1024), (1, 8192), (64, 1024), (64, 8192))
    ):
        yield _decode(setup, num, length)
        yield _verify(setup, num, length, num_steps=4)


class Pool:
    """Queries, and the KV rows of sequences scattered over a pool."""

    def __init__(self, setup: Setup, num: int, length: int, num_queries: int) -> None:
        heads, group, size = (1, 2, 32) if setup.is_dry else (2, 8, 256)
        self.query = setup.randn(num_queries, group * heads, size)
        self.keys, self.values = (setup.randn(num * length, heads, size) for _ in range(2))
        self.layout = scattered(setup, num, length) | {"scale": size**-0.5}

    def case(
        self, name: str, kernels: Kernels, num_flops: int, rivals: Rivals, **layout: Any
    ) -> Case:
        """Return the case of a kernel and its reference, with more arguments for both."""
        ours, reference = kernels
        tensors = self.query, self.keys, self.values
        return Case(
            name=name,
            run=partial(ours, *tensors, **self.layout, **layout),
            expected=partial(reference, *(x.double() for x in tensors), **self.layout, **layout),
            num_bytes=num_bytes(tensors, self.query),
            num_flops=num_flops,
            rivals=rivals,
        )


def _prefill(setup: Setup, cached: int, new: int) -> Case:
    pool = Pool(setup, 1, cached + new, new)
    query, keys, values = pool.query, pool.keys, pool.values
    rows = pool.layout["table"][0].long()

    def in_order() -> tuple[torch.Tensor, ...]:
        """Return the layout of torch: KV rows in order of position. ``[1, H, T, D]``, views."""
        return tuple(x.transpose(0, 1)[None] for x in (query, keys[rows], values[rows]))

    ordered, mask = in_order(), causal_lower_right(new, cached + new)
    rivals = {
        "torch, gathering": lambda: _torch_prefill(*in_order(), mask),
        "torch, contiguous": lambda: _torch_prefill(*ordered, mask),
    }
    if not cached:
        rivals["flex, contiguous"] = _flex_prefill(*ordered, setup)
    name = f"prefill {new} after {cached}"
    kernels = fused.prefill_attention, reference.prefill_attention
    num_flops = int(4 * query.numel() * (cached + (new + 1) / 2))
    packed = Packed.from_lengths([new], setup.device)
    return pool.case(name, kernels, num_flops, rivals, packed=packed)


def _torch_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: CausalBias
) -> torch.Tensor:
    """Compute attention. Without cached tokens, ``is_causal`` is equivalent and has faster
    kernels."""
    if query.shape[2] == keys.shape[2]:
        mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    else:
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _flex_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, setup: Setup
) -> Callable[[], torch.Tensor]:
    """Compute FlexAttention without cached tokens. On the CPU it is not compiled."""
    num_tokens = query.shape[2]
    attend = flex_attention if setup.is_dry else torch.compile(flex_attention)
    blocks = create_block_mask(
        lambda b, h, i, j: j <= i, None, None, num_tokens, num_tokens, device=setup.device
    )
    return lambda: attend(query, keys, values, block_mask=blocks, enable_gqa=True)[0].transpose(
        0, 1
    )


def _decode(setup: Setup, num: int, length: int) -> Case:
    pool = Pool(setup, num, length, num)
    rows = pool.layout["table"].long()

    def in_order() -> tuple[torch.Tensor, ...]:
        """Return KV rows in order of position, ``[B, HKV, L, D]``, views."""
        return tuple(rows_of[rows].transpose(1, 2) for rows_of in (pool.keys, pool.values))

    ordered = in_order()
    rivals = {
        "torch, gathering": lambda: _torch_decode(pool.query, *in_order()),
        "torch, contiguous": lambda: _torch_decode(pool.query, *ordered),
    }
    kernels = fused.decode_attention, reference.decode_attention
    return pool.case(f"decode {num} x {length}", kernels, 4 * length * pool.query.numel(), rivals)


def _verify(setup: Setup, num: int, length: int, num_steps: int) -> Case:
    pool = Pool(setup, num, length, num * num_steps)
    ends = [length - num_steps + 1 + step for _ in range(num) for step in range(num_steps)]
    rows = [row for row in range(num) for _ in range(num_steps)]
    apart = pool.layout | {"sequences": Sequences.of(rows, ends, setup.device)}
    tensors = pool.query, pool.keys, pool.values
    rivals = {"token by token": partial(fused.decode_attention, *tensors, **apart)}
    name = f"verify {num} x {num_steps} of {length}"
    kernels = fused.verify_attention, reference.verify_attention
    packed = Packed.from_lengths([num_steps] * num, setup.device)
    return pool.case(name, kernels, 4 * length * pool.query.numel(), rivals, packed=packed)


def _torch_decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]
