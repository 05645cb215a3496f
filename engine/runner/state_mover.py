"""Moves and copies in a runner's memory, before and after the computation of a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch

from engine.interfaces import TierCopies
from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.runner.memory import Memory
from engine.runner.state_slots import RunningStates
from hybridcache.allocators.moves import Move, Transfer
from kernels.upload import upload


class PendingWrites(Protocol):
    """Rows that are written later than the step that computed them."""

    def settle(self) -> None:
        """Write the pending rows."""
        ...


class Copies:
    """Executes copies of rows and states, in the order of the device's operations."""

    def __init__(self, tensors: Memory, kernels: Kernels, device: Device) -> None:
        self.copier: TierCopies | None = None
        """Executes transfers between tiers; None if there is only the device."""
        self.pending: PendingWrites | None = None
        """Rows of a multi-token head that are not computed yet; None if there is no head."""
        self._tensors, self._device = tensors, device.torch_device
        self._cache_write, self._state_copy = kernels["cache_write"], kernels["state_copy"]

    def move(self, transfers: Sequence[Transfer]) -> None:
        """Execute ``transfers`` one after the other, because one may read rows that another
        wrote."""
        for transfer in transfers:
            if not isinstance(transfer, Move):
                assert self.copier is not None, "there is no tier outside the device"
                self.copier.make(transfer)
                continue
            rows = self._tensors.rows
            assert rows is not None, "rows of a pool do not move"
            pairs = np.stack([transfer.src, transfer.dst])
            sources, targets = upload(pairs, torch.int32, self._device)
            self._cache_write.move_rows(rows, sources, targets)

    def restore(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy checkpoints to running states: (checkpoint slot, own slot)."""
        if self._tensors.checkpoints is None:
            self.copy_states(copies)
        else:
            self._tensors.checkpoints.restore(copies, self._state_copy)

    def save(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy states to checkpoints: (slot of a state, checkpoint slot)."""
        if self._tensors.checkpoints is None:
            self.copy_states(copies)
        else:
            self._tensors.checkpoints.save(copies, self._state_copy)

    def settle(self, running: RunningStates) -> None:
        """Complete pending writes and copy displaced states back, except for a step that is not
        committed yet.

        Rows and states can be read and written by their indices afterwards.
        """
        if self.pending is not None:
            self.pending.settle()
        self.bring_home(running)

    def bring_home(self, running: RunningStates, but: Collection[int] = ()) -> None:
        """Copy displaced states back to their own slots, except those of the own slots ``but``."""
        astray = running.astray(but)
        self.copy_states(astray)
        running.come_home(astray)

    def copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy states: (slot of a state, target slot)."""
        if not copies or not self._tensors.states:
            return
        pairs = np.array(copies, dtype=np.int32).T.copy()
        sources, targets = upload(pairs, torch.int32, self._device)
        self._state_copy.copy_states(self._tensors.states, sources, targets)
