"""Angles of the rotary position embedding, by position."""

from __future__ import annotations

import torch

from engine.run.model_config import Rope


class RotaryTable:
    """cos and sin ``[max_model_len, R]`` in the model's dtype, both halves equal: looked up, so
    that a position always has the same bits. R is 0 for a model that rotates nothing."""

    def __init__(
        self, rope: Rope | None, max_model_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        theta, dim = (rope.theta, rope.dim) if rope is not None else (1.0, 0)
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        frequencies = 1.0 / theta**exponents
        angles = torch.arange(max_model_len, dtype=torch.float)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        self.cos = angles.cos().to(device, dtype)
        self.sin = angles.sin().to(device, dtype)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of int64[T] positions: ``[T, R]`` each."""
        return self.cos[positions], self.sin[positions]
