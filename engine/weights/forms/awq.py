"""The form of AWQ: integers in words along the rows, in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.weights.layer_names import Names
from engine.weights.scheme import (
    GroupedScheme,
    Quantization,
    Section,
    Stored,
    Tensors,
    check_served,
    modules_with,
    scale_dtype,
)
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped, from_awq

METHOD, SERVED = "awq", "AWQ with 4 bits"


@dataclass(frozen=True, slots=True)
class AwqScheme(GroupedScheme):
    """One weight ``[M, N]``, stored as ``[N, M / 8]``."""

    def describe(self) -> str:
        return f"AWQ, {self.format.describe()}"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        num_groups = self.num_groups(num_columns)
        return {
            "qweight": Stored(((num_columns, num_rows // 8),), (torch.int32,)),
            "qzeros": Stored(((num_groups, num_rows // 8),), (torch.int32,)),
            "scales": Stored(((num_groups, num_rows),), (self.grouped.dtype,)),
        }

    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        format, fields = from_awq(tensors["qweight"], tensors["scales"], tensors["qzeros"])
        return Matrix(format, fields, num_columns)


def read(section: Section, tensors: Mapping[str, torch.Tensor]) -> Quantization:
    """Read the section. The modules are those with a packed weight."""
    size = section.get("group_size", section.get("q_group_size"))
    served = {"bits": (4,), "w_bit": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,)}
    check_served("AWQ", {**section, "group_size": size}, served | {"group_size": (32, 64, 128)})
    dtype = scale_dtype(tensors, "scales", torch.float16)
    scheme = AwqScheme(Grouped(4, size, True, dtype), is_per_row=False)
    return Quantization(((scheme, modules_with(tensors, "qweight")),), Names.of(()))
