"""Launches of the convolution at Qwen3-Next's sizes: 8,192 channels, 4 taps."""

import torch

from kernels.conv1d.fused import decode_conv1d, prefill_conv1d
from kernels.packed import Exports, Packed
from tests.kernels.arena import make_arena

C, W = 8192, 4


def _prefill(tile_size: int = 64) -> None:
    packed = Packed.from_lengths([96, 64], tile_size=tile_size)
    prefill_conv1d(
        _inputs(160),
        _weight(),
        None,
        states=_windows(),
        packed=packed,
        slots=torch.arange(2, dtype=torch.int32),
        resumed=torch.zeros(2, dtype=torch.bool),
        exports=Exports.plan(packed, [(0, 64, 2)]),
    )


def _decode() -> None:
    slots = torch.arange(4, dtype=torch.int32)
    decode_conv1d(_inputs(4), _weight(), None, states=_windows(), slots=slots)


def _verify() -> None:
    decode_conv1d(
        _inputs(4),
        _weight(),
        None,
        states=make_arena(6, torch.bfloat16, torch.float32, fill=None).conv[5],
        packed=Packed.from_lengths([3, 1]),
        slots=torch.arange(2, dtype=torch.int32),
        step_slots=torch.arange(2, 6, dtype=torch.int32),
    )


def _inputs(count: int) -> torch.Tensor:
    return torch.empty(count, C, dtype=torch.bfloat16)


def _weight() -> torch.Tensor:
    return torch.empty(C, W, dtype=torch.bfloat16)


def _windows() -> torch.Tensor:
    return make_arena(4, torch.bfloat16, torch.float32, fill=None).conv[5]


LAUNCHES = {
    "prefill": _prefill,
    "tiles_of_16": lambda: _prefill(16),
    "decode": _decode,
    "verify": _verify,
}
