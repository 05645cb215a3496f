"""The form of GPTQ: integers in words along the columns, one group after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
from kernels.linear.grouped import Grouped, from_gptq

METHOD, SERVED = "gptq", "GPTQ with 4 or 8 bits"


@dataclass(frozen=True, slots=True)
class GptqScheme(GroupedScheme):
    """One weight ``[M, N]``, stored as ``[N / numbers per word, M]``."""

    first_zero: int
    """Difference of a zero to the stored one."""

    def describe(self) -> str:
        return f"GPTQ, {self.format.describe()}"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        own = self.grouped
        num_groups = self.num_groups(num_columns)
        num_words, num_zeros = (size * own.bits // 32 for size in (num_columns, num_rows))
        return {
            "qweight": Stored(((num_words, num_rows),), (torch.int32,)),
            "qzeros": Stored(((num_groups, num_zeros),), (torch.int32,)),
            "scales": Stored(((num_groups, num_rows),), (own.dtype,)),
            "g_idx": Stored(((num_columns,),), is_optional=True),
        }

    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        own = self.grouped
        format, fields = from_gptq(
            tensors["qweight"],
            tensors["scales"],
            tensors["qzeros"] if own.has_zeros else None,
            own.bits,
            tensors.get("g_idx"),
            self.first_zero,
        )
        return Matrix(format, fields, num_columns)


def read(section: Section, tensors: Mapping[str, torch.Tensor]) -> Quantization:
    """Read the section. The modules are those with a packed weight."""
    size = section["group_size"]
    served = {"bits": (4, 8), "group_size": (-1, 32, 64, 128)}
    check_served("GPTQ", section, served | {"checkpoint_format": ("gptq", "gptq_v2", "", None)})
    first_zero = 0 if section.get("checkpoint_format") == "gptq_v2" else 1
    dtype = scale_dtype(tensors, "scales", torch.float16)
    grouped = Grouped(section["bits"], 128 if size < 0 else size, True, dtype)
    middle = grouped.zero - first_zero
    byte = middle if grouped.bits == 8 else middle | middle << 4
    word = int.from_bytes(bytes(4 * [byte]), "little", signed=True)
    zeros = (tensor for name, tensor in tensors.items() if name.endswith(".qzeros"))
    if all((tensor == word).all() for tensor in zeros):  # symmetric, whatever the section says
        grouped = replace(grouped, has_zeros=False)
    scheme = GptqScheme(grouped, size < 0, first_zero)
    return Quantization(((scheme, modules_with(tensors, "qweight")),), Names.of(()))
