"""Rows of a multi-token head that wait: nothing reads them until something is guessed, and sixteen
together cost little more than one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.run.graphs import Record, Replay, bucket_for, decode_buckets
from engine.run.layers.inputs import DecodePart, LayerInputs, pad_rows
from engine.run.layers.prediction import PredictionHead
from engine.run.layers.rotary import RotaryTable
from engine.run.memory import Memory, RequestTable
from engine.run.models.decoder import Decoder
from engine.schedule.batch import Batch, Segment
from kernels.upload import upload

CAPACITY = 64
"""Tokens that may wait; more where more decode in a step."""
SIZES = (1, 4, 8, *range(12, CAPACITY, 4))
"""Tokens that are computed together where that is recorded; and as many as may wait."""


class PendingRows:
    """The rows of tokens that were decoded one a step.

    They wait while step after step decodes the same sequences and nothing that they have moves or
    changes hands: until then nobody but these sequences knows their rows. Before any other step
    (`admit`), and before a guess (`settle`), they are computed, from the hidden vectors kept here:
    the same bits as one by one, because a product gives a row the same bits in any company.

    A step costs one copy for that: what it leaves is written where the next one's tokens wait, in
    the order of the sequences.
    """

    def __init__(
        self,
        head: PredictionHead,
        model: Decoder,
        memory: Memory,
        table: RequestTable,
        rotary: RotaryTable,
    ) -> None:
        self._head, self._model, self._rotary = head, model, rotary
        self._pools, self._table = memory.pools[-1], table
        self._row_multiple: int = model.build.kernels["linear"].ROWS
        self._write_rows = model.build.kernels["cache_write"].write_rows
        self._padding_row = memory.padding_row
        carried, widest = self._pools[-1], decode_buckets(table.padding_row)[-1]
        self._most = max(CAPACITY, widest)
        self._befores = carried.new_zeros(self._most + widest + 1, carried.shape[1])
        """Of each token that waits, of those that the next step computes; and a row of padding."""
        host = np.full(widest, len(self._befores) - 1)
        self._places = torch.from_numpy(host).to(carried.device)
        """int64: where a step leaves the hidden vector of each sequence. On a CPU the same memory
        as the host's."""
        self._host_places = host
        self._columns = torch.zeros(3, self._most, dtype=torch.int64)
        """Token, position and KV index of each that waits, on the host."""
        self._host_columns = self._columns.numpy()
        self._host_bytes = None
        if carried.is_cpu:
            befores, own = (x.view(torch.uint8).numpy() for x in (self._befores, carried))
            self._host_bytes = befores, own
        self._late: list[tuple[int, torch.Tensor]] = []
        """Tokens that only the device knows, and where they belong."""
        self._rows: tuple[int, ...] = ()
        """Of the request table: those that decode in the step admitted last."""
        self._held: list[Sequence[Segment]] = []
        """Steps whose rows wait."""
        self._record: Record | None = None
        self._replays: dict[int, Replay] = {}

    def record(self, record: Record) -> None:
        """Have them computed by recordings; what NotRecordableError is raised for is not."""
        self._record = record
        self._replays[SIZES[0]] = record(self._work(SIZES[0]))

    def admit(self, batch: Batch) -> None:
        """Before anything of ``batch`` is done: compute what may not wait beyond it."""
        rows = _decoding(batch.segments)
        is_full = (len(self._held) + 1) * len(rows) > self._most
        if is_full or rows != self._rows or _changes(batch):
            self.settle()
            self._rows = rows

    def hold(self, batch: Batch, drawn: torch.Tensor | None) -> None:
        """Of the admitted ``batch``, if it does nothing but decode: keep what its tokens' rows are
        made of, before it is computed. ``drawn``: as for ``Runner.forward``."""
        width = len(self._rows)
        if not width:
            return
        if not self._held:
            self._begin(batch.segments)
        self._host_places[:width] += width
        places = self._places
        if not places.is_cpu:
            places.copy_(upload(self._host_places, torch.int64, places.device))
        if drawn is not None:
            first = len(self._held) * width
            self._late += [(first + place, drawn[row]) for place, row in batch.late_tokens]
        self._held.append(batch.segments)

    @torch.inference_mode()
    def _begin(self, segments: Sequence[Segment]) -> None:
        """Nothing waits: the first vectors are what the sequences carry."""
        width, slots = len(segments), [segment.slot or 0 for segment in segments]
        if self._host_bytes is not None:
            befores, carried = self._host_bytes
            befores[:width] = carried[slots]
        else:
            indices = upload(slots, torch.int64, self._places.device)
            self._befores[:width] = self._pools[-1][indices]
        self._host_places[width:] = len(self._befores) - 1
        self._host_places[:width] = range(width)

    def carry(self, hidden: torch.Tensor, part: DecodePart) -> None:
        """Take in what a step that decodes and does nothing else left; reads no number of the
        device on the host."""
        self._head.carry(hidden, part, self._pools)
        count = len(part.slots)
        self._write_rows(hidden[:count], self._befores, self._places[:count])

    @torch.inference_mode()
    def settle(self) -> None:
        """Compute what waits."""
        held, self._held = self._held, []
        if not held:
            return
        count = self._fill(held)
        if self._record is None:
            columns = self._columns[:, :count].to(self._befores.device)
            for place, token in self._late:
                columns[0, place] = token
            self._late = []
            self._compute(columns, -(-count // self._row_multiple) * self._row_multiple)
            return
        for place, token in self._late:
            self._host_columns[0, place] = int(token)
        self._late = []
        size = bucket_for(count, SIZES) or self._most
        self._host_columns[:, count:size] = [[0], [0], [self._padding_row]]
        if size in self._replays:
            self._replays[size]()
        else:
            self._replays[size] = self._record(self._work(size))

    def _fill(self, held: Sequence[Sequence[Segment]]) -> int:
        """Write the columns of all that wait; their number."""
        columns, length = self._host_columns, len(held)
        count = len(self._rows) * length
        steps = np.arange(length)[:, None]
        positions = steps + [segment.start for segment in held[0]]
        tokens = [segment.token_ids for segments in held for segment in segments]
        columns[0, :count] = np.concatenate(tokens)
        columns[1, :count] = positions.ravel()
        columns[2, :count] = self._table.host[self._rows, positions].ravel()
        return count

    def _work(self, size: int) -> Callable[[], None]:
        return lambda: self._compute(self._columns[:, :size], size)

    def _compute(self, columns: torch.Tensor, num_rows: int) -> None:
        """The rows of tokens, positions and KV indices, int64 ``[3, N]`` on the device."""
        tokens, positions, kv_indices = columns.unbind()
        cos, sin = self._rotary(positions)
        inputs = LayerInputs(
            num_tokens=len(tokens),
            num_decode=len(tokens),
            num_rows=num_rows,
            cos=cos,
            sin=sin,
            kv_indices=kv_indices,
            table=self._table.device,
            decode=None,
            prefill=None,
        )
        embedded = pad_rows(self._model.embedding(tokens), num_rows)
        before = pad_rows(self._befores[: len(tokens)], num_rows)
        self._head.write(embedded, before, inputs, self._pools)


def _decoding(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Of the request table, each; none where anything but decodes without drafts is among them."""
    rows = []
    for segment in segments:
        if segment.num_drafts or not segment.is_decode:
            return ()
        rows.append(segment.row)
    return tuple(rows)


def _changes(batch: Batch) -> bool:
    """Whether ``batch`` moves anything, or gives a sequence other rows than the next ones."""
    if not batch.row_writes:
        return bool(batch.moves or batch.restores)
    starts = {segment.row: segment.start for segment in batch.segments}
    grows = all(start >= starts.get(row, start + 1) for row, start, _ in batch.row_writes)
    return bool(batch.moves or batch.restores) or not grows
