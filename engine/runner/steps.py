"""Steps as tensors: KV rows of running requests, the inputs of a batch, and graphs.

A graph repeats captured launches on the same memory, which saves the host's work. So inputs are
copied into buffers with fixed addresses, and sizes are rounded up to buckets. The unused entries
are padding, which reads and writes the padding rows and slots, and is not routed to experts. The
memory of a graph is overwritten by the next replay, so results are written to shared buffers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.layers.blocks import DecodePart, LayerInputs, PrefillPart, Rows, StepPart, padded_count
from engine.layers.rotary import RotaryTable
from engine.models.decoder import Decoder
from engine.runner.device import Device
from engine.runner.memory import Memory, allocate
from engine.schedule.scheduler import Batch, Segment
from hybridcache.allocators.moves import Indices
from hybridcache.radix.tokens import Tokens
from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed
from kernels.upload import upload


class RequestTable:
    """KV indices of running requests: int32 ``[rows, max_model_len]``, on host and device."""

    def __init__(self, num_rows: int, max_model_len: int, padding_index: int, device: Device):
        host = allocate((num_rows + 1, max_model_len), torch.int32, Device.resolve("cpu"))
        self.host: npt.NDArray[np.int32] = host.numpy()
        self.host[num_rows] = padding_index
        self.padding_row = num_rows
        self.device = host.to(device.torch_device)  # The same memory on a CPU.

    def write(self, writes: Sequence[tuple[int, int, npt.NDArray[np.int32]]]) -> None:
        """Write KV indices at (row, start). One copy to the device per write."""
        for row, start, indices in writes:
            end = start + len(indices)
            self.host[row, start:end] = indices
            if self.device.device.type != "cpu":
                self.device[row, start:end] = upload(indices, torch.int32, self.device.device)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Arranges the tokens of a batch, decodes first, padded to a multiple of ``multiple`` rows."""

    memory: Memory
    table: RequestTable
    rotary: RotaryTable
    multiple: int
    tile_size: int

    def of(
        self, batch: Batch, verified: StepPart | None = None
    ) -> tuple[torch.Tensor, LayerInputs]:
        """Return token ids ``[num_rows]`` and all other inputs of the layers. ``verified`` is the
        part of the segments with drafts, if there are any."""
        decodes, prefills = list[Segment](), list[Segment]()
        tokens, positions, indices = list[Tokens](), list[Tokens](), list[Indices]()
        for segment in batch.segments:
            if not segment.num_drafts:
                (decodes if segment.is_decode else prefills).append(segment)
            tokens.append(segment.token_ids)
            positions.append(np.arange(segment.start, segment.end, dtype=np.int32))
            indices.append(self.table.host[segment.row, segment.start : segment.end])
        known = np.concatenate(tokens)
        num_tokens, device = len(known), self.table.device.device
        num_rows = padded_count(num_tokens, self.multiple)
        token_ids = np.zeros(num_rows, np.int64)
        token_ids[:num_tokens] = known
        parts = list[StepPart]()
        if decodes:
            parts.append(DecodePart(len(decodes), *self._sequences(decodes)))
        if verified is not None:
            parts.append(verified)
        if prefills:
            parts.append(self._prefill_part(prefills))
        step = LayerInputs(
            num_tokens=num_tokens,
            num_rows=num_rows,
            angles=self.rotary(upload(np.concatenate(positions), torch.int64, device)),
            kv_indices=upload(np.concatenate(indices), torch.int64, device),
            table=self.table.device,
            parts=parts,
        )
        return upload(token_ids, torch.int64, device), step

    def _prefill_part(self, segments: Sequence[Segment]) -> PrefillPart:
        lengths, device = [len(one.token_ids) for one in segments], self.table.device.device
        packed = Packed.from_lengths(lengths, device, self.tile_size)
        exports = [
            (index, position - segment.start, slot)
            for index, segment in enumerate(segments)
            for position, slot in segment.exports
        ]
        if self.memory.checkpoints is not None:
            staging = self.memory.checkpoints.staging
            exports = [(index, at, staging[i]) for i, (index, at, _) in enumerate(exports)]
        sequences, slots = self._sequences(segments)
        return PrefillPart(
            num_tokens=sum(lengths),
            packed=packed,
            sequences=sequences,
            slots=slots,
            resumed=upload([segment.start > 0 for segment in segments], torch.bool, device),
            exports=Exports.plan(packed, exports),
        )

    def _sequences(self, segments: Sequence[Segment]) -> tuple[Sequences, torch.Tensor]:
        """Return the sequences of ``segments``, and the slots of their states: int32."""
        rows, ends = [one.row for one in segments], [one.end for one in segments]
        slots = [one.slot for one in segments if one.slot is not None]
        device = self.table.device.device
        return Sequences.of(rows, ends, device), upload(slots, torch.int32, device)


Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Captures the launches of a function, and returns a function that repeats them."""

Bucket = tuple[int, int]
"""(tokens, KV bound)."""

KV_BOUNDS = (2048, 8192, 32768, 131072)
"""Numbers of tokens that a graph attends to. With one bound, every step would read the longest."""
PREFILL_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Sizes in tokens. In a larger step the device has more work than the host."""


