"""Launches of latent attention at Kimi-Linear's sizes, in an arena's rows of 7 layers.

It has 32 heads, latents of 512 and shared keys of 64.
"""

import torch

from kernels.attention.sequences import Sequences
from kernels.mla.fused import decode_mla, multiply_heads, prefill_mla
from kernels.packed import Packed

HEADS, RANK, SHARED, HEAD = 32, 512, 64, 128


def attend_latents(dtype: torch.dtype, tile_size: int = 64) -> None:
    pool = torch.empty(512, 7, RANK + SHARED, dtype=dtype)[:, 3]
    where = {
        "table": torch.zeros(16, 512, dtype=torch.int32),
        "sequences": Sequences.of([0, 1], [300, 512]),
        "scale": 192**-0.5,
        "rank": RANK,
    }
    query = torch.empty(128 + 64, HEADS, RANK + SHARED, dtype=dtype)
    packed = Packed.from_lengths([128, 64], tile_size=tile_size)
    prefill_mla(query, pool, packed=packed, **where)
    decode_mla(query[:2], pool, **where)
    head = torch.empty(192, HEADS, HEAD + SHARED, dtype=dtype)[..., :HEAD]
    multiply_heads(head, torch.empty(HEADS, HEAD, RANK, dtype=dtype))
    multiply_heads(query[..., :RANK], torch.empty(HEADS, RANK, HEAD, dtype=dtype))


LAUNCHES = {
    "kimi_linear": lambda: attend_latents(torch.bfloat16),
    "tiles_of_16": lambda: attend_latents(torch.bfloat16, 16),
}
