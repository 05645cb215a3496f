"""Matrices of small integers: a few columns share a scale. The formats of GGUF files (``blocks``)
and of 4-bit checkpoints (``grouped``) have one form in common, which is decoded here.

A block of columns has a scale, and may have a minimum. It consists of groups, each with factors for
both. The weight with the code ``q`` is::

    scale[block] * factors[group] * value(q) - minimum[block] * minima[group]

with ``value(q) = table[q]``, or ``q - zero``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernels.linear.formats import Format


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
        if self.table is not None:
            values = torch.tensor(self.table, device=found.codes.device).float()[found.codes.int()]
        else:
            zeros = (
                self.zero if found.zeros is None else self._each(found.zeros.float(), self.block)
            )
            values = found.codes.float() - zeros
        weight = self._product(widened_scale(found.scale), found.factors) * values
        if found.minimum is not None:
            weight -= self._product(found.minimum.float(), found.minima)
        return weight[..., :num_columns]

    def _product(self, scale: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """Return ``scale * factors`` of every column."""
        if factors is None:
            return self._each(scale, self.block)
        scale = scale.repeat_interleave(self.block // self.group, dim=-1)
        return self._each(scale * factors.float(), self.group)

    @staticmethod
    def _each(values: torch.Tensor, columns: int) -> torch.Tensor:
        return values.repeat_interleave(columns, dim=-1)


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
    spans = data.unflatten(-1, (-1, 1, span or data.shape[-1]))
    return ((spans >> shifts) & (2**bits - 1)).flatten(-3)