def bucket_for(size: int, buckets: Sequence[int]) -> int | None:
    """Return the smallest bucket of at least ``size``, or None. ``buckets`` ascend."""
    index = bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else None


def up_to(most: int, buckets: Sequence[int]) -> list[int]:
    """Return the ``buckets`` below ``most``, followed by ``most``."""
    return [*(bucket for bucket in buckets if bucket < most), most]


def decode_buckets(table: RequestTable) -> list[Bucket]:
    """Return the buckets of ``DecodeGraphs``, largest first: 1, 2, 4, 8, then multiples of 8 up to
    64 and of 32 beyond."""
    sizes = [1, 2, 4]
    while sizes[-1] < table.padding_row:
        sizes.append(sizes[-1] + (4 if sizes[-1] < 8 else 8 if sizes[-1] < 64 else 32))
    bounds = up_to(table.host.shape[1], KV_BOUNDS)
    return [(size, bound) for size in sizes[::-1] for bound in bounds[::-1]]


class DecodeGraphs:
    """Graphs of steps of decodes without drafts, one per bucket. ``record`` executes the work once,
    so the first step of a bucket is both computed and captured."""

    def __init__(
        self,
        model: Decoder,
        inputs: StepLayout,
        record: Record,
        buckets: Sequence[Bucket],
        *tables: npt.NDArray[np.generic],
    ) -> None:
        """``buckets``: largest first. ``tables``: inputs on the host; the first starts with ids."""
        self._model, self._record = model, record
        self._table, self._rotary, self._memory = inputs.table, inputs.rotary, inputs.memory
        self._replays: dict[Bucket, Replay | None] = dict.fromkeys(buckets)
        self._sizes, self._bounds = (sorted(set(part)) for part in zip(*buckets, strict=True))
        most, device = self._sizes[-1], self._table.device.device
        self._host_tables = tables or (np.zeros((7, most), np.int64),)
        """By default: id, position and KV index of each sequence's token, one if it is not padding;
        the sequence's row, KV length and slot."""
        self._tables = [torch.from_numpy(table).to(device) for table in self._host_tables]
        """The same tables in the memory that kernels read; on a CPU, the same memory."""
        self._logits = model.new_empty(most, model.config.vocab_size)

    @property
    def buckets(self) -> list[Bucket]:
        """List the buckets, largest first."""
        return list(self._replays)

    def run(
        self, segments: Sequence[Segment], patch: Callable[[torch.Tensor], None]
    ) -> torch.Tensor | None:
        """Compute the logits of every token, or return None if the step does not fit into a bucket.
        ``patch`` writes tokens that only the device has into the token ids."""
        count = sum([len(segment.token_ids) for segment in segments])
        size = bucket_for(count, self._sizes)
        bound = bucket_for(max([segment.end for segment in segments]), self._bounds)
        if size is None or bound is None or (size, bound) not in self._replays:
            return None
        self._load(segments, size)
        patch(self._tables[0][0])
        replay = self._replays[size, bound]
        if replay is None:
            self._replays[size, bound] = self._recorded(size, bound)
        else:
            replay()
        return self._logits[:count].clone()

    def capture(self, bucket: Bucket) -> None:
        """Capture the graph of one of the ``buckets``, computed on padding."""
        self._load((), bucket[0])
        self._replays[bucket] = self._recorded(*bucket)

    def _load(self, segments: Sequence[Segment], size: int) -> None:
        self._fill(segments, size)
        for host, table in zip(self._host_tables, self._tables, strict=True):
            if table.device.type != "cpu":
                table.copy_(upload(host, table.dtype, table.device))

    def _recorded(self, size: int, bound: int) -> Replay:
        """Compute the step in the tables, and return the function that computes the next one."""
        token_ids, positions, kv_indices, live = self._tables[0][:4, :size].unbind()
        padding = (self._table.padding_row,) * size, (bound,) * size
        make_part = self._part(size, partial(Sequences, *padding))

        def work() -> None:
            step = LayerInputs(
                num_tokens=size,
                num_rows=size,
                angles=self._rotary(positions),
                kv_indices=kv_indices,
                table=self._table.device,
                parts=[make_part()],
                live=live,
            )
            hidden = self._model.forward(token_ids, step, self._memory.pools)
            self._logits[:size].copy_(self._model.head(hidden))

        return self._record(work)

    def _fill(self, segments: Sequence[Segment], size: int) -> None:
        """Write ``segments``, and padding up to ``size`` tokens, into the host's tables."""
        host, memory, row = self._table.host, self._memory, self._table.padding_row
        columns = [
            (
                segment.token_ids[0],
                segment.start,
                host[segment.row, segment.start],
                1,
                segment.row,
                segment.end,
                segment.slot or 0,
            )
            for segment in segments
        ]
        padding = 0, 0, memory.padding_row, 0, row, 1, memory.padding_slot or 0
        columns += [padding] * (size - len(segments))
        self._host_tables[0][:, :size] = np.array(columns, dtype=np.int64).T

    def _part(self, size: int, bounded: Callable[..., Sequences]) -> Callable[[], StepPart]:
        """Return a function that makes the step's part from the tables. ``bounded`` makes
        ``Sequences`` with the bucket's bounds."""
        rows, kv_lens, slots = self._tables[0][4:, :size].unbind()
        return lambda: DecodePart(size, bounded(rows.int(), kv_lens.int()), slots.int())


