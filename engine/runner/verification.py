"""Verification of drafts: states after each token, their steps and graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from engine.layers.blocks import StepPart, VerifyPart, padded_count, tokens_before
from engine.models.decoder import Decoder
from engine.runner.loading import LoadedModel
from engine.runner.predictor import Newest, Predictor
from engine.runner.steps import KV_BOUNDS, Bucket, Copies, DecodeGraphs, Record, StepLayout, up_to
from engine.schedule.scheduler import Batch, Segment
from hybridcache.geometry.mixers import AttentionSizes
from hybridcache.radix.tokens import Tokens
from kernels.attention.sequences import Sequences
from kernels.packed import Packed, running_sum
from kernels.upload import upload


class RunningStates:
    """Own slots and step slots of running sequences, as integers. The caller makes the copies.

    A verification writes the state after each of its tokens into a step slot. The accepted state
    stays there: it is displaced. The sequence's next verification reads it from there, and uses the
    own slot, which is then unused, as one of its step slots. So a step needs one step slot for each
    verified token. Before any other operation the state is copied back to the own slot.
    """

    def __init__(self, step_slots: Sequence[int]) -> None:
        self._step_slots = frozenset(step_slots)
        self._free = list(reversed(step_slots))
        self._displaced: dict[int, int] = {}
        """Step slot of each displaced state, by the sequence's own slot."""
        self._verified: list[tuple[int, list[int]]] = []
        """Own slot, which padding sequences share, and step slots in the last verification."""

    def at(self, slot: int) -> int:
        """Return the slot with the newest state of the sequence with this own slot."""
        return self._displaced.get(slot, slot)

    @property
    def step_slots(self) -> list[list[int]]:
        """Slots of the states after each token, for each sequence of the last verification."""
        return [slots for _, slots in self._verified]

    def settle(self, but: Collection[int] = ()) -> list[tuple[int, int]]:
        """Return (step slot, own slot) of the displaced states, which must be copied back next,
        without those of ``but`` and of a verification."""
        if not self._displaced:
            return []
        stay = {*but, *(own for own, _ in self._verified)}
        copies = [(step, own) for own, step in self._displaced.items() if own not in stay]
        for step, own in copies:
            del self._displaced[own]
            self._free.append(step)
        return copies

    def place(self, verified: Sequence[tuple[int, int]], *, moves: bool) -> list[tuple[int, int]]:
        """Assign ``step_slots`` to each (own slot, number of tokens) of the next step. Returns
        (step slot, own slot) of the displaced states to copy back before it: all if it ``moves``
        memory, else those that it does not verify."""
        # The last step failed before its commit if it still has step slots.
        for own, slots in self._verified:
            self._free += [slot for slot in slots if slot != own]
            if own in self._displaced:
                self._free.append(self._displaced.pop(own))
        self._verified = []
        copies = self.settle(() if moves else dict(verified))
        for own, count in verified:
            last = [own] if own in self._displaced else []
            first = len(self._free) - count + len(last)
            assert first >= 0, "more tokens to verify than were planned"
            self._verified.append((own, self._free[first:][::-1] + last))
            del self._free[first:]
        return copies

    def take(self, counts: Sequence[int]) -> None:
        """Accept the given number of tokens of each verified sequence."""
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
        """Verify that every step slot is free, has one sequence's state, or is one token's."""
        given = [slot for own, slots in self._verified for slot in slots if slot != own]
        held = [*self._free, *self._displaced.values(), *given]
        assert len(held) == len(self._step_slots) and set(held) == self._step_slots
        assert not self._step_slots & set(self._displaced), "a step slot is used as an own slot"


NATIVE_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64)
"""Numbers of tokens, including every length of one sequence with drafts of default length."""


