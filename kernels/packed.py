"""Sequences of unequal length, packed along one token dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict

import torch

from kernels.upload import upload

TILE = 64
"""Default tokens per tile."""
TILE_SIZES = (16, 32, 64)
"""Valid tokens per tile."""


class PackedTables(NamedTuple):
    """Device tables of `Packed`, passed to kernels as one argument."""

    cu_seqlens: torch.Tensor
    tile_sequences: torch.Tensor
    cu_tiles: torch.Tensor


class ExportTables(NamedTuple):
    """Device tables of `Exports`, passed to kernels as one argument."""

    ends: torch.Tensor
    slots: torch.Tensor
    cu_exports: torch.Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """Layout of the sequences in a packed ``[T, ...]`` tensor, built once per step."""

    lengths: tuple[int, ...]
    """Tokens of each sequence. Zero is allowed."""
    cu_seqlens: torch.Tensor
    """int32[B + 1]: sequence b has rows ``cu_seqlens[b]:cu_seqlens[b + 1]``."""
    tile_sequences: torch.Tensor
    """int32[num_tiles]: sequence of each tile. The tiles of a sequence are adjacent and in
    order."""
    cu_tiles: torch.Tensor
    """int32[B + 1]: sequence b has tiles ``cu_tiles[b]:cu_tiles[b + 1]``."""
    no_exports: ExportTables
    """Empty exports, so that a launch without exports uses the same kernel, bit for bit."""
    tile_size: int
    """Tokens per tile, counted from each sequence's start; one of ``TILE_SIZES``. Recurrences are
    divided, and states can be exported, on this grid."""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", tile_size: int = TILE
    ) -> Packed:
        """Build the layout of sequences of these lengths, with tables on ``device``.

        O(B + num_tiles).
        """
        assert tile_size in TILE_SIZES, f"a tile cannot have {tile_size} tokens"
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
        """Tables on the device, for a kernel."""
        return PackedTables(self.cu_seqlens, self.tile_sequences, self.cu_tiles)


@dataclass(frozen=True, slots=True)
class Exports:
    """States to save while a packed batch is computed, ordered by sequence, then by position."""

    sequences: tuple[int, ...]
    """Index of each state's sequence in the batch."""
    ends: tuple[int, ...]
    """Number of tokens that each state covers, from its sequence's start: whole tiles or the whole
    length, at least 1."""
    slots: tuple[int, ...]
    """Slot of each state. No other access to it in this call is allowed."""
    tables: ExportTables
    """Device tables: int32[E] ends and slots. Sequence b has the entries ``cu_exports[b]:
    cu_exports[b + 1]`` (int32[B + 1])."""

    @classmethod
    def plan(cls, packed: Packed, exports: Sequence[tuple[int, int, int]]) -> Exports | None:
        """Plan ``(sequence, end, slot)`` triples in any order. None if there are none.

        O(E log E + B).

        Raises:
            ValueError: an end is neither on the grid nor the end of the sequence, or a position is
                exported twice.
        """
        if not exports:
            return None
        ordered = sorted(exports)
        counts = [0] * len(packed.lengths)
        for (sequence, end, _), before in zip(ordered, [None, *ordered], strict=False):
            length = packed.lengths[sequence]
            if not 0 < end <= length or (end % packed.tile_size and end != length):
                raise ValueError(f"a state cannot be exported after {end} of {length} tokens")
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


class ScanInputs(TypedDict):
    """Arguments that all scans and convolutions of prompts have."""

    states: torch.Tensor
    """States ``[S, HV, K, V]`` or windows ``[S, C, W - 1]`` of one layer; changed in place at
    ``slots`` and at the exports' slots. Each is contiguous, with any stride between slots."""
    packed: Packed
    slots: torch.Tensor
    """int32[B]. The slot of a sequence without tokens is not changed."""
    resumed: torch.Tensor
    """bool[B]; False starts from zeros and ignores the slot."""
    exports: Exports | None


class StepInputs(TypedDict):
    """Arguments that all scans and convolutions of one token per sequence have, or of several with
    ``packed`` and ``step_slots``, to verify drafts. Bits are equal to those of one call per token.
    """

    states: torch.Tensor
    """As in ``ScanInputs``; changed in place at ``slots``, or with ``packed`` at ``step_slots``."""
    slots: torch.Tensor
    """int32[B]."""
    packed: NotRequired[Packed | None]
    """None for one token per sequence, ``[B, ...]``; else tokens are packed, ``[T, ...]``."""
    step_slots: NotRequired[torch.Tensor | None]
    """int32[T]: slot for the state after each token. No other access to these slots is allowed,
    except that a sequence of one token may use its own slot."""


def num_tiles(length: int, tile_size: int = TILE) -> int:
    """Return the number of tiles for ``length`` tokens, the last one possibly partial."""
    return -(-length // tile_size)


def running_sum(counts: Sequence[int]) -> list[int]:
    """Return ``[0, counts[0], counts[0] + counts[1], ...]``, one entry more than ``counts``."""
    total, sums = 0, [0]
    for count in counts:
        total += count
        sums.append(total)
    return sums


def _int32(values: Sequence[int], device: torch.device | str) -> torch.Tensor:
    return upload(values, torch.int32, device)