class PrefillGraphs:
    """Graphs of steps with prefills: one up to the first mixer, one between each two, and one after
    the last. Mixers are launched one by one, because their launches depend on lengths."""

    def __init__(self, model: Decoder, memory: Memory, record: Record, *, most_tokens: int) -> None:
        self._model, self._pools, self._record = model, memory.pools, record
        multiple: int = model.build.kernels["linear"].ROWS
        largest = min(padded_count(most_tokens, multiple), PREFILL_BUCKETS[-1])
        self._sizes = up_to(largest, PREFILL_BUCKETS)
        self._replays: dict[int, list[Replay]] = {}
        self._residual = model.new_empty(largest, model.config.hidden_size).zero_()
        self._token_ids = self._residual.new_zeros(largest, dtype=torch.int64)
        ones = torch.ones_like(self._token_ids)
        self._live, self._steps = ones, torch.cat([ones, torch.zeros_like(ones)])
        """See ``Rows.live``, and its values for every number of tokens."""
        self._hidden = torch.zeros_like(self._residual)
        self._mixers = [step.block for step in model.mixers]
        shapes = [((mixer.projected_size,), mixer.mixed_shape) for mixer in self._mixers]
        new = self._residual.new_zeros
        made = {pair: [new(largest, *shape) for shape in pair] for pair in set(shapes)}
        self._buffers = [made[pair] for pair in shapes]
        """Input and output of each mixer; mixers of the same sizes share them."""

    @property
    def buckets(self) -> list[int]:
        return self._sizes[::-1]

    def run(self, token_ids: torch.Tensor, step: LayerInputs) -> torch.Tensor | None:
        """Compute hidden states, or return None if there are more tokens than in any bucket."""
        size = bucket_for(step.num_tokens, self._sizes)
        if size is None:
            return None
        if size not in self._replays:
            self.capture(size)
        self._token_ids[: step.num_tokens].copy_(token_ids[: step.num_tokens])
        self._token_ids[step.num_tokens : size].zero_()
        first = self._sizes[-1] - step.num_tokens
        self._live[:size].copy_(self._steps[first : first + size])
        padded = replace(step, num_rows=size)
        *replays, last = self._replays[size]
        for index, replay in enumerate(replays):
            replay()
            projected, mixed = self._buffers[index]
            out = self._mixers[index].mix(projected[:size], padded, self._pools[index])
            mixed[: step.num_tokens].copy_(out)
        last()
        hidden = self._hidden[:size]
        self._model.follow(token_ids, hidden, step, self._pools)
        return hidden

    def capture(self, size: int) -> None:
        indices = range(len(self._mixers) + 1)
        self._replays[size] = [self._record(partial(self._piece, index, size)) for index in indices]

    def _piece(self, index: int, size: int) -> None:
        """Compute the layers between the mixers ``index - 1`` and ``index``."""
        rows, residual = Rows(size, self._live[:size]), self._residual[:size]
        model, before = self._model, None
        if index == 0:
            hidden = model.embedding(self._token_ids[:size])
        else:
            projected, mixed = (x[:size] for x in self._buffers[index - 1])
            step, before = model.mixers[index - 1], residual
            hidden = step.leave(step.block.finish(mixed, projected))
        out, stream = model.advance(index, hidden, before, rows)
        if index == len(self._mixers):
            self._hidden[:size].copy_(out)
        else:
            self._buffers[index][0][:size].copy_(out)
            residual.copy_(stream)


class Graphs(NamedTuple):
    """Graphs of each kind of step, or None for steps that are launched kernel by kernel."""

    decodes: DecodeGraphs | None = None
    verifies: DecodeGraphs | None = None
    prefills: PrefillGraphs | None = None
    guesses: Any = None
    """Passes of a multi-token head (``Predictor``)."""


Copies = Sequence[tuple[int, int]]
"""Copies of states: (source slot, target slot)."""
