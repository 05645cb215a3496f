"""Multi-token head next to the model: its rows are written as the model computes, and it drafts
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.layers.blocks import LayerInputs, RotaryTable, pad_rows, padded_count
from engine.layers.prediction import PredictionHead, ahead
from engine.models.decoder import Decoder
from engine.runner.memory import Memory
from engine.runner.steps import Record, Replay, RequestTable
from engine.schedule.scheduler import Newest
from hybridcache.tokens import Tokens
from kernels.attention.sequences import Sequences
from kernels.upload import upload

ALIGNED_COLUMNS = 16
"""Triton compiles a kernel for strides that are a multiple of this number, and for others."""


class Predictor:
    """A multi-token head, the pools of its state, and separate rows for drafts."""

    def __init__(
        self,
        head: PredictionHead,
        model: Decoder,
        memory: Memory,
        table: RequestTable,
        rotary: RotaryTable,
    ) -> None:
        """Prepare the head. The last pools of ``memory`` are the head's; the rows after its padding
        row are for drafts."""
        self.model, self.head = model, head
        self.pools, self.table, self.rotary = memory.pools[-1], table, rotary
        self.first_row = memory.padding_row + 1
        self._row_multiple: int = model.build.kernels["linear"].ROWS
        self._passes: Passes | None = None

    def record(self, record: Record) -> None:
        """Record the passes of the head. Without a recording (NotRecordableError), they are
        computed directly."""
        self._passes = Passes(self, record)

    def follow(self, token_ids: torch.Tensor, hidden: torch.Tensor, step: LayerInputs) -> None:
        """Write the head's rows of a step that the model has computed with the result
        ``hidden``."""
        hidden = hidden[: len(token_ids)]
        self.head.follow(self.model.embedding(token_ids), hidden, step, self.pools)

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> list[Tokens]:
        """Draft the ``most`` (1 or more) most likely tokens after each request's newest one, each
        given those before it.

        Takes one pass of the head per token, over all requests that still need one.
        """
        order = sorted(range(len(newest)), key=lambda rank: -most[rank])
        requests, wanted = [newest[rank] for rank in order], [most[rank] for rank in order]
        if self._passes is not None:
            guessed = self._passes.run(requests, wanted)
        else:
            guessed = self._run(requests, wanted)
        found: list[Tokens] = [guessed[0]] * len(newest)
        for place, rank in enumerate(order):
            found[rank] = guessed[place, : most[rank]]
        return found

    def _run(self, requests: Sequence[Newest], wanted: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return int32[B, D], the tokens of each pass. Values after the end of a request's draft
        are undefined."""
        device = self.table.device.device
        tokens = upload([request.token_id for request in requests], torch.int64, device)
        slots = upload([request.slot for request in requests], torch.int64, device)
        before, rows = self.pools[-1][slots], self._rows(requests, wanted[0])
        guessed = []
        for step in range(wanted[0]):
            count = sum(length > step for length in wanted)
            before = self.head.draft(
                self.model.embedding(tokens[:count]),
                before[:count],
                [request.position + step for request in requests[:count]],
                rows[:count],
                self.rotary,
                self.pools,
            )
            padded = pad_rows(before, padded_count(count, self._row_multiple))
            tokens = self.model.head(padded)[:count].argmax(-1)
            guessed.append(tokens)
        return torch.nn.utils.rnn.pad_sequence(guessed).int().cpu().numpy()

    def _rows(self, requests: Sequence[Newest], depth: int) -> torch.Tensor:
        """Return int32[B, M]: KV rows of positions 1, 2, ... of each request up to its newest
        token, then ``depth`` separate rows for that token and the drafts. Later columns are not
        read."""
        device, count = self.table.device.device, len(requests)
        ends = [request.position - 1 for request in requests]
        known = max(ends)
        # Whole units of columns, because a kernel is compiled again for another alignment of rows.
        rows = self.table.device.new_zeros(count, padded_count(known + depth, ALIGNED_COLUMNS))
        table_rows = upload([request.row for request in requests], torch.int64, device)
        rows[:, :known] = self.table.device[table_rows, 1 : 1 + known]
        ahead = torch.arange(depth, device=device)
        own = torch.arange(count, device=device)[:, None] * depth + ahead + self.first_row
        columns = upload(ends, torch.int64, device)[:, None] + ahead
        return rows.scatter_(1, columns, own.int())


