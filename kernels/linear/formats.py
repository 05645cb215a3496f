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
from types import ModuleType

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
        """Return a name with sizes, such as ``fp8 in blocks of 128 columns``."""

    @property
    def kind(self) -> str:
        """Name without sizes: ``int8``, ``fp8``, ``Q4_K``."""
        return self.describe()

    @property
    def keeps_inputs(self) -> bool:
        """True if products must not round their inputs: the format was made for weights only, and
        its products on a CPU round to 8 bits."""
        return False

    @abstractmethod
    def widened(self, fields: Mapping[str, torch.Tensor], num_columns: int) -> torch.Tensor:
        """Return the weights ``[..., M, num_columns]`` in float32: the plain reference."""

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the fields that approximate ``weight [M, N]``. Raises ValueError if this format is
        only read."""
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
        **options: bool,
    ) -> Product:
        """Return ``x @ matrix.T + bias`` for x of ``dtype``, with the code of ``linear``.

        ``options`` are those of ``linear.prepare_8bit``, for formats of 8 bits. By default the
        weight is widened once.
        """
        return linear.prepare(matrix.widened(dtype), bias)

    def products(
        self, linear: ModuleType, stack: Matrix, dtype: torch.dtype, **options: bool
    ) -> Sequence[Product]:
        """Return the product of each matrix of a stack."""
        return [self.product(linear, one, None, dtype, **options) for one in stack]

    def experts(
        self, moe: ModuleType, up: Matrix, down: Matrix, dtype: torch.dtype, **options: bool
    ) -> Callable[..., torch.Tensor]:
        """Return ``kernels.moe.reference.experts`` with the weights of all experts, stacked, for
        hidden states of ``dtype``. By default each expert has two products, unless ``moe``
        multiplies the weights of all experts together in any formats."""
        if hasattr(moe, "prepare_matrices"):
            return moe.prepare_matrices(up, down, dtype, **options)
        stacks = (one.format.products(moe.linear, one, dtype, **options) for one in (up, down))
        return moe.prepare_products(
            list(zip(*stacks, strict=True)), is_gated=up.shape[1] == 2 * down.shape[2]
        )

    @property
    def unit(self) -> int:
        """Number of columns between two places where a row can be divided. Fields of whole rows
        belong to every part."""
        return math.lcm(*(field.columns or 1 for field in self.fields.values()))

    def has_whole(self, index: torch.Tensor, num_columns: int) -> bool:
        """Return True if the columns ``index`` (int64) of a row are runs of whole units; the last
        unit of a row may be smaller."""
        unit, count = self.unit, len(index)
        runs = index[::unit, None] + torch.arange(unit)
        is_ended = count % unit == 0 or int(index[-1]) == num_columns - 1
        is_aligned = not (index[::unit] % unit).any()
        return is_ended and is_aligned and torch.equal(runs.flatten()[:count], index)

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
    def device(self) -> torch.device:
        return next(iter(self.fields.values())).device

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
        pieces = {name: tensor.split(list(sizes), dim=-2) for name, tensor in self.fields.items()}
        return [
            Matrix(self.format, dict(zip(pieces, parts, strict=True)), self.num_columns)
            for parts in zip(*pieces.values(), strict=True)
        ]

    def rows(self, index: torch.Tensor) -> Matrix:
        """Return the rows ``index`` (int64) of a matrix, or of each matrix of a stack."""
        return self._each(lambda tensor: _selected(tensor, -2, index))

    def columns(self, index: torch.Tensor) -> Matrix:
        """Return the columns ``index`` (int64), for which ``Format.has_whole`` is True."""
        unit, fields = self.format.unit, {}
        firsts = index[::unit]
        for name, field in self.format.fields.items():
            tensor, width = self.fields[name], field.width(unit)
            if field.columns is not None:
                places = (firsts // unit * width)[:, None] + torch.arange(width)
                tensor = _selected(tensor, -1, places.flatten()[: field.width(len(index))])
            fields[name] = tensor
        return Matrix(self.format, fields, len(index))

    def to(self, device: torch.device) -> Matrix:
        return self._each(lambda tensor: tensor.to(device))

    @classmethod
    def of(cls, weight: torch.Tensor) -> Matrix:
        """Return a matrix in full precision, which shares its memory with ``weight``."""
        return cls(Plain(weight.dtype), {"weight": weight}, weight.shape[-1])

    def quantized(self, format: Format) -> Matrix:
        """Return the weights in another format, matrix by matrix of a stack."""
        if len(self.shape) == 2:
            weight = self.widened(torch.float32)
            return Matrix(format, format.quantized(weight), self.num_columns)

        def allocate(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=self.device)

        made = Matrix.empty(format, self.shape, allocate)
        for one, part in zip(self, made, strict=True):
            part.copy_(one.quantized(format))
        return made

    def copy_(self, other: Matrix) -> None:
        """Copy a matrix of the same format and shape, from any device."""
        for name, tensor in self.fields.items():
            tensor.copy_(other.fields[name])

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights in ``dtype``, rounded once from float32."""
        target = torch.empty(self.shape, dtype=dtype, device=self.device)
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


def _selected(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Return a part of ``tensor`` along ``dim``: a view if ``index`` has no gaps."""
    if len(index) and not index.diff().ne(1).any():
        return tensor.narrow(dim, int(index[0]), len(index))
    return tensor.index_select(dim, index.to(tensor.device))


@dataclass(frozen=True, slots=True)
class Plain(Format):
    """Numbers in full precision."""

    dtype: torch.dtype

    def describe(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"weight": Field(self.dtype)}

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
        **options: bool,
    ) -> Product:
        return linear.prepare(matrix.fields["weight"].to(dtype), bias)

    def experts(
        self, moe: ModuleType, up: Matrix, down: Matrix, dtype: torch.dtype, **options: bool
    ) -> Callable[..., torch.Tensor]:
        if not isinstance(down.format, Plain):
            return Format.experts(self, moe, up, down, dtype, **options)
        weights = (one.fields["weight"].to(dtype) for one in (up, down))
        return moe.prepare(*weights)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations ``[T, N]``, and the same after ``reference.quantize_rows``."""

    x: torch.Tensor
    rows: torch.Tensor
    scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, tokens: slice) -> QuantizedRows:
        return QuantizedRows(self.x[tokens], self.rows[tokens], self.scale[tokens])