class Verification:
    """Verifies drafts with the bits of single steps, and drafts with the multi-token head."""

    def __init__(self, loaded: LoadedModel, inputs: StepLayout) -> None:
        """Called when the runner's memory is allocated. Must not keep the runner."""
        self.running = RunningStates(inputs.memory.step_slots)
        self.state_bytes = loaded.settings.num_step_states * loaded.state_bytes
        self._loaded, self._inputs, self._table = loaded, inputs, inputs.table
        self.predictor: Predictor | None = None
        """Computes drafts with the multi-token head, or None if the model has none."""
        if loaded.model.prediction is not None:
            self.predictor = Predictor(loaded.model.prediction, loaded.model, inputs)

    def place(self, batch: Batch) -> Copies:
        """Assign slots to the states of the next step. Returns the copies to make before it."""
        verified = [
            (segment.slot, len(segment.token_ids))
            for segment in batch.segments
            if segment.num_drafts and segment.slot is not None
        ]
        return self.running.place(verified, moves=bool(batch.moves or batch.restores))

    def part(self, segments: Sequence[Segment]) -> StepPart:
        """Return the part of a step for segments with drafts."""
        device = self._table.device.device
        lengths = [len(segment.token_ids) for segment in segments]
        rows = [segment.row for segment in segments for _ in segment.token_ids]
        kv_lens = [end for s in segments for end in range(s.start + 1, s.end + 1)]
        steps = [slot for slots in self.running.step_slots for slot in slots]
        slots = [self.running.at(one.slot) for one in segments if one.slot is not None]
        own_rows, ends = [one.row for one in segments], [one.end for one in segments]
        return VerifyPart(
            num_tokens=len(rows),
            packed=Packed.from_lengths(lengths, device),
            sequences=Sequences.of(own_rows, ends, device),
            tokens=Sequences.of(rows, kv_lens, device),
            slots=upload(slots, torch.int32, device),
            step_slots=upload(steps, torch.int32, device),
            before=upload(tokens_before(lengths, sum(lengths)), torch.int64, device),
        )

    def commit(self, batch: Batch, taken: Sequence[int]) -> Copies:
        """Accept ``taken`` tokens of each segment with drafts. Returns the checkpoints to save."""
        if not self._inputs.memory.states:
            return ()
        saved: list[tuple[int, int]] = []
        verified = [segment for segment in batch.segments if segment.num_drafts]
        for segment, count, slots in zip(verified, taken, self.running.step_slots, strict=True):
            saved += [
                (slots[position - segment.start - 1], slot)
                for position, slot in segment.exports
                if segment.start < position <= segment.start + count
            ]
        self.running.take(taken)
        return saved

    @torch.inference_mode()
    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Tokens]:
        """Draft at most ``most`` tokens (1 or more) after each newest token with the multi-token
        head. Called between the ``commit`` of a batch and the next forward pass."""
        assert self.predictor is not None, "no multi-token head is loaded"
        self._loaded.device.make_current()
        at = [one._replace(slot=self.running.at(one.slot)) for one in newest]
        return self.predictor.guess(at, most)

    def rehearsals(self) -> Sequence[Callable[[], object]]:
        """Return the work of a warm-up that is not part of a step."""
        slot, most = self._inputs.memory.padding_slot, self._table.padding_row
        if self.predictor is None or slot is None:
            return ()
        newest = Newest(most, slot, 0, self._table.host.shape[1] - 1)
        counts = [count for count in (4, 3, 2, 1) if count <= most]
        return [partial(self.guess, [newest] * count, [1] * count) for count in counts]

    def graphs(self, record: Record, *, is_native: bool) -> DecodeGraphs | None:
        """Return graphs of decode steps with drafts. ``is_native``: recordings of native kernels.
        Raises NotRecordableError."""
        most, max_model_len = self._table.padding_row, self._table.host.shape[1]
        if self.predictor is not None and is_native:
            self.predictor.record(record, range(1, most + 1), [max_model_len])
        elif self.predictor is not None:
            bounds = up_to(min(max_model_len, KV_BOUNDS[-2]), KV_BOUNDS)
            powers = [1 << power for power in range(most.bit_length())]
            self.predictor.record(record, up_to(most, powers), bounds)
        longest = 1 + self._loaded.settings.drafts.max_len
        longest = min(longest, self._table.host.shape[1])
        buckets, model = self._buckets(is_native=is_native), self._loaded.model
        if not buckets:
            return None
        return VerifyGraphs(model, self._inputs, record, buckets, self.running, longest)

    def _buckets(self, *, is_native: bool) -> list[Bucket]:
        """Return the buckets of ``VerifyGraphs``, largest first, for all tokens that a step may
        verify, and sequences without drafts.

        Native kernels need one KV bound, Triton kernels sizes for which each attention is one
        chunk.
        """
        max_running, max_model_len = self._table.padding_row, self._table.host.shape[1]
        if is_native:
            return [(size, max_model_len) for size in NATIVE_SIZES[::-1]]
        kernels, mixers = self._loaded.kernels, self._loaded.sizes.mixers
        heads = [(m.num_heads, m.head_dim) for m in mixers if isinstance(m, AttentionSizes)]
        counts = [4]
        while counts[-1] < self._loaded.settings.num_step_states + max_running - 1:
            counts.append(2 * counts[-1])
        return [
            (count, bound)
            for count in counts[::-1]
            for bound in up_to(max_model_len, KV_BOUNDS)[::-1]
            if all(kernels["attention"].is_one_chunk(count, bound, *each) for each in heads)
        ]


