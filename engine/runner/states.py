"""States of running sequences, and the copies of rows and states before and after each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.runner.memory import Memory
from hybridcache.allocators.moves import Move, Transfer
from kernels.upload import upload


class RunningStates:
    """Own slots and step slots of running sequences. Works on integers; the caller makes the
    copies.

    A verification writes the state after each of its tokens into a step slot. The accepted state
    stays there: it is displaced. The sequence's next verification reads it from there, and uses the
    own slot, which is then unused, as one of its step slots. So a step needs one step slot for each
    verified token, however many states are displaced. Before any other operation the state is
    copied back to the sequence's own slot.
    """

    def __init__(self, step_slots: Sequence[int]) -> None:
        self._step_slots = frozenset(step_slots)
        self._free = list(reversed(step_slots))
        self._displaced: dict[int, int] = {}
        """Step slot of each displaced state, by the sequence's own slot."""
        self._verified: list[tuple[int, list[int]]] = []
        """Own slot and step slots of each sequence in the last verification."""

    def at(self, slot: int) -> int:
        """Return the slot with the newest state of the sequence with this own slot."""
        return self._displaced.get(slot, slot)

    @property
    def step_slots(self) -> list[list[int]]:
        """Slots of the states after each token, for each sequence of the last verification."""
        return [slots for _, slots in self._verified]

    def displaced(self, but: Collection[int] = ()) -> list[tuple[int, int]]:
        """Return (step slot, own slot) of the displaced states that must be copied back.

        Sequences in ``but`` and those being verified are left out. Call ``mark_returned`` after the
        copies.
        """
        if not self._displaced:
            return []
        stay = {*but, *(own for own, _ in self._verified)}
        return [(step, own) for own, step in self._displaced.items() if own not in stay]

    def mark_returned(self, copied: Sequence[tuple[int, int]]) -> None:
        """Record that the copies returned by ``displaced`` were made."""
        for step, own in copied:
            del self._displaced[own]
            self._free.append(step)

    def drop_verified(self) -> None:
        """Drop the states of the last verification, if its step failed before the commit."""
        for own, slots in self._verified:
            self._free += [slot for slot in slots if slot != own]
            if own in self._displaced:
                self._free.append(self._displaced.pop(own))
        self._verified = []

    def verify(self, sequences: Sequence[tuple[int, int]]) -> None:
        """Assign ``step_slots`` to each of these (own slot, number of tokens).

        No other state is displaced. Raises AssertionError if there are more tokens than step
        slots.
        """
        for own, count in sequences:
            last = [own] if own in self._displaced else []
            first = len(self._free) - count + len(last)
            assert first >= 0, "more tokens to verify than were planned"
            self._verified.append((own, self._free[first:][::-1] + last))
            del self._free[first:]

    def take(self, counts: Sequence[int]) -> None:
        """Accept the given number of tokens of each verified sequence. With 0 its state is
        unchanged."""
        for (own, slots), count in zip(self._verified, counts, strict=True):
            if count:
                before, taken = self._displaced.pop(own, None), slots.pop(count - 1)
                if taken != own:
                    self._displaced[own] = taken
                if before is not None:
                    self._free.append(before)
            self._free += [slot for slot in slots if slot != own]
        self._verified = []

    def check(self) -> None:
        """Raise AssertionError unless every step slot is free, holds the state of one sequence, or
        is assigned to one token."""
        given = [slot for own, slots in self._verified for slot in slots if slot != own]
        held = [*self._free, *self._displaced.values(), *given]
        assert len(held) == len(self._step_slots) and set(held) == self._step_slots
        assert not self._step_slots & set(self._displaced), "a step slot is used as an own slot"


class Copies:
    """Executes copies of rows and states, in the order of the device's operations."""

    def __init__(self, tensors: Memory, kernels: Kernels, device: Device) -> None:
        self.transfer: Callable[[Transfer], None] | None = None
        """Executes a transfer between tiers; None if there is only the device."""
        self._tensors, self._device = tensors, device.torch_device
        self._cache_write, self._state_copy = kernels["cache_write"], kernels["state_copy"]

    def move(self, transfers: Sequence[Transfer]) -> None:
        """Execute ``transfers`` one after the other, because one may read rows that another
        wrote."""
        for transfer in transfers:
            if not isinstance(transfer, Move):
                assert self.transfer is not None, "there is no tier outside the device"
                self.transfer(transfer)
                continue
            pairs = np.stack([transfer.src, transfer.dst])
            sources, targets = upload(pairs, torch.int32, self._device)
            self._cache_write.move_rows(self._tensors.rows, sources, targets)

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

    def return_states(self, running: RunningStates, but: Collection[int] = ()) -> None:
        """Copy displaced states back to their own slots, except those of the own slots ``but``."""
        if displaced := running.displaced(but):
            self.copy_states(displaced)
            running.mark_returned(displaced)

    def copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy states: (slot of a state, target slot)."""
        if not copies or not self._tensors.states:
            return
        pairs = np.array(copies, dtype=np.int32).T.copy()
        sources, targets = upload(pairs, torch.int32, self._device)
        self._state_copy.copy_states(self._tensors.states, sources, targets)
