"""Launches of Kimi Delta Attention at Kimi-Linear's sizes: 32 heads, K = V = 128."""

import torch

from kernels.kda.fused import chunk_kda, decode_kda, gates
from kernels.packed import Exports, Packed
from tests.kernels.arena import make_arena

H, K, V = 32, 128, 128


def _chunk(tile_size: int = 64) -> None:
    packed = Packed.from_lengths([96, 64], tile_size=tile_size)
    chunk_kda(
        *_tokens(160),
        *gates(*_gate_inputs(160)),
        states=_states(),
        packed=packed,
        slots=torch.arange(2, dtype=torch.int32),
        resumed=torch.zeros(2, dtype=torch.bool),
        exports=Exports.plan(packed, [(0, 64, 2)]),
    )


def _decode() -> None:
    slots = torch.arange(4, dtype=torch.int32)
    decode_kda(*_tokens(4), *_gate_inputs(4), states=_states(), slots=slots)


def _verify() -> None:
    decode_kda(
        *_tokens(4),
        *_gate_inputs(4),
        states=_states(6),
        packed=Packed.from_lengths([3, 1]),
        slots=torch.arange(2, dtype=torch.int32),
        step_slots=torch.arange(2, 6, dtype=torch.int32),
    )


def _states(count: int = 4) -> torch.Tensor:
    return make_arena(count, torch.bfloat16, torch.float32, fill=None).recurrent[5]


def _tokens(count: int) -> tuple[torch.Tensor, ...]:
    mixed = torch.empty(count, 3 * H * K, dtype=torch.bfloat16)
    return tuple(x.unflatten(1, (H, K)) for x in mixed.split(H * K, dim=1))


def _gate_inputs(count: int) -> tuple[torch.Tensor, ...]:
    a = torch.empty(count, H, K, dtype=torch.bfloat16)
    return a, torch.empty(count, H, dtype=torch.bfloat16), torch.empty(H), torch.empty(H, K)


LAUNCHES = {
    "chunk": _chunk,
    "tiles_of_16": lambda: _chunk(16),
    "tiles_of_32": lambda: _chunk(32),
    "decode": _decode,
    "verify": _verify,
}
