"""Matrices of small integers: a few columns share a scale. The formats of GGUF files (``blocks``)
and of 4-bit checkpoints (``grouped``) have one form in common, which is decoded here.

A block of columns has a scale, and may have a minimum. It consists of groups, each with factors for
both. The weight with the code ``q`` is::

    scale[block] * factors[group] * value(q) - minimum[block] * minima[group]

with ``value(q) = table[q]``, or ``q - zero``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from kernels.linear.formats import Format, Matrix, Product
from kernels.native import DTYPES

UNIT = 32
"""Columns of a row of activations that share a scale."""
MIN_LARGEST = 1e-30
"""Lower bound of the largest magnitude of a unit, so that scales are normal."""


@dataclass(frozen=True, slots=True)
class Groups:
    """A decoded matrix ``[..., M, N]``."""

    codes: torch.Tensor
    """uint8 ``[..., M, N]``, from 0 to ``2**bits - 1``. N is a multiple of a block."""
    scale: torch.Tensor
    """float16, bfloat16 or float32 ``[..., M, blocks]``, or uint8 for ``2**(scale - 128)``."""
    factors: torch.Tensor | None = None
    """int8 ``[..., M, groups]``. None if all are 1."""
    minimum: torch.Tensor | None = None
    """float16 ``[..., M, blocks]``. None if all are 0."""
    minima: torch.Tensor | None = None
    """uint8 ``[..., M, groups]``. None if all are 1, or there is no minimum."""
    zeros: torch.Tensor | None = None
    """uint8 ``[..., M, blocks]``: codes of the weight 0. None if all are ``zero`` of the format."""


class GroupFormat(Format):
    """Format with codes of at most 8 bits that have factors per group and scales per block."""

    bits: int
    """Bits of a code."""
    group: int
    """Columns per group."""
    table: tuple[int, ...] | None
    """int8 value of each code, or None."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Columns per block."""

    @property
    @abstractmethod
    def zero(self) -> int:
        """Code of the weight 0, unless there is a table or a matrix has zeros of its own."""

    @abstractmethod
    def decoded(self, fields: Mapping[str, torch.Tensor]) -> Groups:
        """Return the integers and the scales of a matrix; N is the next multiple of a block."""

    def widened(self, fields: Mapping[str, torch.Tensor], num_columns: int) -> torch.Tensor:
        found = self.decoded(fields)
        weight = self._product(widened_scale(found.scale), found.factors) * self.values(found)
        if found.minimum is not None:
            weight -= self._product(found.minimum.float(), found.minima)
        return weight[..., :num_columns]

    def values(self, found: Groups) -> torch.Tensor:
        """Return the integers that codes stand for, as int32."""
        codes = found.codes.int()
        if self.table is not None:
            return torch.tensor(self.table, dtype=torch.int32, device=codes.device)[codes]
        zeros = found.zeros
        return codes - (self.zero if zeros is None else self._each(zeros.int(), self.block))

    def has_product(self, linear: ModuleType) -> bool:
        """Return True if ``linear`` has a product for groups of this kind: of weights in 4 bits on
        a device, or of blocks with whole units on a processor with AVX2."""
        return hasattr(linear, "has_groups") and bool(linear.has_groups(self))

    def product(
        self,
        linear: ModuleType,
        matrix: Matrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        **options: bool,
    ) -> Product:
        """Return the product of ``linear``: on a CPU with activations in 8 bits
        (``linear_groups``). Without one, and on a CPU for other dtypes than float32 and bfloat16,
        the weight is widened."""
        if (dtype in DTYPES or matrix.device.type != "cpu") and self.has_product(linear):
            return linear.prepare_groups(self, matrix.fields, matrix.num_columns, bias, dtype)
        return Format.product(self, linear, matrix, bias, dtype, **options)

    def products(
        self, linear: ModuleType, stack: Matrix, dtype: torch.dtype, **options: bool
    ) -> Sequence[Product]:
        """Return the product of each matrix of a stack. A CPU packs all of them in one call."""
        count, num_rows, num_columns = stack.shape
        panel = getattr(linear, "GROUP_PANEL", 0)
        if not panel or num_rows % panel or dtype not in DTYPES or not self.has_product(linear):
            return super().products(linear, stack, dtype, **options)
        fields = {name: part.flatten(0, 1) for name, part in stack.fields.items()}
        whole = linear.prepare_groups(self, fields, num_columns, None, dtype)
        return whole.split(count)

    def _product(self, scale: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """Return ``scale * factors`` of every column."""
        if factors is None:
            return self._each(scale, self.block)
        scale = scale.repeat_interleave(self.block // self.group, dim=-1)
        return self._each(scale * factors.float(), self.group)

    @staticmethod
    def _each(values: torch.Tensor, columns: int) -> torch.Tensor:
        return values.repeat_interleave(columns, dim=-1)


def quantize_units(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x ``[T, N]`` to int8 with a float32 scale per unit: ``[T, units, 32]`` and
    ``[T, units]``. Rounding is to nearest even."""
    units = F.pad(x.float(), (0, -x.shape[1] % UNIT)).unflatten(1, (-1, UNIT))
    largest = units.abs().amax(dim=-1).clamp_(min=MIN_LARGEST)
    inverse = torch.full_like(largest, 127.0) / largest  # torch computes 127 / x as 127 * (1 / x)
    return (units * inverse[..., None]).round_().to(torch.int8), largest / 127.0


def linear_groups(
    x: torch.Tensor,
    format: GroupFormat,
    fields: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute ``x @ weight.T + bias`` with activations of ``quantize_units``, in x's dtype.

    Sums of integers within a unit are exact. Units, then blocks, are added in their order, so a row
    is independent of the others. The error is that of the activations: with ``s[t, u]`` the scale
    of ``x[t, n]``, at most ``sum_n |w[m, n]| * s[t, u] / 2``, and roundings of float32.

    A scale per 32 activations changes results by 0.5 % if they are normal, and by 0.8 to 1.2 % if
    some are large. One per 256 would by 0.7 and 1.7 to 3.5 %, one per row by 0.9 and 4 to 11 %.
    Q4_0 weights change them by 8.5 %.

    Args:
        x: ``[T, N]``; fields: of a matrix ``[M, N]``; bias: ``[M]``.
    """
    found = format.decoded(fields)
    numbers, step = quantize_units(x)
    each = (step.shape[1] * UNIT // format.block, format.block // UNIT)  # blocks, units of a block
    values = format.values(found).double().unflatten(1, (*each, 2, UNIT // 2))
    rows = numbers.double().flatten(1).unflatten(1, (*each, 2, UNIT // 2))
    step = step.unflatten(1, each)
    integers = torch.einsum("tbuhn,mbuhn->tmbuh", rows, values)
    sums = step[..., None] * rows.sum(dim=-1).float()
    if found.factors is not None:
        integers = integers * found.factors.double().unflatten(1, (*each, -1))
    integers = integers.sum(dim=-1).float()
    total = torch.zeros(len(x), len(values), device=x.device)
    scale = widened_scale(found.scale)
    for b in range(each[0]):
        part, low = torch.zeros_like(total), torch.zeros_like(total)
        for u in range(each[1]):
            part = multiply_add(integers[:, :, b, u], step[:, None, b, u], part)
            own = sums[:, b, u]
            if format.group == UNIT:
                own = own.sum(dim=1, keepdim=True)
            for h, one in enumerate(own.unbind(1)):
                minima = found.minima
                factor = 1.0 if minima is None else minima.unflatten(1, (*each, -1))[:, b, u, h]
                low = multiply_add(one[:, None], factor, low)
        total = multiply_add(part, scale[:, b], total)
        if found.minimum is not None:
            total = multiply_add(-low, found.minimum[:, b], total)
    if bias is not None:
        total += bias
    return total.to(x.dtype)


def multiply_add(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor) -> torch.Tensor:
    """Compute ``a * b + c`` in float32, rounded once."""
    b = b.double() if isinstance(b, torch.Tensor) else b
    return (a.double() * b + c.double()).float()


def widened_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of ``Groups.scale``."""
    if scale.dtype is not torch.uint8:
        return scale.float()
    exponent = scale.int()
    subnormal = torch.full_like(exponent, 1 << 21) << exponent.clamp(max=1)
    return torch.where(exponent < 2, subnormal, (exponent - 1) << 23).view(torch.float32)


def unpacked(data: torch.Tensor, bits: int, span: int | None = None) -> torch.Tensor:
    """Return numbers of a few ``bits`` from bytes: first the lowest bits of each of ``span`` bytes
    (by default all), then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    spans = data.unflatten(-1, (-1, 1, data.shape[-1] if span is None else span))
    return ((spans >> shifts) & (2**bits - 1)).flatten(-3)
