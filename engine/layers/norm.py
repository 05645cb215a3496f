"""RMSNorm, plain and Gemma-style."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.layers.parameters import Build, Parameter, Role


class RMSNorm:
    """``x / rms(x) * weight``. With ``centred`` the weight is stored around zero: ``* (1 +
    weight)``."""

    def __init__(
        self, name: str, size: int, build: Build, *, eps: float, centred: bool = False
    ) -> None:
        self.name, self.size, self.eps = name, size, eps
        self.weight = build.weights.empty(size)
        self._offset = 1.0 if centred else 0.0
        self._norm = build.kernels["norm"].rms_norm

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        role: Role = "centred_norm" if self._offset else "norm"
        yield f"{self.name}.weight", Parameter(self.weight, role)

    def seal(self) -> None:
        self.weight = self.weight.float() + self._offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of x + residual, x + residual). ``residual`` is None in the first layer."""
        if residual is None:
            return self(x), x
        return self._norm(x, self.weight, self.eps, residual=residual)
