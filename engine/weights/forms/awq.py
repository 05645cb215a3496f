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

    FIELDS = "group_size"

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
        parts = tensors["qweight"], tensors["scales"], tensors["qzeros"]
        format, fields = from_awq(*parts, self.group)
        return Matrix(format, fields, num_columns)


def read(section: Section, tensors: Mapping[str, torch.Tensor]) -> Quantization:
    """Read the section. The modules are those with a packed weight."""
    size = section.get("group_size", section.get("q_group_size"))
    forms: tuple[object, ...] = ("gemm", "GEMM", "", None)
    served: dict[str, tuple[object, ...]] = {"bits": (4,), "w_bit": (4,), "version": forms}
    served |= {
        "zero_point": (True,),
        "checkpoint_format": forms,
        "format": forms,
        "pack_dtype": ("int32", None),
    }
    served |= dict.fromkeys(("adapter", "rotation"), (None,)) | {"dynamic": ({}, None)}
    check_served("AWQ", {**section, "group_size": size}, served | {"group_size": (32, 64, 128)})
    dtype = scale_dtype(tensors, "scales", torch.float16)
    scheme = AwqScheme(Grouped(4, size, True, dtype), is_per_row=False)
    return Quantization(((scheme, modules_with(tensors, "qweight")),), Names.of(()))
