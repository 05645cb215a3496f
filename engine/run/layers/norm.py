"""RMSNorm, plain and Gemma-style."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.run.backends import Kernels
from engine.run.layers.parameters import Parameter, WeightSpec


class RMSNorm:
    """``x / rms(x) * weight``; with ``centred`` the weight is stored around zero: ``* (1 +
    weight)``."""

    def __init__(
        self, size: int, eps: float, kernels: Kernels, place: WeightSpec, *, centred: bool
    ) -> None:
        self.weight = place.empty(size)
        self.eps = eps
        self.offset = 1.0 if centred else 0.0
        self._norm = kernels.norm.rms_norm

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        yield f"{prefix}.weight", Parameter(self.weight, "centred_norm" if self.offset else "norm")

    def seal(self) -> None:
        self.weight = self.weight.float() + self.offset
        self.offset = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual); the first layer has no residual yet."""
        if residual is None:
            return self(x), x
        return self._norm(x, self.weight, self.eps, residual=residual)
