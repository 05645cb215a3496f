"""Graphs of steps with drafts: all decoding sequences are computed in one graph.

There is one graph per number of tokens, for any number of sequences: kernels read the start and
length of each sequence from memory. A sequence without drafts has one token, and its state is
updated in its own slot.

A graph of native kernels, on a CPU, is correct for all sizes. Triton kernels are launched for
bounds: KV lengths up to a bucket's, sequences of at most a draft and one more token, and all tokens
in one chunk of attention (`kernels.attention.splits.is_one_chunk`). There is no graph beyond these
bounds, and the step is launched kernel by kernel. Padding sequences keep the same bounds.

``record`` also executes the recorded step exactly once, so states that are updated in place are not
advanced twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from engine.layers.inputs import LayerInputs, VerifyPart, tokens_before
from engine.layers.residual import verifies
from engine.layers.rotary import RotaryTable
from engine.models.decoder import Decoder
from engine.runner.graphs import Forward, Record, Replay, bucket_for, kv_bounds
from engine.runner.memory import Memory, RequestTable
from engine.runner.state_slots import RunningStates
from engine.schedule.batch import Segment
from hybridcache.geometry.mixers import AttentionSizes
from hybridcache.geometry.sizes import ModelSizes
from kernels.attention.sequences import Sequences
from kernels.packed import Packed, running_sum
from kernels.upload import upload

NATIVE_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64)
"""Numbers of tokens, including every length of one sequence with drafts of default length."""
Bucket = tuple[int, int]
"""(tokens, KV bound)."""


def native_buckets(max_model_len: int) -> list[Bucket]:
    """Return the buckets of native kernels, largest first. They need only one KV bound."""
    return [(size, max_model_len) for size in NATIVE_SIZES[::-1]]


def device_buckets(
    model: Decoder, sizes: ModelSizes, *, max_tokens: int, max_model_len: int
) -> list[Bucket]:
    """Return the buckets of Triton kernels for steps of up to ``max_tokens``, largest first.

    The numbers of tokens are powers of two for which each attention of this rank's ``sizes`` is one
    chunk.
    """
    is_one_chunk = model.build.kernels["attention"].is_one_chunk
    heads = [(m.num_heads, m.head_dim) for m in sizes.mixers if isinstance(m, AttentionSizes)]
    counts = [4]
    while counts[-1] < max_tokens:
        counts.append(2 * counts[-1])
    return [
        (count, bound)
        for count in counts[::-1]
        for bound in kv_bounds(max_model_len)[::-1]
        if all(is_one_chunk(count, bound, *each) for each in heads)
    ]


class VerifyGraphs:
    """Graphs of the ``buckets``, for sequences of up to ``longest`` tokens each."""

    def __init__(
        self,
        model: Decoder,
        forward: Forward,
        memory: Memory,
        table: RequestTable,
        rotary: RotaryTable,
        running: RunningStates,
        record: Record,
        *,
        buckets: Sequence[Bucket],
        longest: int,
        is_native: bool,
    ) -> None:
        """``buckets``: largest first, at least one. ``is_native``: the kernels read the host's
        memory."""
        self._forward, self._head, self._memory = forward, model.head, memory
        self._running, self._longest = running, longest
        self._table, self._rotary, self._record = table, rotary, record
        self.buckets = buckets
        self._sizes, self._bounds = (sorted(set(part)) for part in zip(*buckets, strict=True))
        self._replays: dict[Bucket, Replay] = {}
        most, device = self._sizes[-1], table.device.device
        # Rows of a multiple of 16 bytes, because kernels are compiled for aligned tables.
        self._host_tokens = np.zeros((4, most), np.int64)
        """Id, position and KV index of each token, and the index of the token before it."""
        self._host_tables = np.zeros((5, -(-(most + 1) // 4) * 4), np.int32)
        """Slot of the state after each token; row, KV length and slot of each sequence; start of
        each sequence."""
        self._is_native = is_native
        host = torch.from_numpy(self._host_tokens), torch.from_numpy(self._host_tables)
        self._tokens, self._tables = (x.to(device, copy=not is_native) for x in host)
        """The same tables in the memory that kernels read."""
        self._logits = model.embedding.weight.new_empty(most, model.config.vocab_size)

    @classmethod
    def of(
        cls,
        model: Decoder,
        forward: Forward,
        memory: Memory,
        table: RequestTable,
        rotary: RotaryTable,
        running: RunningStates,
        record: Record,
        *,
        sizes: ModelSizes,
        draft_len: int,
        max_verified: int,
        is_native: bool,
    ) -> VerifyGraphs | None:
        """Make the graphs for steps with up to ``max_verified`` tokens of sequences with drafts,
        and sequences without.

        ``sizes`` are those of this rank. Returns None if nothing is verified, if a mixer does not
        support drafts (``stepwise`` reads lengths on the host), or if the smallest step is too
        large for a graph.
        """
        if not max_verified or not all(verifies(step.block) for step in model.mixers):
            return None
        max_running, max_model_len = table.padding_row, table.host.shape[1]
        buckets = (
            native_buckets(max_model_len)
            if is_native
            else device_buckets(
                model, sizes, max_tokens=max_verified + max_running - 1, max_model_len=max_model_len
            )
        )
        if not buckets:
            return None
        parts = model, forward, memory, table, rotary, running, record
        longest = min(1 + draft_len, max_model_len)
        return cls(*parts, buckets=buckets, longest=longest, is_native=is_native)

    def run(self, segments: Sequence[Segment]) -> torch.Tensor | None:
        """Compute the logits of every token, ``[num_tokens, vocab]``, or return None if the step
        does not fit into a bucket."""
        count = sum(len(segment.token_ids) for segment in segments)
        size = bucket_for(count, self._sizes)
        bound = bucket_for(max(segment.end for segment in segments), self._bounds)
        if size is None or bound is None or (size, bound) not in self.buckets:
            return None
        self._fill(segments, size)
        if (size, bound) in self._replays:
            self._replays[size, bound]()
        else:
            self._replays[size, bound] = self._recorded(size, bound)
        return self._logits[:count].clone()

    def capture(self, bucket: Bucket) -> None:
        """Capture the graph of one of the ``buckets``, computed on padding."""
        self._fill((), bucket[0])
        self._replays[bucket] = self._recorded(*bucket)

    def _fill(self, segments: Sequence[Segment], size: int) -> None:
        """Write the inputs of ``segments``, and padding sequences up to ``size`` tokens."""
        tokens, tables = self._host_tokens, self._host_tables
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
            tables[0, own] = slot
            if segment.num_drafts and memory.states:
                tables[0, own] = next(step_slots)
            tables[1:4, b] = segment.row, segment.end, self._running.at(slot)
        count, slot, live = firsts[-1], memory.padding_slot or 0, len(segments)
        tokens[3, :count] = tokens_before(lengths, size)
        for part, padding in zip(tokens, (0, 0, memory.padding_row, 0), strict=True):
            part[count:size] = padding
        tables[0, count:size] = slot
        for part, padding in zip(tables[1:4], (self._table.padding_row, 1, slot), strict=True):
            part[live:size] = padding
        added = _in_pieces(size - count, self._longest)
        tables[2, live : live + len(added)] = added
        firsts = running_sum([*lengths, *added])
        tables[4, : len(firsts)] = firsts
        tables[4, len(firsts) : size + 1] = size
        if not self._is_native:
            device = self._tokens.device
            self._tokens.copy_(upload(tokens, torch.int64, device))
            self._tables.copy_(upload(tables, torch.int32, device))

    def _recorded(self, size: int, bound: int) -> Replay:
        """Compute the step in the input tables, and return the function that computes the next
        one."""
        token_ids, positions, kv_indices, before = self._tokens[:, :size].unbind()
        step_slots, rows, kv_lens, slots = self._tables[:4, :size].unbind()
        bounds = _in_pieces(size, self._longest)
        bounds += [0] * (size - len(bounds))
        packed = replace(
            Packed.from_lengths(bounds, self._tokens.device),
            cu_seqlens=self._tables[4, : size + 1],
        )
        sequences = Sequences(
            rows=(self._table.padding_row,) * size,
            kv_lens=(bound,) * size,
            row_table=rows,
            kv_len_table=kv_lens,
        )

        def work() -> None:
            cos, sin = self._rotary(positions)
            step = LayerInputs(
                num_tokens=size,
                num_decode=0,
                num_rows=size,
                cos=cos,
                sin=sin,
                kv_indices=kv_indices,
                table=self._table.device,
                decode=None,
                prefill=None,
                num_verify=size,
                verify=VerifyPart(packed, sequences, slots, step_slots, before),
            )
            self._logits[:size].copy_(self._head(self._forward(token_ids, step)))

        return self._record(work)


def _in_pieces(num_tokens: int, longest: int) -> list[int]:
    """Split a number of tokens into lengths of at most ``longest``.

    >>> _in_pieces(11, 5)
    [5, 5, 1]
    """
    whole, rest = divmod(num_tokens, longest)
    return [longest] * whole + [rest] * (rest > 0)
