"""Formats of matrices: the storage of the weights of one linear layer, and products with them.

A matrix ``[..., M, N]`` is stored as named tensors, its fields. A row of the matrix is a row in
each of them, so rows can be split, gathered and stacked in any format without decoding. Columns can
be divided at multiples of ``Format.unit``.

A new format is a subclass of ``Format`` in a file of its own: its fields, its plain reference
(``widened``), and the products of the kinds of processor that have one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

Product = Callable[[torch.Tensor], torch.Tensor]
"""Linear layer with a bound weight: x ``[T, N]`` to ``[T, M]``, each row by itself."""
Allocate = Callable[..., torch.Tensor]
"""Returns an uninitialised tensor: ``allocate(*shape, dtype=dtype)``."""

BAND_ELEMENTS = 2**20
"""Number of weights that are widened at a time, so that the float32 copy is small."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a stored matrix."""

    dtype: torch.dtype
    columns: int | None = 1
    """Columns of the matrix that a group of elements describes, or None for all. The last group of
    a row may describe fewer."""
    elements: int = 1
    """Number of elements of a group."""

    def width(self, num_columns: int) -> int:
        """Return the number of elements per row."""
        groups = 1 if self.columns is None else -(-num_columns // self.columns)
        return groups * self.elements


class Format(ABC):
    """Storage of one matrix. Instances are immutable, and equal if they store alike."""

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, Field]:
        """Tensors of a matrix, by name."""

    @abstractmethod
    def describe(self) -> str:
        """Return a short name such as ``Q4_K`` or ``fp8 in blocks of 128 columns``."""

    @abstractmethod
    def widened(self, fields: Mapping[str, torch.Tensor], num_columns: int) -> torch.Tensor:
        """Return the weights ``[..., M, num_columns]`` in float32: the plain reference."""

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the fields that approximate ``weight [..., M, N]``. Raises ValueError if this
        format is only read."""
        raise ValueError(f"weights cannot be brought into {self.describe()} here.")

    def has_product(self, linear: ModuleType) -> bool:
        """Return True if ``linear``, a module of linear layers (``reference``, ``native``,
        ``fused``), multiplies this format without widening the weight as a whole."""
        return False

    def product(
        self,
        linear: ModuleType,
        matrix: Matrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        **options: Any,
    ) -> Product:
        """Return ``x @ matrix.T + bias`` for x of ``dtype``, with the code of ``linear``.

        ``options`` are those of ``linear.prepare_8bit``, for formats of 8 bits. By default the
        weight is widened once.
        """
        product: Product = linear.prepare(matrix.widened(dtype), bias)
        return product

    def experts(
        self, moe: ModuleType, up: Matrix, down: Matrix, dtype: torch.dtype, **options: Any
    ) -> Callable[..., torch.Tensor]:
        """Return ``kernels.moe.reference.experts`` with the weights of all experts, stacked, for
        hidden states of ``dtype``. By default each expert has two products."""
        products = [
            (
                one.format.product(moe.linear, one, None, dtype, **options),
                two.format.product(moe.linear, two, None, dtype, **options),
            )
            for one, two in zip(up, down, strict=True)
        ]
        experts: Callable[..., torch.Tensor] = moe.prepare_products(
            products, is_gated=up.shape[1] == 2 * down.shape[2]
        )
        return experts

    @property
    def unit(self) -> int | None:
        """Number of columns between two places where a row can be divided, or None if rows are
        whole."""
        sizes = [field.columns for field in self.fields.values()]
        return None if None in sizes else math.lcm(*(size for size in sizes if size is not None))

    @property
    def num_bits(self) -> float:
        """Bits per weight of long rows."""
        return sum(
            8 * field.dtype.itemsize * field.elements / field.columns
            for field in self.fields.values()
            if field.columns is not None
        )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix ``[..., M, N]``, or a view of a part of one."""

    format: Format
    fields: Mapping[str, torch.Tensor]
    """Tensors ``[..., M, width]``, by name."""
    num_columns: int

    @classmethod
    def empty(cls, format: Format, shape: Sequence[int], allocate: Allocate) -> Matrix:
        """Allocate a matrix of ``shape``."""
        *rows, num_columns = shape
        fields = {
            name: allocate(*rows, field.width(num_columns), dtype=field.dtype)
            for name, field in format.fields.items()
        }
        return cls(format, fields, num_columns)

    @property
    def shape(self) -> tuple[int, ...]:
        return *next(iter(self.fields.values())).shape[:-1], self.num_columns

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.fields.values())

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Matrix]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice | torch.Tensor) -> Matrix:
        """Return a part along the first dimension: a matrix of a stack, or some rows; a view
        unless ``index`` is a tensor."""
        return self._each(lambda tensor: tensor[index])

    def split(self, sizes: Sequence[int]) -> list[Matrix]:
        """Return views of parts of the rows."""
        bounds = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
        return [
            self._each(lambda tensor, a=a, b=b: tensor[..., a:b, :]) for a, b in pairwise(bounds)
        ]

    def columns(self, first: int, end: int) -> Matrix:
        """Return a view of the columns from ``first`` up to ``end``, which are multiples of the
        format's unit; the end of a row is one too."""
        fields = {}
        for name, field in self.format.fields.items():
            part = slice(field.width(first), field.width(end))
            fields[name] = (
                self.fields[name] if field.columns is None else self.fields[name][..., part]
            )
        return Matrix(self.format, fields, end - first)

    def copy_(self, other: Matrix) -> None:
        """Copy a matrix of the same format and shape, from any device."""
        for name, tensor in self.fields.items():
            tensor.copy_(other.fields[name])

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights in ``dtype``, rounded once from float32."""
        first = next(iter(self.fields.values()))
        target = torch.empty(self.shape, dtype=dtype, device=first.device)
        self.widen_into(target)
        return target

    def widen_into(self, target: torch.Tensor) -> None:
        """Write the weights to ``target [..., M, N]``, rounded once from float32, a band of rows at
        a time."""
        if target.ndim > 2:
            for one, part in zip(self, target, strict=True):
                one.widen_into(part)
            return
        band = max(1, BAND_ELEMENTS // self.num_columns)
        for first in range(0, len(target), band):
            rows = self[first : first + band]
            target[first : first + band] = self.format.widened(rows.fields, self.num_columns)

    def _each(self, part: Callable[[torch.Tensor], torch.Tensor]) -> Matrix:
        fields = {name: part(tensor) for name, tensor in self.fields.items()}
        return Matrix(self.format, fields, self.num_columns)


@dataclass(frozen=True, slots=True)
class Plain(Format):
    """Numbers in full precision."""

    dtype: torch.dtype

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"weight": Field(self.dtype)}

    def describe(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def widened(self, fields: Mapping[str, torch.Tensor], num_columns: int) -> torch.Tensor:
        return fields["weight"].float()

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight.to(self.dtype)}

    def has_product(self, linear: ModuleType) -> bool:
        return True

    def product(
        self,
        linear: ModuleType,
        matrix: Matrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        **options: Any,
    ) -> Product:
        weight = matrix.fields["weight"]
        product: Product = linear.prepare(
            weight if weight.dtype is dtype else weight.to(dtype), bias
        )
        return product
