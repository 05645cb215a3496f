"""States in fewer bits and back, in plain PyTorch, on every device: elementwise but for the largest
magnitude of what shares a scale, so no number depends on what is copied beside it."""

from __future__ import annotations

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Codes that the largest magnitude becomes."""
TINY = 1e-30
"""The least scale: of nothing but zeros."""


def narrow(
    x: torch.Tensor, dtype: torch.dtype, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of ``dtype``, float32 scales) of states ``[N, ...]``, symmetric around 0.

    - ``dims``: of ``x``, those in which scales differ, 0 among them; elsewhere their size is 1.

    A code is the nearest to ``x / scale``, half to even; ``scale`` is the largest magnitude over
    ``LARGEST[dtype]``.
    """
    x = x.float()
    others = [dim for dim in range(x.dim()) if dim not in dims]
    largest = LARGEST[dtype]
    scales = (x.abs().amax(others, keepdim=True) / largest).clamp_min(TINY)
    codes = (x / scales).clamp(-largest, largest)
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scales


def widen(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 ``[N, ...]``."""
    return codes.float() * scales
