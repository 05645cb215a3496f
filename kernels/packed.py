"""Sequences of unequal length, packed one after another along one token dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.upload import upload

TILE = 64
"""Tokens per tile unless said otherwise."""
TILE_SIZES = (16, 32, 64)
"""Tokens that a tile may have."""


class PackedTables(NamedTuple):
    """`Packed` as a kernel takes it: one argument of three tables."""

    cu_seqlens: torch.Tensor
    tile_sequences: torch.Tensor
    cu_tiles: torch.Tensor


class ExportTables(NamedTuple):
    """`Exports` as a kernel takes them: one argument of three tables."""

    ends: torch.Tensor
    slots: torch.Tensor
    cu_exports: torch.Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """Where each sequence lies in a packed ``[T, ...]`` tensor. Built once per step, read by every
    layer."""

    lengths: tuple[int, ...]
    """Tokens of each sequence; zero is allowed."""
    cu_seqlens: torch.Tensor
    """int32[B + 1]: sequence b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``."""
    tile_sequences: torch.Tensor
    """int32[num_tiles]: the sequence a tile belongs to; a sequence's tiles are neighbours, in
    order."""
    cu_tiles: torch.Tensor
    """int32[B + 1]: sequence b is tiles ``cu_tiles[b]:cu_tiles[b + 1]``."""
    no_exports: ExportTables
    """For a kernel that exports nothing: so that it is the same kernel, bit for bit, that exports
    something."""
    tile_size: int
    """Tokens per tile, counted from each sequence's start: the grid on which recurrences are cut
    and states may be exported, one of ``TILE_SIZES``."""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", tile_size: int = TILE
    ) -> Packed:
        """The layout of sequences of these lengths, with its tables on ``device``. O(B +
        num_tiles)."""
        assert tile_size in TILE_SIZES, f"no tile has {tile_size} tokens"
        tiles = [num_tiles(length, tile_size) for length in lengths]
        sequences = [b for b, count in enumerate(tiles) for _ in range(count)]
        nothing = _int32([0] * (len(lengths) + 1), device)
        return cls(
            lengths=tuple(lengths),
            cu_seqlens=_int32(running_sum(lengths), device),
            tile_sequences=_int32(sequences, device),
            cu_tiles=_int32(running_sum(tiles), device),
            no_exports=ExportTables(ends=nothing, slots=nothing, cu_exports=nothing),
            tile_size=tile_size,
        )

    @property
    def tables(self) -> PackedTables:
        """The device's half, for a kernel."""
        return PackedTables(self.cu_seqlens, self.tile_sequences, self.cu_tiles)


@dataclass(frozen=True, slots=True)
class Exports:
    """States to save while a packed batch is computed, ordered by sequence, then by position."""

    sequences: tuple[int, ...]
    """Which sequence of the batch each one belongs to."""
    ends: tuple[int, ...]
    """How many tokens from that sequence's start it stands for: whole tiles, or the whole length;
    at least 1."""
    slots: tuple[int, ...]
    """The slot it is written to: nobody reads or writes it otherwise in this call."""
    tables: ExportTables
    """On the device: int32[E] ends and slots; sequence b has those of ``cu_exports[b]:cu_exports[b
    + 1]``, int32[B + 1]."""

    @classmethod
    def plan(cls, packed: Packed, exports: Sequence[tuple[int, int, int]]) -> Exports | None:
        """The plan for ``(sequence, end, slot)`` triples in any order, or None if there are none.

        Raises ValueError for an end that is neither on the grid nor the sequence's own end, and for
        two exports of one position. O(E log E + B).
        """
        if not exports:
            return None
        ordered = sorted(exports)
        counts = [0] * len(packed.lengths)
        for (sequence, end, _), before in zip(ordered, [None, *ordered], strict=False):
            length = packed.lengths[sequence]
            if not 0 < end <= length or (end % packed.tile_size and end != length):
                raise ValueError(f"no state can be exported after {end} of {length} tokens")
            if before is not None and before[:2] == (sequence, end):
                raise ValueError(f"sequence {sequence} exports position {end} twice")
            counts[sequence] += 1
        sequences, ends, slots = zip(*ordered, strict=True)
        device = packed.cu_seqlens.device
        return cls(
            sequences=sequences,
            ends=ends,
            slots=slots,
            tables=ExportTables(
                _int32(ends, device), _int32(slots, device), _int32(running_sum(counts), device)
            ),
        )


def num_tiles(length: int, tile_size: int = TILE) -> int:
    """Tiles that ``length`` tokens fill or begin."""
    return -(-length // tile_size)


def running_sum(counts: Sequence[int]) -> list[int]:
    """``[0, counts[0], counts[0] + counts[1], ...]``: one entry more than ``counts``."""
    total, sums = 0, [0]
    for count in counts:
        total += count
        sums.append(total)
    return sums


def _int32(values: Sequence[int], device: torch.device | str) -> torch.Tensor:
    return upload(values, torch.int32, device)
