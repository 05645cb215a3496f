"""What is moved and copied in a runner's memory, before a step computes and after it."""

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
        """Write them now."""
        ...


class Copies:
    """Of rows and of states, in the order of the device's work."""

    def __init__(self, tensors: Memory, kernels: Kernels, device: Device) -> None:
        self.copier: TierCopies | None = None
        """Executes transfers between tiers; None if there is only the device."""
        self.pending: PendingWrites | None = None
        """Rows of a multi-token head that are not computed yet; None if there is no head."""
        self._tensors, self._device = tensors, device.torch_device
        self._cache_write, self._state_copy = kernels["cache_write"], kernels["state_copy"]

    def move(self, transfers: Sequence[Transfer]) -> None:
        """Carry out ``transfers`` one after the other: one may read rows that another wrote."""
        for transfer in transfers:
            if not isinstance(transfer, Move):
                assert self.copier is not None, "there is no memory below the device's"
                self.copier.make(transfer)
                continue
            rows = self._tensors.rows
            assert rows is not None, "rows of a pool do not move"
            pairs = np.stack([transfer.src, transfer.dst])
            sources, targets = upload(pairs, torch.int32, self._device)
            self._cache_write.move_rows(rows, sources, targets)

    def restore(self, copies: Sequence[tuple[int, int]]) -> None:
        """(checkpoint slot, own slot)."""
        if self._tensors.checkpoints is None:
            self.copy_states(copies)
        else:
            self._tensors.checkpoints.restore(copies, self._state_copy)

    def save(self, copies: Sequence[tuple[int, int]]) -> None:
        """(slot of a state, checkpoint slot)."""
        if self._tensors.checkpoints is None:
            self.copy_states(copies)
        else:
            self._tensors.checkpoints.save(copies, self._state_copy)

    def settle(self, running: RunningStates) -> None:
        """Rows and states are where their owners know them after, but those of a step that is to be
        committed: for who reads or writes them by their numbers."""
        if self.pending is not None:
            self.pending.settle()
        self.bring_home(running)

    def bring_home(self, running: RunningStates, but: Collection[int] = ()) -> None:
        """Whoever is away comes home, but for the sequences with these own slots."""
        astray = running.astray(but)
        self.copy_states(astray)
        running.come_home(astray)

    def copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        """(slot of a state, another of these)."""
        if not copies or not self._tensors.states:
            return
        pairs = np.array(copies, dtype=np.int32).T.copy()
        sources, targets = upload(pairs, torch.int32, self._device)
        self._state_copy.copy_states(self._tensors.states, sources, targets)
