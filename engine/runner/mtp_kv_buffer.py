"""Buffer of rows of a multi-token head that are computed later.

The rows are read only when tokens are drafted, and sixteen together cost little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.layers.inputs import LayerInputs, RotaryTable, pad_rows
from engine.layers.prediction import PredictionHead
from engine.models.decoder import Decoder
from engine.runner.graphs import Record, Replay, bucket_for, decode_buckets
from engine.runner.memory import Memory
from engine.runner.step_inputs import RequestTable
from engine.schedule.batch import Batch, Segment
from kernels.upload import upload

CAPACITY = 256
"""Number of tokens that may be pending; more if a step decodes more."""
SIZES = (1, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224)
"""Numbers of tokens that are computed together by recordings, in addition to the maximum."""


class PendingRows:
    """The rows of tokens that were decoded one per step.

    They stay pending while step after step decodes the same sequences and none of their rows moves
    or changes its owner. Until then no other request reads the rows. Before any other step
    (`admit`), and before drafting (`settle`), they are computed from the hidden vectors stored
    here. The bits are those of separate computation, because a product gives a row the same bits
    next to any other rows.

    Each step costs a few small copies: the inputs of its tokens' rows are written to the pending
    entries, and its results to those of the next step, in the order of the sequences.
    """

    def __init__(
        self,
        head: PredictionHead,
        model: Decoder,
        memory: Memory,
        table: RequestTable,
        rotary: RotaryTable,
    ) -> None:
        self._head, self._model = head, model
        self._pools, self._table = memory.pools[-1], table
        self._row_multiple: int = model.build.kernels["linear"].ROWS
        writes = model.build.kernels["cache_write"]
        self._write_rows, self._write_pairs = writes.write_rows, writes.write_kv
        self._padding_row = memory.padding_row
        carried, widest = self._pools[-1], decode_buckets(table.padding_row)[-1]
        self._most = max(CAPACITY, widest)
        last = self._most + widest
        self._befores = carried.new_zeros(last + 1, carried.shape[1])
        """Hidden vector before each pending token and each token of the next step, and one row of
        padding."""
        self._numbers = torch.zeros(2, last + 1, 1, 1, dtype=torch.int64, device=carried.device)
        """Token and KV index of each pending token."""
        self._angles = rotary.cos.new_zeros(2, last + 1, 1, rotary.cos.shape[1])
        """Cosines and sines of each pending token."""
        self._host_places = np.full((2, widest), last)
        self._live = self._host_places[:, :0]
        """Entries of the sequences that decode."""
        self._runs = np.empty((0, 2, 0), np.int64)
        """Values of ``_live`` in the first pending step, in the second, and so on."""
        self._places = torch.from_numpy(self._host_places).to(carried.device)
        """int64: where a step writes the inputs of its tokens' rows, and where its hidden vectors.
        On a CPU it shares the host's memory."""
        self._host_bytes = None
        if carried.is_cpu:
            befores, own = (x.view(torch.uint8).numpy() for x in (self._befores, carried))
            self._host_bytes = befores, own
        self._rows: tuple[int, ...] = ()
        """Rows of the request table that decode in the step admitted last."""
        self._num_held = 0
        """Number of steps with pending rows."""
        self._record: Record | None = None
        self._replays: dict[int, Replay] = {}

    def record(self, record: Record) -> None:
        """Use recordings. Without a recording (NotRecordableError), rows are computed directly."""
        self._record = record
        self._numbers[1] = self._padding_row
        self._replays[SIZES[0]] = record(self._work(SIZES[0]))

    def admit(self, batch: Batch) -> None:
        """Compute all rows that must not stay pending in ``batch``. Called before ``batch`` is
        executed."""
        rows = _decoding(batch.segments)
        is_full = (self._num_held + 1) * len(rows) > self._most
        if is_full or rows != self._rows or _changes(batch):
            self.settle()
            self._rows = rows

    def hold(self, batch: Batch) -> None:
        """Set the entries for the results of the admitted ``batch``, if it only decodes. Called
        before it is computed."""
        if not self._rows:
            return
        if not self._num_held:
            self._begin(batch.segments)
        self._live[:] = self._runs[self._num_held]
        if self._host_bytes is None:
            places = self._places
            places.copy_(upload(self._host_places, torch.int64, places.device))

    def count(self) -> None:
        """Count the admitted batch as pending, after it was computed."""
        self._num_held += bool(self._rows)

    @torch.inference_mode()
    def _begin(self, segments: Sequence[Segment]) -> None:
        """Start with the hidden vectors of the sequences' states, when no row is pending."""
        width, slots = len(segments), [segment.slot or 0 for segment in segments]
        if self._host_bytes is not None:
            befores, carried = self._host_bytes
            befores[:width] = carried[slots]
        else:
            indices = upload(slots, torch.int64, self._places.device)
            self._befores[:width] = self._pools[-1][indices]
        if width != self._live.shape[1]:
            self._host_places[:] = len(self._befores) - 1
            self._live = self._host_places[:, :width]
            steps, pair = np.arange(self._most // width)[:, None, None], np.arange(2)[:, None]
            self._runs = (steps + pair) * width + np.arange(width)

    def carry(self, token_ids: torch.Tensor, hidden: torch.Tensor, step: LayerInputs) -> None:
        """Store the results of a ``step`` with decodes only, without reading values of the device
        on the host."""
        assert step.decode is not None
        self._head.carry(hidden, step.decode, self._pools)
        count = step.num_decode
        own, after = (places[:count] for places in self._places)
        self._write_rows(hidden[:count], self._befores, after)
        numbers = token_ids[:count, None, None], step.kv_indices[:count, None, None]
        self._write_pairs(*numbers, *self._numbers, own)
        if self._angles.shape[-1]:
            self._write_pairs(step.cos[:count, None], step.sin[:count, None], *self._angles, own)

    @torch.inference_mode()
    def settle(self) -> None:
        """Compute all pending rows."""
        count, self._num_held = self._num_held * len(self._rows), 0
        if not count:
            return
        if self._record is None:
            self._compute(count, -(-count // self._row_multiple) * self._row_multiple)
            return
        size = bucket_for(count, SIZES) or self._most
        self._numbers[1, count:size] = self._padding_row
        if size in self._replays:
            self._replays[size]()
        else:
            self._replays[size] = self._record(self._work(size))

    def _work(self, size: int) -> Callable[[], None]:
        return lambda: self._compute(size, size)

    def _compute(self, count: int, num_rows: int) -> None:
        """Compute the rows of the first ``count`` pending tokens."""
        tokens, kv_indices = self._numbers[:, :count, 0, 0]
        cos, sin = self._angles[:, :count, 0]
        inputs = LayerInputs(
            num_tokens=count,
            num_decode=count,
            num_rows=num_rows,
            cos=cos,
            sin=sin,
            kv_indices=kv_indices,
            table=self._table.device,
            decode=None,
            prefill=None,
        )
        embedded = pad_rows(self._model.embedding(tokens), num_rows)
        self._head.write(embedded, pad_rows(self._befores[:count], num_rows), inputs, self._pools)


def _decoding(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Return the request table rows of a step with decodes without drafts only, else ()."""
    rows = []
    for segment in segments:
        if segment.num_drafts or not segment.is_decode:
            return ()
        rows.append(segment.row)
    return tuple(rows)


def _changes(batch: Batch) -> bool:
    """Return True if ``batch`` moves anything, or gives a sequence rows other than the next
    ones."""
    if not batch.row_writes:
        return bool(batch.moves or batch.restores)
    starts = {segment.row: segment.start for segment in batch.segments}
    grows = all(start >= starts.get(row, start + 1) for row, start, _ in batch.row_writes)
    return bool(batch.moves or batch.restores) or not grows
