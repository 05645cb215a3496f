"""Launches of attention at common head sizes, in an arena's rows of 12 layers."""

import torch

from kernels.attention.fused import decode_attention, prefill_attention, verify_attention
from kernels.attention.sequences import Sequences
from kernels.packed import Packed


def attend(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, tile_size: int = 64, *, gated=False
) -> None:
    keys, values = torch.empty(512, 12, 2, kv_heads, size, dtype=dtype)[:, 3].unbind(1)
    table = torch.zeros(16, 512, dtype=torch.int32)
    sequences = Sequences.of([0, 1], [300, 512])
    where = {"table": table, "sequences": sequences, "scale": size**-0.5}
    query = torch.empty(128 + 64, heads, size, dtype=dtype)
    packed = Packed.from_lengths([128, 64], tile_size=tile_size)
    gate = torch.empty(len(query), 2 * heads * size, dtype=dtype)[:, : heads * size]
    own = [{"gate": gate[:count]} if gated else {} for count in (len(gate), 2, 6)]
    prefill_attention(query, keys, values, packed=packed, **own[0], **where)
    decode_attention(query[:2], keys, values, **own[1], **where)
    few = Packed.from_lengths([5, 1])
    verify_attention(query[:6], keys, values, packed=few, **own[2], **where)


LAUNCHES = {
    "qwen3_next": lambda: attend(16, 2, 256, torch.bfloat16, gated=True),
    "size_128": lambda: attend(32, 8, 128, torch.bfloat16),
    "size_64_odd_group": lambda: attend(9, 3, 64, torch.bfloat16),
    "tiles_of_16": lambda: attend(16, 2, 256, torch.bfloat16, 16),
    "tiles_of_32": lambda: attend(32, 8, 128, torch.bfloat16, 32),
    "size_256_float32": lambda: attend(4, 2, 256, torch.float32),
}
