"""Launches of Gated DeltaNet at Qwen3-Next's sizes: 16 key heads, 32 value heads, K = V = 128."""

import torch

from kernels.gdn.fused import chunk_gdn, decode_gdn, gates
from tests.kernels.arena import make_arena, prompts, verified

H, HV, K, V = 16, 32, 128, 128


def _chunk(state_dtype: torch.dtype = torch.float32, tile_size: int = 64) -> None:
    gate, beta = gates(*_gate_inputs(160))
    chunk_gdn(
        *_tokens(160),
        gate,
        beta,
        states=_states(state_dtype)[5],
        **prompts(tile_size),
    )


def _decode(state_dtype: torch.dtype = torch.float32) -> None:
    slots = torch.arange(4, dtype=torch.int32)
    decode_gdn(*_tokens(4), *_gate_inputs(4), states=_states(state_dtype)[5], slots=slots)


def _bfloat16_states() -> None:
    _chunk(torch.bfloat16)
    _decode(torch.bfloat16)


def _verify() -> None:
    decode_gdn(
        *_tokens(4),
        *_gate_inputs(4),
        states=make_arena(6, torch.bfloat16, torch.float32, fill=None).recurrent[5],
        **verified(),
    )


def _states(dtype: torch.dtype) -> torch.Tensor:
    return make_arena(4, torch.bfloat16, dtype, fill=None).recurrent


def _tokens(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mixed = torch.empty(count, 2 * H * K + HV * V, dtype=torch.bfloat16)
    query, key, value = mixed.split([H * K, H * K, HV * V], dim=1)
    return query.unflatten(1, (H, K)), key.unflatten(1, (H, K)), value.unflatten(1, (HV, V))


def _gate_inputs(count: int) -> tuple[torch.Tensor, ...]:
    a, b = torch.empty(count, 2 * HV, dtype=torch.bfloat16).split(HV, dim=1)
    return a, b, torch.empty(HV), torch.empty(HV)


LAUNCHES = {
    "chunk": _chunk,
    "tiles_of_16": lambda: _chunk(tile_size=16),
    "tiles_of_32": lambda: _chunk(tile_size=32),
    "decode": _decode,
    "verify": _verify,
    "bfloat16_states": _bfloat16_states,
}
