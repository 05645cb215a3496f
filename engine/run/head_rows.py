"""Rows of a multi-token head that wait: nothing reads them until something is guessed, and sixteen
together cost little more than one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.run.graphs import Record, Replay, bucket_for, decode_buckets
from engine.run.layers.inputs import LayerInputs, pad_rows
from engine.run.layers.prediction import PredictionHead
from engine.run.layers.rotary import RotaryTable
from engine.run.memory import Memory, RequestTable
from engine.run.models.decoder import Decoder
from engine.schedule.batch import Batch, Segment
from kernels.upload import upload

CAPACITY = 64
"""Tokens that may wait; more where more decode in a step."""
SIZES = (1, 4, 8, 16, 32)
"""Tokens that are computed together where that is recorded; and as many as may wait."""


class PendingRows:
    """The rows of tokens that were decoded one a step.

    They wait while step after step decodes the same sequences and no row or slot changes hands:
    until then nobody but these sequences knows their rows. Before any other step (`admit`), and
    before a guess (`settle`), they are computed, from the tokens and the hidden vectors kept here:
    the same bits as one by one, because a product gives a row the same bits in any company.
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
        self._padding_row = memory.padding_row
        carried = self._pools[-1]
        most = max(CAPACITY, decode_buckets(table.padding_row)[-1])
        self._befores = carried.new_zeros(most, carried.shape[1])
        self._columns = torch.zeros(3, most, dtype=torch.int64)
        """Token, position and KV index of each, on the host."""
        self._late: list[tuple[int, torch.Tensor]] = []
        """Tokens that only the device knows, and where they belong."""
        self._rows: tuple[int, ...] = ()
        """Of the request table: those that decode in the step admitted last."""
        self._slots = torch.zeros(0, dtype=torch.int64, device=carried.device)
        self._count = 0
        self._record: Record | None = None
        self._replays: dict[int, Replay] = {}

    def record(self, record: Record) -> None:
        """Have them computed by recordings; what NotRecordableError is raised for is not."""
        self._record = record
        self._replays[SIZES[0]] = record(self._work(SIZES[0]))

    def admit(self, batch: Batch) -> None:
        """Before anything of ``batch`` is done: compute what may not wait beyond it."""
        rows = _decoding(batch.segments)
        changes = batch.moves or batch.row_writes or batch.restores
        if changes or rows != self._rows or self._count + len(rows) > len(self._befores):
            self.settle()
            self._rows = rows

    def hold(self, batch: Batch, drawn: torch.Tensor | None) -> None:
        """Of the admitted ``batch``, if it does nothing but decode: keep what its tokens' rows are
        made of, before it is computed. ``drawn``: as for ``Runner.forward``."""
        if not self._rows:
            return
        if not self._count:
            slots = [segment.slot or 0 for segment in batch.segments]
            self._slots = upload(slots, torch.int64, self._slots.device)
        columns, table = self._columns.numpy(), self._table.host
        for place, segment in enumerate(batch.segments, self._count):
            start = segment.start
            columns[:, place] = segment.token_ids[0], start, table[segment.row, start]
        new = slice(self._count, self._count + len(self._rows))
        torch.index_select(self._pools[-1], 0, self._slots, out=self._befores[new])
        if drawn is not None:
            self._late += [(self._count + place, drawn[row]) for place, row in batch.late_tokens]
        self._count = new.stop

    @torch.inference_mode()
    def settle(self) -> None:
        """Compute what waits."""
        count, self._count = self._count, 0
        if not count:
            return
        columns = self._columns[:, :count].to(self._befores.device)
        for place, token in self._late:
            columns[0, place] = token
        self._late = []
        if self._record is None:
            self._compute(columns, -(-count // self._row_multiple) * self._row_multiple)
            return
        size = bucket_for(count, SIZES) or len(self._befores)
        self._columns[:, count:size] = 0
        self._columns[2, count:size] = self._padding_row
        if size in self._replays:
            self._replays[size]()
        else:
            self._replays[size] = self._record(self._work(size))

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
    if any(segment.num_drafts or not segment.is_decode for segment in segments):
        return ()
    return tuple([segment.row for segment in segments])
