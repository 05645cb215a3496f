"""Checkpoints in fewer bits than running states: in which format, and what one then weighs.

>>> format = CheckpointFormat.parse("int8:head")
>>> format.num_scales((8, 32, 32)), format.per
(8, 'head')
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybridcache.geometry.sizes import ModelSizes, StateSpec

CODE_BYTES = {"bfloat16": 2, "int8": 1, "fp8": 1}
SCALE_BYTES = 4
SCALINGS = ("head", "row", "column")
DEFAULT_SCALING = "column"
"""The most exact for every kind of state, and no larger than ``row`` (engine/README.md has the
figures). A state is ``[heads, keys or state, values or channels]``: a column is one channel."""
ALIGNMENT = 16
"""Bytes. Each of the three parts of a checkpoint begins at a multiple of it."""


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """Of the recurrent states in a checkpoint; conv states stay as they are."""

    dtype: str
    """A key of ``CODE_BYTES``."""
    per: str | None = None
    """Numbers that share a float32 scale: those of a head, of a row of it (its last dimension), or
    of a column; None: nothing is scaled."""

    @classmethod
    def parse(cls, word: str) -> CheckpointFormat | None:
        """``bfloat16``, ``int8``, ``fp8``, these two with ``:head``, ``:row`` or ``:column``
        (which is meant where nothing is said); ``auto``: None, the running states' own.
        ValueError."""
        if word == "auto":
            return None
        dtype, colon, per = word.partition(":")
        scaled = dtype in CODE_BYTES and dtype != "bfloat16"
        if dtype not in CODE_BYTES or (colon and not (scaled and per in SCALINGS)):
            raise ValueError(
                "checkpoint_dtype must be auto, bfloat16, int8 or fp8, the last two with :head, "
                f":row or :column, as in int8:row; not {word!r}."
            )
        return cls(dtype, (per or DEFAULT_SCALING) if scaled else None)

    @property
    def word(self) -> str:
        """The format in full, as in ``int8:column``: what the layout of the bytes depends on."""
        return self.dtype if self.per is None else f"{self.dtype}:{self.per}"

    def kept_dims(self, num_dims: int) -> tuple[int, ...]:
        """Dimensions of a state in which scales differ; none of one whose layout is not known."""
        last = num_dims - 1
        if last == 0:
            return ()
        return {
            "head": (0,),
            "row": tuple(range(last)),
            "column": (*range(last - 1), last),
        }[self.per or DEFAULT_SCALING]

    def num_scales(self, shape: tuple[int, ...]) -> int:
        """Of one state."""
        if self.per is None:
            return 0
        return math.prod(shape[dim] for dim in self.kept_dims(len(shape)))

    def num_bytes(self, sizes: ModelSizes, conv_bytes: int) -> int:
        """Of one checkpoint, whose conv states weigh ``conv_bytes``."""
        return aligned(conv_bytes) + self.recurrent_bytes(sizes)

    def recurrent_bytes(self, sizes: ModelSizes) -> int:
        """Codes and scales of one sequence's recurrent states."""
        specs = [s for s in sizes.specs() if isinstance(s, StateSpec) and s.dtype == "recurrent"]
        codes = sum(spec.size for spec in specs) * CODE_BYTES[self.dtype]
        scales = sum(self.num_scales(spec.shape) for spec in specs) * SCALE_BYTES
        return aligned(codes) + aligned(scales)


def aligned(num_bytes: int) -> int:
    """Up to the next multiple of what a wide load takes at once."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
