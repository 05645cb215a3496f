"""Launches at heads of 64, 128 and 256, in two dtypes and tile sizes, for shared memory only."""

import itertools
from functools import partial

import torch

from kernels.attention.fused import decode_attention, prefill_attention
from kernels.attention.sequences import Sequences
from kernels.gdn.fused import chunk_gdn, decode_gdn
from kernels.kda.fused import chunk_kda, decode_kda
from kernels.linear.fused import linear
from kernels.mamba2.fused import chunk_mamba2, decode_mamba2
from kernels.mla.fused import decode_mla, prefill_mla
from kernels.packed import Packed

WIDTHS = (64, 128, 256)


def _recurrent(chunk, decode, width: int, dtype: torch.dtype, tile_size: int) -> None:
    packed = Packed.from_lengths([96, 64], tile_size=tile_size)
    tokens = [torch.empty(160, 4, width, dtype=dtype) for _ in range(3)]
    gate = torch.empty(160, 4, width) if chunk is chunk_kda else torch.empty(160, 4)
    states = torch.empty(4, 4, width, width)
    where = {"states": states, "slots": torch.zeros(2, dtype=torch.int32)}
    extra = (torch.empty(4),) if chunk is chunk_mamba2 else ()
    fresh = {"resumed": torch.zeros(2, dtype=torch.bool), "exports": None}
    chunk(*tokens, gate, torch.empty(160, 4), *extra, packed=packed, **where, **fresh)
    a = gate[:2].to(dtype)
    bias = torch.empty(4, width) if chunk is chunk_kda else torch.empty(4)
    b = () if chunk is chunk_mamba2 else (torch.empty(2, 4, dtype=dtype),)
    decode(*(x[:2] for x in tokens), a, *b, torch.empty(4), bias, *extra, **where)


def _attention(width: int, dtype: torch.dtype, tile_size: int) -> None:
    keys, values = torch.empty(512, 2, 2, width, dtype=dtype).unbind(1)
    where = {
        "table": torch.zeros(16, 512, dtype=torch.int32),
        "sequences": Sequences.of([0, 1], [300, 512]),
        "scale": 1.0,
    }
    query = torch.empty(128 + 64, 8, width, dtype=dtype)
    packed = Packed.from_lengths([128, 64], tile_size=tile_size)
    prefill_attention(query, keys, values, packed=packed, **where)
    decode_attention(query[:2], keys, values, **where)


def _mla(dtype: torch.dtype, tile_size: int) -> None:
    where = {
        "table": torch.zeros(16, 512, dtype=torch.int32),
        "sequences": Sequences.of([0, 1], [300, 512]),
        "scale": 1.0,
        "rank": 512,
    }
    query, pool = torch.empty(192, 16, 576, dtype=dtype), torch.empty(512, 576, dtype=dtype)
    packed = Packed.from_lengths([128, 64], tile_size=tile_size)
    prefill_mla(query, pool, packed=packed, **where)
    decode_mla(query[:2], pool, **where)


def _linear(num_tokens: int, dtype: torch.dtype) -> None:
    linear(torch.empty(num_tokens, 1024, dtype=dtype), torch.empty(1024, 1024, dtype=dtype))


def _launches():
    kinds = {
        "gdn": (chunk_gdn, decode_gdn),
        "kda": (chunk_kda, decode_kda),
        "mamba2": (chunk_mamba2, decode_mamba2),
    }
    for dtype, tile_size in itertools.product((torch.bfloat16, torch.float32), (64, 16)):
        word = f"{dtype} tiles {tile_size}".removeprefix("torch.")
        for (name, pair), width in itertools.product(kinds.items(), WIDTHS):
            yield f"{name} {width} {word}", partial(_recurrent, *pair, width, dtype, tile_size)
        for width in WIDTHS:
            yield f"attention {width} {word}", partial(_attention, width, dtype, tile_size)
        yield f"mla {word}", partial(_mla, dtype, tile_size)
    for num_tokens, dtype in itertools.product((1, 512), (torch.bfloat16, torch.float32)):
        yield f"linear {num_tokens} {dtype}", partial(_linear, num_tokens, dtype)


LAUNCHES = dict(_launches())
