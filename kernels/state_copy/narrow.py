"""Conversion of states to fewer bits and back, in plain PyTorch, on every device.

It is elementwise except for the largest magnitude per scale, so no value depends on the batch.
"""

from __future__ import annotations

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Code of the largest magnitude, by dtype."""
TINY = 1e-30
"""Smallest scale, used if all values are zero."""


def narrow(
    x: torch.Tensor, dtype: torch.dtype, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise states ``[N, ...]`` to codes of ``dtype`` and float32 scales, symmetric around 0.

    ``dims`` are the dimensions of ``x`` along which scales differ, including 0. Other dimensions of
    the scales have size 1. A code is the nearest to ``x / scale``, ties to even; ``scale`` is the
    largest magnitude divided by ``LARGEST[dtype]``.
    """
    x = x.float()
    others = [dim for dim in range(x.dim()) if dim not in dims]
    largest = LARGEST[dtype]
    scales = (x.abs().amax(others, keepdim=True) / largest).clamp_min(TINY)
    codes = (x / scales).clamp(-largest, largest)
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scales


def widen(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Convert codes to float32 ``[N, ...]``."""
    return codes.float() * scales
