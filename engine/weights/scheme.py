"""How an 8-bit weight lies in the files, and which modules of a checkpoint have one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from kernels.linear.reference import STORAGE, Format, quantize

BAND_ELEMENTS = 2**20
"""Weights are widened so many at a time: the float32 copy never matters beside the weights."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
"""Dtypes that scales may have in files. Those in one byte are exponents (ue8m0)."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """The layout of one 8-bit weight ``[M, N]``: ``weight ~ stored * scale``, each scale shared by
    a block."""

    format: Format
    block: tuple[int | None, int | None]
    """Rows and columns that share a scale, those at the end maybe fewer; None: all. ``(1, None)``:
    one scale per output channel."""
    scale_name: str
    """Of the scale's tensor, beside ``weight``."""
    is_weight_only: bool = False
    """Whether activations stay in full precision."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weight."""
        return STORAGE[self.format][0]

    @property
    def has_channel_scales(self) -> bool:
        """Whether every row has one scale, its own or one that others share too."""
        return self.block[1] is None

    def describe(self) -> str:
        """``fp8 in blocks of 128 x 128``."""
        rows, columns = self.block
        if columns is not None:
            said = f"{self.format} in blocks of {rows or 'all'} x {columns}"
        else:
            said = (
                f"{self.format} with a scale per {'tensor' if rows is None else 'output channel'}"
            )
        return f"{said}, weights only" if self.is_weight_only else said

    def scale_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Of the scales of a weight ``[num_rows, num_columns]``: blocks at the ends count in
        full."""
        rows, columns = self.block
        return (
            1 if rows is None else -(-num_rows // rows),
            1 if columns is None else -(-num_columns // columns),
        )

    def row_scales(self, scale: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
        """Scales as in the files, for each row by itself: float32 ``[num_rows, blocks of
        columns]``. So rows can be taken in any order."""
        if scale.dtype is torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        grid = scale.float().reshape(self.scale_shape(num_rows, num_columns))
        rows = self.block[0]
        return grid.repeat_interleave(rows or num_rows, dim=0)[:num_rows]


def widen(
    target: torch.Tensor, stored: torch.Tensor, row_scales: torch.Tensor, columns: int | None
) -> None:
    """``target = stored * scale``, multiplied in float32 and rounded once, to target's dtype.

    Args:
        target, stored: ``[M, N]``; row_scales: float32 ``[M, ceil(N / columns)]``.
        columns: that share a scale; None: all.
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
    """Symmetric, the largest magnitude of a block becoming the format's.

    Args:
        weight: float32 ``[M, N]``; block: rows and columns that share a scale.

    Returns:
        The stored weight ``[M, N]``, and float32 scales ``[ceil(M / rows), ceil(N / columns)]``.
        As ``kernels.linear.reference.quantize``, bit for bit, where a block is a row.
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
    """None: every linear layer."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which modules of a checkpoint are 8-bit. Asked with names of linear layers, as they are in
    the files or without a multimodal wrapping; never with the name of a fused product."""

    label: str
    """What wrote it: compressed-tensors, ModelSlim ..."""
    groups: tuple[ScaleGroup, ...]
    ignored: Names
    ignore_key: str
    """Of config.json: where modules are listed that are not 8-bit."""

    def scheme(self, module: str) -> Scheme | None:
        """Of the linear layer ``module``; None: full precision."""
        if self.ignored.has(module):
            return None
        for group in self.groups:
            if group.targets is None or group.targets.has(module):
                return group.scheme
        return None

    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme there is, once."""
        return tuple(dict.fromkeys(group.scheme for group in self.groups))

    def describe(self) -> str:
        """``fp8 in blocks of 128 x 128``."""
        return " and ".join(scheme.describe() for scheme in self.schemes())

    def check_ignored(self, modules: Iterable[str]) -> None:
        """Raises ModelError where there is a list of ignored modules and nothing of ``modules``,
        names as in the files, is on it."""
        if not self.ignored.is_empty and not any(map(self.ignored.has, modules)):
            raise ModelError(
                f"{self.ignore_key} in config.json matches no module of the weight files "
                f"({self.ignored.sample()}): its entries must be full names as in the files."
            )
