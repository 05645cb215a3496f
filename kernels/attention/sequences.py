"""KV of the sequences in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from kernels.packed import Packed
from kernels.upload import upload


@dataclass(frozen=True, slots=True)
class Sequences:
    """Rows of the request table and their lengths, built once per step."""

    rows: tuple[int, ...]
    """Row of the request table with each sequence's KV indices."""
    kv_lens: tuple[int, ...]
    """Number of tokens with KV in the pool, including this step's. Triton kernels use it as an
    upper bound only, so that a captured graph can be replayed with smaller values in
    ``kv_len_table``."""
    row_table: torch.Tensor
    """int32[B], ``rows`` on the device."""
    kv_len_table: torch.Tensor
    """int32[B], ``kv_lens`` on the device."""

    @classmethod
    def of(
        cls, rows: Sequence[int], kv_lens: Sequence[int], device: torch.device | str = "cpu"
    ) -> Sequences:
        """Build both forms, on the host and on ``device``."""
        return cls(
            rows=tuple(rows),
            kv_lens=tuple(kv_lens),
            row_table=upload(rows, torch.int32, device),
            kv_len_table=upload(kv_lens, torch.int32, device),
        )


class KVInputs(TypedDict):
    """Arguments that attention has to one token per sequence."""

    table: torch.Tensor
    """int32 ``[R, M]``, the request table: KV indices by row and position."""
    sequences: Sequences
    scale: float
    """Factor of the scores."""


class PackedKVInputs(KVInputs):
    """Arguments that attention has to several tokens per sequence."""

    packed: Packed
    """New tokens: the last ``lengths[b]`` of the ``sequences.kv_lens[b]`` tokens of sequence b."""
