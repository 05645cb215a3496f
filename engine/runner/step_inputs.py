"""Inputs of a step: the KV rows and states of running requests, and the tensors of a batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.layers.blocks import (
    DecodePart,
    LayerInputs,
    PrefillPart,
    RotaryTable,
    VerifyPart,
    tokens_before,
)
from engine.runner.device import Device
from engine.runner.memory import Memory, allocate
from engine.schedule.scheduler import Batch, Segment
from hybridcache.tokens import Indices, Tokens
from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed
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


class RequestTable:
    """KV indices of every running request: int32 ``[rows, max_model_len]``, on the host and on the
    device."""

    def __init__(self, num_rows: int, max_model_len: int, padding_index: int, device: Device):
        host = allocate((num_rows + 1, max_model_len), torch.int32, Device.resolve("cpu"))
        self.host: npt.NDArray[np.int32] = host.numpy()
        self.host[num_rows] = padding_index
        self.padding_row = num_rows
        self._is_shared = device.is_cpu
        self.device = host if self._is_shared else host.to(device.torch_device)

    def write(self, writes: Sequence[tuple[int, int, npt.NDArray[np.int32]]]) -> None:
        """Write KV indices at (row, start). One copy to the device per write."""
        for row, start, indices in writes:
            end = start + len(indices)
            self.host[row, start:end] = indices
            if not self._is_shared:
                self.device[row, start:end] = upload(indices, torch.int32, self.device.device)


class StepInputs:
    """Arranges the tokens of a batch, decodes first, padded to a multiple of ``multiple`` rows."""

    def __init__(
        self,
        tensors: Memory,
        table: RequestTable,
        rotary: RotaryTable,
        running: RunningStates,
        *,
        multiple: int,
        tile_size: int,
    ) -> None:
        self._tensors, self._table, self._rotary = tensors, table, rotary
        self._running, self._multiple = running, multiple
        self.tile_size = tile_size
        self._device = table.device.device

    def of(self, batch: Batch) -> tuple[torch.Tensor, LayerInputs]:
        """Return token ids ``[num_rows]`` and all other inputs of the layers."""
        decodes, verified, prefills = list[Segment](), list[Segment](), list[Segment]()
        tokens, positions, indices = list[Tokens](), list[Tokens](), list[Indices]()
        num_verify = 0
        for segment in batch.segments:
            kind = verified if segment.num_drafts else decodes if segment.is_decode else prefills
            kind.append(segment)
            num_verify += len(segment.token_ids) if segment.num_drafts else 0
            tokens.append(segment.token_ids)
            positions.append(np.arange(segment.start, segment.end, dtype=np.int32))
            indices.append(self._table.host[segment.row, segment.start : segment.end])
        known = np.concatenate(tokens)
        num_tokens, device = len(known), self._device
        num_rows = -(-num_tokens // self._multiple) * self._multiple
        token_ids = np.zeros(num_rows, np.int64)
        token_ids[:num_tokens] = known
        cos, sin = self._rotary(upload(np.concatenate(positions), torch.int64, device))
        step = LayerInputs(
            num_tokens=num_tokens,
            num_decode=len(decodes),
            num_rows=num_rows,
            cos=cos,
            sin=sin,
            kv_indices=upload(np.concatenate(indices), torch.int64, device),
            table=self._table.device,
            decode=DecodePart(*self._sequences(decodes)) if decodes else None,
            prefill=self._prefill_part(prefills) if prefills else None,
            num_verify=num_verify,
            verify=self._verify_part(verified) if verified else None,
        )
        return upload(token_ids, torch.int64, device), step

    def _verify_part(self, segments: Sequence[Segment]) -> VerifyPart:
        lengths = [len(segment.token_ids) for segment in segments]
        rows = [segment.row for segment in segments for _ in segment.token_ids]
        kv_lens = [end for s in segments for end in range(s.start + 1, s.end + 1)]
        steps = [slot for slots in self._running.step_slots for slot in slots]
        sequences, slots = self._sequences(segments)
        return VerifyPart(
            packed=Packed.from_lengths(lengths, self._device),
            sequences=sequences,
            tokens=Sequences.of(rows, kv_lens, self._device),
            slots=slots,
            step_slots=upload(steps, torch.int32, self._device),
            before=upload(tokens_before(lengths, sum(lengths)), torch.int64, self._device),
        )

    def _prefill_part(self, segments: Sequence[Segment]) -> PrefillPart:
        lengths = [len(segment.token_ids) for segment in segments]
        packed = Packed.from_lengths(lengths, self._device, self.tile_size)
        exports = [
            (rank, position - segment.start, slot)
            for rank, segment in enumerate(segments)
            for position, slot in segment.exports
        ]
        if self._tensors.checkpoints is not None:
            staging = self._tensors.checkpoints.staging
            exports = [(rank, at, staging[i]) for i, (rank, at, _) in enumerate(exports)]
        sequences, slots = self._sequences(segments)
        return PrefillPart(
            packed=packed,
            sequences=sequences,
            slots=slots,
            resumed=upload([segment.start > 0 for segment in segments], torch.bool, self._device),
            exports=Exports.plan(packed, exports),
        )

    def _sequences(self, segments: Sequence[Segment]) -> tuple[Sequences, torch.Tensor]:
        """Return the sequences of ``segments``, and the slots of their states: int32."""
        rows, ends = [one.row for one in segments], [one.end for one in segments]
        slots = [self._running.at(one.slot) for one in segments if one.slot is not None]
        sequences = Sequences.of(rows, ends, self._device)
        return sequences, upload(slots, torch.int32, self._device)
