"""Launches of pointwise kernels, convolutions (8,192 channels, 4 taps) and copies at Qwen3-Next's
sizes."""

import torch

from kernels.activation.fused import relu_squared, sigmoid_mul, silu_and_mul, silu_mul
from kernels.cache_write.fused import gather_rows, move_rows, write_kv, write_rows
from kernels.conv1d.fused import decode_conv1d, prefill_conv1d
from kernels.norm.fused import gated_rms_norm, rms_norm
from kernels.rotary.fused import rotate, rotate_and_write
from kernels.state_copy.fused import copy_states
from tests.kernels.arena import make_arena, prompts, verified


def _bfloat16(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def _norm() -> None:
    x = _bfloat16(64, 2048)
    rms_norm(x, _bfloat16(2048), 1e-6)
    rms_norm(x, _bfloat16(2048), 1e-6, residual=x)
    rms_norm(_bfloat16(64, 18, 256)[:, :16], _bfloat16(256), 1e-6)
    gated_rms_norm(_bfloat16(64, 32, 128), torch.empty(128), _bfloat16(64, 32, 128), 1e-6)
    groups = _bfloat16(64, 8, 1024)
    gated_rms_norm(groups, torch.empty(8, 1024), groups, 1e-6, gate_first=True)


def _rotary() -> None:
    angles = _bfloat16(64, 64)
    rotate(_bfloat16(64, 16, 256), _bfloat16(64, 2, 256), angles, angles)
    arena = make_arena(4, torch.bfloat16, torch.float32, fill=None)
    query, key, value = _bfloat16(64, 20, 256).split([16, 2, 2], dim=1)
    rotate_and_write(
        *(query, key, value, arena.keys[5], arena.values[5], torch.zeros(64, dtype=torch.int64)),
        norms=(torch.empty(256), torch.empty(256)),
        eps=1e-6,
        angles=(angles, angles),
    )


def _activation() -> None:
    silu_and_mul(_bfloat16(64, 1024))
    sigmoid_mul(_bfloat16(64, 4096), _bfloat16(64, 4096))
    sigmoid_mul(_bfloat16(64, 2048), _bfloat16(64, 1))
    silu_mul(_bfloat16(64, 2048), _bfloat16(64, 2048))
    relu_squared(_bfloat16(64, 2048))


def _cache_write() -> None:
    new, arena = _bfloat16(64, 2, 256), make_arena(4, torch.bfloat16, torch.float32, fill=None)
    write_kv(new, new, arena.keys[5], arena.values[5], torch.zeros(64, dtype=torch.int64))
    latents = torch.empty(64, 576, dtype=torch.bfloat16)
    write_rows(latents, latents, torch.zeros(64, dtype=torch.int64))
    rows = torch.zeros(64, dtype=torch.int32)
    move_rows(arena.rows, rows, rows)
    gather_rows(arena.rows, rows, torch.empty_like(arena.rows[:64]))


def _conv1d(tile_size: int = 64) -> None:
    weight, where = _bfloat16(8192, 4), prompts(tile_size)
    windows = make_arena(6, torch.bfloat16, torch.float32, fill=None).conv[5]
    prefill_conv1d(_bfloat16(160, 8192), weight, None, states=windows, **where)
    for step in ({"slots": torch.arange(4, dtype=torch.int32)}, verified()):
        decode_conv1d(_bfloat16(4, 8192), weight, None, states=windows, **step)


def _state_copy() -> None:
    arena = make_arena(4, torch.bfloat16, torch.float32, fill=None)
    slots = torch.arange(4, dtype=torch.int32)
    copy_states([arena.recurrent, arena.conv], slots[:2], slots[2:])
    copy_states([arena.slabs], slots[:2], slots[2:])


LAUNCHES = {
    "norm": _norm,
    "rotary": _rotary,
    "activation": _activation,
    "cache_write": _cache_write,
    "conv1d": _conv1d,
    "conv1d tiles_of_16": lambda: _conv1d(16),
    "state_copy": _state_copy,
}
