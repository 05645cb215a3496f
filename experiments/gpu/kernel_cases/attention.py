"""Attention of Qwen3-Next: 16 query heads, 2 KV heads of 256, KV rows scattered over a pool.

torch has no attention over scattered rows. It is timed with the gathering that an engine would
need, and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from experiments.gpu.kernel_cases import Case, Setup, scattered
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


def _pool(setup: Setup, num: int, length: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    heads, size = (1, 32) if setup.is_dry else (2, 256)
    keys, values = (setup.randn(num * length, heads, size) for _ in range(2))
    return keys, values, scattered(setup, num, length) | {"scale": size**-0.5}


def _prefill(setup: Setup, cached: int, new: int) -> Case:
    keys, values, layout = _pool(setup, 1, cached + new)
    layout["packed"] = Packed.from_lengths([new], setup.device)
    group, size = (2, keys.shape[2]) if setup.is_dry else (8, keys.shape[2])
    query = setup.randn(new, group * keys.shape[1], size)
    wide = [x.double() for x in (query, keys, values)]
    seen = cached + (new + 1) / 2
    rows = layout["table"][0].long()

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
    return Case(
        name=f"prefill {new} after {cached}",
        run=partial(fused.prefill_attention, query, keys, values, **layout),
        expected=partial(reference.prefill_attention, *wide, **layout),
        num_bytes=2 * query.nbytes + keys.nbytes + values.nbytes,
        num_flops=int(4 * new * seen * query.shape[1] * size),
        rivals=rivals,
    )


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
    keys, values, layout = _pool(setup, num, length)
    query = setup.randn(num, keys.shape[1] * (2 if setup.is_dry else 8), keys.shape[2])
    wide = [x.double() for x in (query, keys, values)]
    rows = layout["table"].long()

    def in_order() -> tuple[torch.Tensor, ...]:
        """Return KV rows in order of position, ``[B, HKV, L, D]``, views."""
        return tuple(pool[rows].transpose(1, 2) for pool in (keys, values))

    ordered = in_order()
    return Case(
        name=f"decode {num} x {length}",
        run=partial(fused.decode_attention, query, keys, values, **layout),
        expected=partial(reference.decode_attention, *wide, **layout),
        num_bytes=2 * query.nbytes + keys.nbytes + values.nbytes,
        num_flops=4 * length * query.numel(),
        rivals={
            "torch, gathering": lambda: _torch_decode(query, *in_order()),
            "torch, contiguous": lambda: _torch_decode(query, *ordered),
        },
    )


def _verify(setup: Setup, num: int, length: int, num_steps: int) -> Case:
    keys, values, layout = _pool(setup, num, length)
    layout["packed"] = Packed.from_lengths([num_steps] * num, setup.device)
    query = setup.randn(num * num_steps, keys.shape[1] * (2 if setup.is_dry else 8), keys.shape[2])
    wide = [x.double() for x in (query, keys, values)]
    ends = [length - num_steps + 1 + step for _ in range(num) for step in range(num_steps)]
    rows = [row for row in range(num) for _ in range(num_steps)]
    apart = layout | {"sequences": Sequences.of(rows, ends, setup.device)}
    del apart["packed"]
    return Case(
        name=f"verify {num} x {num_steps} of {length}",
        run=partial(fused.verify_attention, query, keys, values, **layout),
        expected=partial(reference.verify_attention, *wide, **layout),
        num_bytes=2 * query.nbytes + keys.nbytes + values.nbytes,
        num_flops=4 * length * query.numel(),
        rivals={
            "token by token": partial(fused.decode_attention, query, keys, values, **apart),
        },
    )


def _torch_decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]
