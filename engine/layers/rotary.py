"""Angles of the rotary position embedding, by position."""

from __future__ import annotations

import math

import torch

from engine.weights.model_config import LinearScaling, Llama3Scaling, Rope, YarnScaling


class RotaryTable:
    """cos and sin ``[max_model_len, R]`` in the model's dtype, with equal halves. A table, so that
    a position always has the same bits. R is 0 for a model without rotation."""

    def __init__(
        self, rope: Rope | None, max_model_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        frequencies, factor = torch.empty(0), 1.0
        if rope is not None:
            frequencies = scaled_frequencies(rope)
            if isinstance(rope.scaling, YarnScaling):
                factor = rope.scaling.attention_factor
        angles = torch.arange(max_model_len, dtype=torch.float)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        self.cos = (angles.cos() * factor).to(device, dtype)
        self.sin = (angles.sin() * factor).to(device, dtype)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of int64[T] positions: ``[T, R]`` each."""
        return self.cos[positions], self.sin[positions]


def scaled_frequencies(rope: Rope) -> torch.Tensor:
    """Return the radians per position of each pair of dimensions: float32 ``[rope.dim / 2]``."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float) / rope.dim
    frequencies, scaling = 1.0 / rope.theta**exponents, rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        rotations = scaling.original_len * frequencies / (2 * math.pi)
        kept = (rotations - scaling.low) / (scaling.high - scaling.low)
    elif isinstance(scaling, YarnScaling):
        kept = 1.0 - _yarn_ramp(rope, scaling)
    else:
        return frequencies
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)


def _yarn_ramp(rope: Rope, scaling: YarnScaling) -> torch.Tensor:
    """Return a ramp from 0 at the last index that is kept to 1 at the first that is divided, and
    linear beyond."""
    first, last = (
        _index_of(rotations, rope, scaling.original_len)
        for rotations in (scaling.fast, scaling.slow)
    )
    if scaling.truncates:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    if first == last:
        last += 0.001
    return (torch.arange(rope.dim // 2, dtype=torch.float) - first) / (last - first)


def _index_of(rotations: float, rope: Rope, length: float) -> float:
    """Return the (fractional) index of the frequency with the given number of rotations within
    ``length``."""
    return rope.dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
