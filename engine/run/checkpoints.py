"""Checkpoints in fewer bits than running states (``--checkpoint-dtype``): states are narrowed as
they are saved and widened as they are restored.

Running states then have slots of their own beside the cache's memory, one a row of the request
table, and the cache's slots hold checkpoints alone. A slot's bytes: conv states as they are, codes
of all recurrent states, their scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hybridcache.geometry.checkpoints import CheckpointFormat, aligned
from hybridcache.units import GIB
from kernels.state_copy.narrow import narrow, widen
from kernels.upload import upload

STAGING_BYTES = GIB
"""For states that prefills export, until they are narrowed: a step with more of them is computed in
pieces. Of one state at least."""
CODES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The bytes of all checkpoints, and the running states that they are made of."""

    slots: torch.Tensor
    """uint8 ``[S + 1, slot bytes]``, rows of any stride; the last is padding's."""
    states: tuple[tuple[torch.Tensor, bool], ...]
    """Running states ``[L, own slots, ...]``, and whether they are recurrent."""
    format: CheckpointFormat
    staging: range
    """Own slots for states that a prefill exports, until they are saved."""

    def save(self, copies: Sequence[tuple[int, int]]) -> None:
        """Narrow states into checkpoints: (own slot, checkpoint slot)."""
        if not copies:
            return
        sources, targets = self._indices(copies)
        parts: list[list[torch.Tensor]] = [[], [], []]
        for pool, is_recurrent in self.states:
            taken = pool[:, sources].transpose(0, 1)
            if not is_recurrent:
                parts[0].append(_bytes(taken))
            elif self.format.per is None:
                parts[1].append(_bytes(taken.to(CODES[self.format.dtype])))
            else:
                codes, scales = narrow(taken, CODES[self.format.dtype], self._dims(pool))
                parts[1].append(_bytes(codes))
                parts[2].append(_bytes(scales))
        first = 0
        for part in parts:
            for piece in part:
                self.slots[targets, first : first + piece.shape[1]] = piece
                first += piece.shape[1]
            first = aligned(first)

    def restore(self, copies: Sequence[tuple[int, int]]) -> None:
        """Widen checkpoints into running states: (checkpoint slot, own slot)."""
        if not copies:
            return
        sources, targets = self._indices(copies)
        taken = self.slots[sources]
        place = self._places()
        for pool, is_recurrent in self.states:
            shape = (len(copies), len(pool), *pool.shape[2:])
            dtype = CODES[self.format.dtype] if is_recurrent else pool.dtype
            found = _read(taken, place, int(is_recurrent), shape, dtype)
            if is_recurrent and self.format.per is not None:
                dims = self._dims(pool)
                scale_shape = tuple(n if dim in dims else 1 for dim, n in enumerate(shape))
                found = widen(found, _read(taken, place, 2, scale_shape, torch.float32))
            pool[:, targets] = found.transpose(0, 1).to(pool.dtype)

    def _dims(self, pool: torch.Tensor) -> tuple[int, ...]:
        """Dimensions of states ``[N, L, ...]`` in which scales differ."""
        return (0, 1, *(2 + dim for dim in self.format.kept_dims(pool.dim() - 2)))

    def _places(self) -> list[int]:
        """Where the three parts of a slot begin."""
        conv = codes = 0
        for pool, is_recurrent in self.states:
            size = pool[:, 0].numel()
            if is_recurrent:
                codes += size * CODES[self.format.dtype].itemsize
            else:
                conv += size * pool.dtype.itemsize
        return [0, aligned(conv), aligned(conv) + aligned(codes)]

    def _indices(self, copies: Sequence[tuple[int, int]]) -> torch.Tensor:
        pairs = np.array(copies, dtype=np.int64).T.copy()
        return upload(pairs, torch.int64, self.slots.device)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """uint8 ``[N, bytes]`` of ``[N, ...]``."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)


def _read(
    taken: torch.Tensor, place: list[int], part: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The next tensor of a part of the slots ``taken``."""
    num_bytes = math.prod(shape[1:]) * dtype.itemsize
    first = place[part]
    place[part] += num_bytes
    return taken[:, first : first + num_bytes].contiguous().view(dtype).view(shape)
