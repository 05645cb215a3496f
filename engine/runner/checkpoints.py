"""Checkpoints with fewer bits than running states."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from hybridcache.geometry.checkpoints import CheckpointFormat, aligned
from hybridcache.geometry.units import GIB
from kernels.state_copy.reference import Form
from kernels.upload import upload

STAGING_BYTES = GIB
"""Memory for states that prefills export, until they are narrowed. At least one state fits. A step
that exports more states is computed in pieces."""
CODES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Checkpoints with fewer bits than running states (``--checkpoint-dtype``).

    States are narrowed when they are saved and widened when they are restored. Running states then
    have separate slots outside the cache's memory, one per row of the request table, and the
    cache's slots hold checkpoints only. The bytes of a slot are: the conv states unchanged, the
    codes of all recurrent states, and their scales.
    """

    slots: torch.Tensor
    """uint8 ``[S + 1, slot bytes]``, rows of any stride; the last row is for padding."""
    states: tuple[tuple[torch.Tensor, bool], ...]
    """Running states ``[L, own slots, ...]``, each with True if they are recurrent."""
    format: CheckpointFormat
    staging: range
    """Own slots for states that a prefill exports, until they are saved."""

    def save(self, copies: Sequence[tuple[int, int]], kernel: ModuleType) -> None:
        """Narrow states into checkpoints with a ``state_copy`` kernel: (own slot, checkpoint
        slot)."""
        if copies:
            sources, targets = self._indices(copies)
            for pool, form in self._forms():
                kernel.narrow_states(pool, sources, self.slots, targets, form)

    def restore(self, copies: Sequence[tuple[int, int]], kernel: ModuleType) -> None:
        """Widen checkpoints into running states with a ``state_copy`` kernel: (checkpoint slot, own
        slot)."""
        if copies:
            sources, targets = self._indices(copies)
            for pool, form in self._forms():
                kernel.widen_states(self.slots, sources, pool, targets, form)

    def _forms(self) -> Iterator[tuple[torch.Tensor, Form]]:
        """Yield the layout of each pool's states in a slot: conv states unchanged, codes of
        recurrent ones, then their scales."""
        sizes = [pool[:, 0].numel() for pool, _ in self.states]
        kinds = [is_recurrent for _, is_recurrent in self.states]
        codes, first = CODES[self.format.dtype], 0
        conv_bytes = sum(
            size * pool.element_size()
            for size, (pool, is_recurrent) in zip(sizes, self.states, strict=True)
            if not is_recurrent
        )
        first_code = aligned(conv_bytes)
        num_codes = sum(itertools.compress(sizes, kinds))
        first_scale = first_code + aligned(num_codes * codes.itemsize)
        for size, (pool, is_recurrent) in zip(sizes, self.states, strict=True):
            if not is_recurrent:
                yield pool, Form(pool.dtype, None, first, 0)
                first += size * pool.element_size()
                continue
            dims = None if self.format.per is None else self._dims(pool)
            yield pool, Form(codes, dims, first_code, first_scale)
            first_code += size * codes.itemsize
            if dims is not None:
                scaled = math.prod(n for d, n in enumerate(pool.shape[2:], 2) if d in dims)
                first_scale += 4 * len(pool) * scaled

    def _dims(self, pool: torch.Tensor) -> tuple[int, ...]:
        """Return the dimensions of states ``[N, L, ...]`` along which scales differ."""
        return (0, 1, *(2 + dim for dim in self.format.kept_dims(pool.dim() - 2)))

    def _indices(self, copies: Sequence[tuple[int, int]]) -> torch.Tensor:
        pairs = np.array(copies, dtype=np.int64).T.copy()
        return upload(pairs, torch.int64, self.slots.device)
