"""Dense projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from engine.run.layers.parameters import Build, Parameter, Precision

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of the weight files among those that read the same input."""

    name: str
    """Full, without ``.weight``."""
    num_rows: int
    rows: torch.Tensor | None = None
    """As ``Parameter.rows``."""


class Linear:
    """``x @ weight.T + bias``, rows independent of how many there are. The outputs of all parts
    stand side by side; neighbours of one precision, which each part's name decides, are one
    product."""

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        build: Build,
        *,
        bias: bool = False,
        weight: torch.Tensor | None = None,
    ) -> None:
        """``weight``: of all parts, in place of one of its own."""
        precisions = groupby(parts, key=lambda part: build.weights.precision(part.name))
        self._stacks = [
            _Stack(in_features, list(stacked), precision, build, bias=bias, weight=weight)
            for precision, stacked in precisions
        ]
        self._kernel = build.kernels["linear"]
        self._products: list[Product] = []

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for stack in self._stacks:
            yield from stack.parameters()

    def seal(self) -> None:
        self._products = [stack.product(self._kernel) for stack in self._stacks]
        self._stacks.clear()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self._products) == 1:
            return self._products[0](x)
        return torch.cat([product(x) for product in self._products], dim=-1)


class _Stack:
    """Parts of one precision, below each other in one weight."""

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        precision: Precision | None,
        build: Build,
        *,
        bias: bool,
        weight: torch.Tensor | None,
    ) -> None:
        self._parts, self._precision = parts, precision
        num_rows = sum(part.num_rows for part in parts)
        self._weight = build.weights.empty(num_rows, in_features) if weight is None else weight
        self._bias = build.weights.empty(num_rows) if bias else None

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        sizes = [part.num_rows for part in self._parts]
        tensors = {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})
        for word, tensor in tensors.items():
            for part, target in zip(self._parts, tensor.split(sizes), strict=True):
                yield f"{part.name}.{word}", Parameter(target, rows=part.rows)

    def product(self, kernel: Any) -> Product:
        made: Product
        if self._precision is None:
            made = kernel.prepare(self._weight, self._bias)
        else:
            quantized, scale = kernel.quantize(self._weight, self._precision)
            made = kernel.prepare_8bit(quantized, scale, self._bias)
        return made