class Passes:
    """Recorded passes of the head on a CPU: one graph for each number of requests, which reads
    lengths from memory."""

    def __init__(self, predictor: Predictor, record: Record) -> None:
        self._predictor, self._record = predictor, record
        self._first_row, pools = predictor.first_row, predictor.pools
        num_requests, max_len = predictor.table.padding_row, predictor.table.host.shape[1]
        self._replays: dict[int, Replay] = {}
        self._depths = np.arange(max_len)[:, None, None]
        self._columns = torch.zeros(3, num_requests, dtype=torch.int64)
        """Newest token, its position and its row, of each request."""
        self._lengths = torch.ones(num_requests, dtype=torch.int32)
        self._ranks = torch.arange(num_requests, dtype=torch.int32)
        self._rows = torch.zeros(num_requests, max_len, dtype=torch.int32)
        """Rows of positions 1, 2, ... of each request."""
        self._before = pools[-1].new_zeros(num_requests, pools[-1].shape[1])
        self._host_before = [x.view(torch.uint8).numpy() for x in (self._before, pools[-1])]

        # Record the graph for one request, on rows for drafts.
        self._columns[1], self._columns[2] = 1, self._first_row
        self._rows[0, 0] = self._first_row
        self._replays[1] = self._record(self._work(1))

    def run(self, requests: Sequence[Newest], wanted: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return int32[B, D], the tokens of each pass over the ``requests`` that still need one.

        ``wanted`` descends. Values after the end of a request's draft are undefined.
        """
        columns, rows, lengths = self._columns.numpy(), self._rows.numpy(), self._lengths.numpy()
        table, count, depth = self._predictor.table.host, len(requests), wanted[0]
        for b, request in enumerate(requests):
            end, own = request.position - 1, self._first_row + b * depth
            rows[b, :end] = table[request.row, 1 : 1 + end]
            columns[:, b] = request.token_id, request.position, own
        # Between two replays the processor's caches are cold: assignments are cheap, sums are not.
        ahead = columns[1:, :count] + self._depths[:depth]
        for b, (request, length) in enumerate(zip(requests, wanted, strict=True)):
            rows[b, request.position - 1 :][:length] = ahead[:length, 1, b]
        before, carried = self._host_before
        before[:count] = carried[[request.slot for request in requests]]
        guessed = np.zeros((count, depth), np.int32)
        for step in range(depth):
            while wanted[count - 1] <= step:
                count -= 1
            columns[1:, :count] = ahead[step, :, :count]
            lengths[:count] = ahead[step, 0, :count]
            if count in self._replays:
                self._replays[count]()
            else:
                self._replays[count] = self._record(self._work(count))
            guessed[:count, step] = columns[0, :count]
        return guessed

    def _work(self, count: int) -> Callable[[], None]:
        tokens, positions, kv_indices = self._columns[:, :count].unbind()
        sequences = Sequences(
            rows=tuple(range(count)),
            kv_lens=(1,) * count,
            row_table=self._ranks[:count],
            kv_len_table=self._lengths[:count],
        )

        predictor, before = self._predictor, self._before[:count]

        def work() -> None:
            inputs = ahead(
                positions, kv_indices, self._rows, sequences, predictor.rotary, num_rows=count
            )
            embedded = predictor.model.embedding(tokens)
            hidden = predictor.head.advance(embedded, before, inputs, predictor.pools)
            before.copy_(hidden)
            tokens.copy_(predictor.model.head(hidden).argmax(-1))

        return work
