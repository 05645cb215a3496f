"""Launches of Kimi Delta Attention at Kimi-Linear's sizes: 32 heads, K = V = 128."""

import torch

from kernels.kda.fused import chunk_kda, decode_kda, gates
from tests.kernels.arena import make_arena, prompts, verified

H, K, V = 32, 128, 128


def _chunk(tile_size: int = 64) -> None:
    chunk_kda(
        *_tokens(160),
        *gates(*_gate_inputs(160)),
        states=_states(),
        **prompts(tile_size),
    )


def _decode() -> None:
    slots = torch.arange(4, dtype=torch.int32)
    decode_kda(*_tokens(4), *_gate_inputs(4), states=_states(), slots=slots)


def _verify() -> None:
    decode_kda(
        *_tokens(4),
        *_gate_inputs(4),
        states=_states(6),
        **verified(),
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
