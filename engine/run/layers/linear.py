"""Dense projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from engine.run.backends import Kernels
from engine.run.layers.parameters import Parameter, WeightSpec


class Linear:
    """``x @ weight.T + bias``, rows independent of how many there are; 8-bit where ``place`` says
    so, unless ``full_precision``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernels: Kernels,
        place: WeightSpec,
        *,
        bias: bool = False,
        full_precision: bool = False,
    ) -> None:
        self._quantization = None if full_precision else place.quantization
        self.weight = place.empty(out_features, in_features)
        self.bias = place.empty(out_features) if bias else None
        self._kernel = kernels.linear
        self._product: Callable[[torch.Tensor], torch.Tensor]

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        yield f"{prefix}.weight", Parameter(self.weight)
        if self.bias is not None:
            yield f"{prefix}.bias", Parameter(self.bias)

    def seal(self) -> None:
        if self._quantization is None:
            self._product = self._kernel.prepare(self.weight, self.bias)
        else:
            self._product = self._kernel.prepare_8bit(self.weight, self.bias, self._quantization)
        del self.weight, self.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)