class VerifyGraphs(DecodeGraphs):
    """Graphs of steps of decodes, some with drafts, for any number of sequences.

    Kernels read the start and length of each sequence from memory. A sequence without drafts has
    one token, and its state is updated in its own slot. Triton kernels are launched for bounds: KV
    lengths up to a bucket's, sequences of at most ``longest`` tokens, and all tokens in one chunk
    of attention (`kernels.attention.splits.is_one_chunk`). Padding sequences keep these bounds.
    """

    def __init__(
        self,
        model: Decoder,
        inputs: StepLayout,
        record: Record,
        buckets: Sequence[Bucket],
        running: RunningStates,
        longest: int,
    ) -> None:
        """``buckets``: of ``Verification``. ``longest``: most tokens of a sequence."""
        self._running, self._longest = running, longest
        most = buckets[0][0]
        tokens = np.zeros((5, most), np.int64)
        """Id, position and KV index of each token, one if it is not padding, and the index of the
        token before it."""
        # Rows of a multiple of 16 bytes, because kernels are compiled for aligned tables.
        tables = np.zeros((7, padded_count(most + 1, 4)), np.int32)
        """Slot of the state after each token, its row and KV length; row, KV length and slot of
        each sequence; start of each sequence."""
        super().__init__(model, inputs, record, buckets, tokens, tables)

    def _fill(self, segments: Sequence[Segment], size: int) -> None:
        tokens, tables = self._host_tables
        memory, host = self._memory, self._table.host
        step_slots = iter(self._running.step_slots)
        lengths = [len(segment.token_ids) for segment in segments]
        firsts = running_sum(lengths)
        for b, segment in enumerate(segments):
            own = slice(firsts[b], firsts[b + 1])
            tokens[0, own] = segment.token_ids
            tokens[1, own] = np.arange(segment.start, segment.end)
            tokens[2, own] = host[segment.row, segment.start : segment.end]
            slot = segment.slot or 0
            tables[0, own], tables[1, own] = slot, segment.row
            if segment.num_drafts and memory.states:
                tables[0, own] = next(step_slots)
            tables[3:6, b] = segment.row, segment.end, self._running.at(slot)
        count, slot, live = firsts[-1], memory.padding_slot or 0, len(segments)
        row = self._table.padding_row
        tokens[3, :count], tokens[4, :count] = 1, tokens_before(lengths, size)
        for part, padding in zip(tokens, (0, 0, memory.padding_row, 0, 0), strict=True):
            part[count:size] = padding
        tables[0, count:size], tables[1, count:size] = slot, row
        tables[2, :size] = tokens[1, :size] + 1
        for part, padding in zip(tables[3:6], (row, 1, slot), strict=True):
            part[live:size] = padding
        added = _in_pieces(size - count, self._longest)
        tables[4, live : live + len(added)] = added
        firsts = running_sum([*lengths, *added])
        tables[6, : len(firsts)] = firsts
        tables[6, len(firsts) : size + 1] = size

    def _part(self, size: int, bounded: Callable[..., Sequences]) -> Callable[[], StepPart]:
        tables = self._tables[1]
        step_slots, token_rows, token_kv_lens, rows, kv_lens, slots = tables[:6, :size].unbind()
        bounds = _in_pieces(size, self._longest)
        bounds += [0] * (size - len(bounds))
        packed = Packed.from_lengths(bounds, tables.device)
        packed = replace(packed, cu_seqlens=tables[6, : size + 1])
        sequences, tokens = bounded(rows, kv_lens), bounded(token_rows, token_kv_lens)
        before = self._tables[0][4, :size]
        part = VerifyPart(size, packed, sequences, tokens, slots, step_slots, before)
        return lambda: part


def _in_pieces(num_tokens: int, longest: int) -> list[int]:
    """Split a number of tokens into lengths of at most ``longest``."""
    whole, rest = divmod(num_tokens, longest)
    return [longest] * whole + [rest] * (rest > 0)
