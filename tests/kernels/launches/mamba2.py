"""Launches of Mamba-2 at Nemotron-H's sizes (128 heads of 64, 8 groups, a state of 128), and with
Falcon-H1's state of 256."""

import torch

from kernels.mamba2.fused import chunk_mamba2, decode_mamba2, gates
from tests.kernels.arena import prompts, verified

HV, V = 128, 64


def _chunk(
    state_dtype: torch.dtype = torch.float32,
    groups: int = 8,
    state_size: int = 128,
    tile_size: int = 64,
) -> None:
    gate, step = gates(*_gate_inputs(160))
    chunk_mamba2(
        *_tokens(160, groups, state_size),
        gate,
        step,
        torch.empty(HV),
        states=torch.empty(4, HV, state_size, V, dtype=state_dtype),
        **prompts(tile_size),
    )


def _decode(
    state_dtype: torch.dtype = torch.float32, groups: int = 8, state_size: int = 128
) -> None:
    decode_mamba2(
        *_tokens(4, groups, state_size),
        *_gate_inputs(4),
        torch.empty(HV),
        states=torch.empty(4, HV, state_size, V, dtype=state_dtype),
        slots=torch.arange(4, dtype=torch.int32),
    )


def _verify(groups: int = 8, state_size: int = 128) -> None:
    decode_mamba2(
        *_tokens(4, groups, state_size),
        *_gate_inputs(4),
        torch.empty(HV),
        states=torch.empty(6, HV, state_size, V),
        **verified(),
    )


def _bfloat16_states() -> None:
    _chunk(torch.bfloat16)
    _decode(torch.bfloat16)


def _large_state() -> None:
    _chunk(groups=1, state_size=256)
    _decode(groups=1, state_size=256)
    _verify(groups=1, state_size=256)


def _tokens(count: int, groups: int, state_size: int) -> tuple[torch.Tensor, ...]:
    sizes = [HV * V, groups * state_size, groups * state_size]
    x, B, C = torch.empty(count, sum(sizes), dtype=torch.bfloat16).split(sizes, dim=1)
    return x.unflatten(1, (HV, V)), *(part.unflatten(1, (groups, -1)) for part in (B, C))


def _gate_inputs(count: int) -> tuple[torch.Tensor, ...]:
    dt = torch.empty(count, 3 * HV, dtype=torch.bfloat16)[:, HV : 2 * HV]
    return dt, torch.empty(HV), torch.empty(HV)


LAUNCHES = {
    "chunk": _chunk,
    "tiles_of_16": lambda: _chunk(tile_size=16),
    "tiles_of_32": lambda: _chunk(tile_size=32),
    "large_state": _large_state,
    "decode": _decode,
    "verify": _verify,
    "bfloat16_states": _bfloat16_states,
}
