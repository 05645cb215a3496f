"""Launches of the convolution at Qwen3-Next's sizes: 8,192 channels, 4 taps."""

import torch

from kernels.conv1d.fused import decode_conv1d, prefill_conv1d
from tests.kernels.arena import make_arena, prompts, verified

C, W = 8192, 4


def _prefill(tile_size: int = 64) -> None:
    prefill_conv1d(
        _inputs(160),
        _weight(),
        None,
        states=_windows(),
        **prompts(tile_size),
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
        **verified(),
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
