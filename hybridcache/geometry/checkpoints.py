"""Checkpoint formats that are smaller than running states, and their sizes.

>>> format = CheckpointFormat.parse("int8:head")
>>> format.num_scales((8, 32, 32)), format.per
(8, 'head')
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybridcache.geometry.sizes import ModelSizes

CODE_BYTES = {"bfloat16": 2, "int8": 1, "fp8": 1}
SCALE_BYTES = 4
SCALINGS = ("head", "row", "column")
DEFAULT_SCALING = "column"
"""Scaling used if none is given: the most exact for every kind of state, and no larger than
``row`` (docs/engine/steps.md has the figures). A state is ``[heads, keys or state, values or
channels]``, so a column is one channel."""
ALIGNMENT = 16
"""Alignment in bytes of each of the three parts of a checkpoint."""


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """Format of the recurrent states in a checkpoint. Conv states are copied unchanged."""

    dtype: str
    """A key of ``CODE_BYTES``."""
    per: str | None = None
    """Numbers that share one float32 scale: a ``head``, a ``row`` of it (its last dimension) or a
    ``column``. None if nothing is scaled."""

    @classmethod
    def parse(cls, spec: str) -> CheckpointFormat | None:
        """Parse ``bfloat16``, ``int8`` or ``fp8``, the last two with ``:head``, ``:row`` or
        ``:column`` or without. Returns None for ``auto``, the format of the running states."""
        if spec == "auto":
            return None
        dtype, colon, per = spec.partition(":")
        scaled = dtype in CODE_BYTES and dtype != "bfloat16"
        if dtype not in CODE_BYTES or (colon and not (scaled and per in SCALINGS)):
            raise ValueError(
                "checkpoint_dtype must be auto, bfloat16, int8 or fp8, the last two with :head, "
                f":row or :column, as in int8:row (got {spec!r})."
            )
        return cls(dtype, (per or DEFAULT_SCALING) if scaled else None)

    @property
    def spec(self) -> str:
        """Full name of the format, such as ``int8:column``. It determines the byte layout."""
        return self.dtype if self.per is None else f"{self.dtype}:{self.per}"

    def kept_dims(self, num_dims: int) -> tuple[int, ...]:
        """Return the dimensions along which scales differ."""
        if self.per == "head":
            return (0,)
        *outer, row, last = range(num_dims)
        return (*outer, row if self.per == "row" else last)

    def num_scales(self, shape: tuple[int, ...]) -> int:
        """Return the number of scales of one state."""
        if self.per is None:
            return 0
        return math.prod(shape[dim] for dim in self.kept_dims(len(shape)))

    def num_bytes(self, sizes: ModelSizes, conv_bytes: int) -> int:
        """Return the size of a checkpoint with ``conv_bytes`` of conv states."""
        shapes = [spec.shape for spec in sizes.specs() if spec.kind == "recurrent"]
        codes = sizes.size_of("recurrent") * CODE_BYTES[self.dtype]
        scales = sum(map(self.num_scales, shapes)) * SCALE_BYTES
        return aligned(conv_bytes) + aligned(codes) + aligned(scales)


def aligned(num_bytes: int) -> int:
    """Round up to a multiple of ``ALIGNMENT``, the width of one wide load."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
