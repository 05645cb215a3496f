"""Layout of 8-bit weights in files, and the modules of a checkpoint that have one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from kernels.linear.reference import STORAGE, Format, quantize

BAND_ELEMENTS = 2**20
"""Number of weights that are dequantised at a time, so that the float32 copy is small."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Supported dtypes of scales in files."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Layout of one 8-bit weight ``[M, N]``: ``weight ~ stored * scale``, with one scale per
    block."""

    format: Format
    block: tuple[int | None, int | None]
    """Rows and columns of a block; blocks at the end may be smaller. None means all; ``(1, None)``
    is one scale per output channel."""
    scale_name: str
    """Last part of the name of the scales, in place of ``weight``."""
    is_weight_only: bool = False
    """True if activations stay in full precision."""

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored weight."""
        return STORAGE[self.format][0]

    @property
    def has_channel_scales(self) -> bool:
        """True if every row has one scale, possibly shared with other rows."""
        return self.block[1] is None

    def describe(self) -> str:
        """Return a description such as ``fp8 in blocks of 128 x 128``."""
        rows, columns = self.block
        if columns is not None:
            said = f"{self.format} in blocks of {rows or 'all'} x {columns}"
        else:
            said = (
                f"{self.format} with a scale per {'tensor' if rows is None else 'output channel'}"
            )
        return f"{said}, weights only" if self.is_weight_only else said

    def scale_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a weight ``[num_rows, num_columns]``. Partial blocks
        count."""
        rows, columns = self.block
        return (
            1 if rows is None else -(-num_rows // rows),
            1 if columns is None else -(-num_columns // columns),
        )

    def row_scales(self, scale: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
        """Expand the scales of a file to one line per row: float32 ``[num_rows, blocks of
        columns]``. Rows can then be read in any order."""
        grid = scale.float().reshape(self.scale_shape(num_rows, num_columns))
        rows = self.block[0]
        return grid.repeat_interleave(rows or num_rows, dim=0)[:num_rows]


def widen(
    target: torch.Tensor, stored: torch.Tensor, row_scales: torch.Tensor, columns: int | None
) -> None:
    """Compute ``target = stored * scale`` in float32, rounded once to target's dtype.

    Args:
      target, stored: ``[M, N]``; row_scales: float32 ``[M, ceil(N / columns)]``.
      columns: number of columns that share a scale, or None if all do.
    """
    num_columns = stored.shape[1]
    band = max(1, BAND_ELEMENTS // num_columns)
    for first in range(0, len(stored), band):
        rows = slice(first, first + band)
        scale = row_scales[rows]
        if columns is not None:
            scale = scale.repeat_interleave(columns, dim=1)[:, :num_columns]
        target[rows] = stored[rows].float().mul_(scale)


def quantize_blocks(
    weight: torch.Tensor, format: Format, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise symmetrically: the largest magnitude of a block becomes that of the format.

    Args:
      weight: float32 ``[M, N]``; block: rows and columns that share a scale.

    Returns:
      The stored weight ``[M, N]``, and float32 scales ``[ceil(M / rows), ceil(N / columns)]``.
      For blocks of one row, the bits equal those of ``kernels.linear.reference.quantize``.
    """
    (num_rows, num_columns), (rows, columns) = weight.shape, block
    padded = F.pad(weight, (0, -num_columns % columns, 0, -num_rows % rows))
    grid = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    stored, scale = quantize(grid.flatten(2), format)
    stored = stored.view(grid.shape).transpose(1, 2).flatten(2).flatten(0, 1)
    return stored[:num_rows, :num_columns].contiguous(), scale


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Modules that share a scheme."""

    scheme: Scheme
    targets: Names | None
    """Modules of the group, or None for every linear layer."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Formats of the modules of a checkpoint. Modules are named as in the files or without a
    multimodal prefix; fused products are not supported."""

    groups: tuple[ScaleGroup, ...]
    ignored: Names
    ignore_key: str
    """Key of config.json that lists modules in full precision."""

    def scheme(self, module: str) -> Scheme | None:
        """Return the format of the linear layer ``module``, or None for full precision."""
        if self.ignored.has(module):
            return None
        for group in self.groups:
            if group.targets is None or group.targets.has(module):
                return group.scheme
        return None

    def schemes(self) -> tuple[Scheme, ...]:
        """Return every distinct scheme."""
        return tuple(dict.fromkeys(group.scheme for group in self.groups))

    def describe(self) -> str:
        """Return a description such as ``fp8 in blocks of 128 x 128``."""
        return " and ".join(scheme.describe() for scheme in self.schemes())

    def check_ignored(self, modules: Iterable[str]) -> None:
        """Raise ModelError if there is a list of ignored modules that contains none of ``modules``,
        which are named as in the files."""
        if not self.ignored.is_empty and not any(map(self.ignored.has, modules)):
            raise ModelError(
                f"{self.ignore_key} in config.json matches no module of the weight files "
                f"({self.ignored.sample()}): its entries must be full names as in the files."
            )
