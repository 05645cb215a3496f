"""Weights in 8 bits with a scale for each row, or for each block of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from kernels.linear.formats import Field, Format, Matrix, Product
from kernels.linear.reference import STORAGE, quantize


@dataclass(frozen=True, slots=True)
class EightBits(Format):
    """``weight * scale``, symmetric: integers, or floating-point numbers (e4m3)."""

    kind: Literal["int8", "fp8"]
    columns: int | None = None
    """Number of columns that share a scale, or None if all do."""
    keeps_inputs: bool = False

    @property
    def fields(self) -> Mapping[str, Field]:
        stored, scales = Field(STORAGE[self.kind][0]), Field(torch.float32, self.columns)
        return {"weight": stored, "scale": scales}

    def describe(self) -> str:
        blocks = "rows" if self.columns is None else f"blocks of {self.columns} columns"
        return f"{self.kind} in {blocks}"

    def widened(self, fields: Mapping[str, torch.Tensor], num_columns: int) -> torch.Tensor:
        scale = fields["scale"]
        if self.columns is not None:
            scale = scale.repeat_interleave(self.columns, dim=-1)[..., :num_columns]
        return fields["weight"].float().mul_(scale)

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.columns is not None:
            return Format.quantized(self, weight)
        stored, scale = quantize(weight, self.kind)
        return {"weight": stored, "scale": scale[..., None]}

    def has_product(self, linear: ModuleType) -> bool:
        return (self.kind, self.columns) in linear.PRODUCTS

    def product(
        self,
        linear: ModuleType,
        matrix: Matrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        **options: bool,
    ) -> Product:
        return linear.prepare_8bit(*stored_parts(matrix), bias, dtype, **options)

    def experts(
        self, moe: ModuleType, up: Matrix, down: Matrix, dtype: torch.dtype, **options: bool
    ) -> Callable[..., torch.Tensor]:
        if down.format != up.format:
            return Format.experts(self, moe, up, down, dtype, **options)
        weights = *stored_parts(up), *stored_parts(down)
        return moe.prepare_8bit(*weights, dtype, **options)


def stored_parts(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight in 8 bits, and its scales ``[..., M, blocks]``, or ``[..., M]`` of one."""
    scale = matrix.fields["scale"]
    return matrix.fields["weight"], scale.squeeze(-1) if scale.shape[-1] == 1 else scale
