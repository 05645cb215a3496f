"""The model's multi-token head beside it: its rows are written as the model computes, and it
guesses what comes next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.drafts.drafter import Newest
from engine.run.layers.inputs import LayerInputs, pad_rows
from engine.run.layers.prediction import PredictionHead
from engine.run.layers.rotary import RotaryTable
from engine.run.memory import Memory, RequestTable
from engine.run.models.decoder import Decoder
from hybridcache.tokens import Tokens
from kernels.upload import upload


class Predictor:
    """A multi-token head, the pool of what it keeps, and rows for guesses, which nobody else
    reads."""

    def __init__(
        self,
        model: Decoder,
        head: PredictionHead,
        memory: Memory,
        table: RequestTable,
        rotary: RotaryTable,
        *,
        row_multiple: int,
    ) -> None:
        """``memory``'s last pools are the head's, and what lies behind its padding row is for
        guesses."""
        self._model, self._head = model, head
        self._pools, self._table, self._rotary = memory.pools[-1], table, rotary
        self._first_row, self._row_multiple = memory.padding_row + 1, row_multiple

    def follow(self, token_ids: torch.Tensor, hidden: torch.Tensor, step: LayerInputs) -> None:
        """Take in a step that the model has computed; ``hidden`` is what it left."""
        hidden = hidden[: len(token_ids)]
        self._head.follow(self._model.embedding(token_ids), hidden, step, self._pools)

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> list[Tokens]:
        """For each request the ``most`` (1 or more) likeliest tokens behind its newest one, each as
        if those before it were right. One pass of the head a token, over all requests that still
        want one."""
        order = sorted(range(len(newest)), key=lambda rank: -most[rank])
        requests, wanted = [newest[rank] for rank in order], [most[rank] for rank in order]
        device = self._table.device.device
        tokens = upload([request.token_id for request in requests], torch.int64, device)
        slots = upload([request.slot for request in requests], torch.int64, device)
        before, rows = self._pools[-1][slots], self._rows(requests, wanted[0])
        guessed = []
        for step in range(wanted[0]):
            count = sum(length > step for length in wanted)
            before = self._head.draft(
                self._model.embedding(tokens[:count]),
                before[:count],
                [request.position + step for request in requests[:count]],
                rows[:count],
                self._rotary,
                self._pools,
            )
            padded = -(-count // self._row_multiple) * self._row_multiple
            tokens = self._model.head(pad_rows(before, padded))[:count].argmax(-1)
            guessed.append(tokens)
        columns = torch.nn.utils.rnn.pad_sequence(guessed).int().cpu().numpy()
        found: list[Tokens] = [columns[0]] * len(newest)
        for place, rank in enumerate(order):
            found[rank] = columns[place, : most[rank]]
        return found

    def _rows(self, requests: Sequence[Newest], depth: int) -> torch.Tensor:
        """int32[B, M]: KV rows of positions 1, 2, ... of each request up to its newest token, then
        ``depth`` rows of its own for that and the guesses."""
        device, count = self._table.device.device, len(requests)
        ends = [request.position - 1 for request in requests]
        known = max(ends)
        rows = self._table.device.new_zeros(count, known + depth)
        table_rows = upload([request.row for request in requests], torch.int64, device)
        rows[:, :known] = self._table.device[table_rows, 1 : 1 + known]
        ahead = torch.arange(depth, device=device)
        own = torch.arange(count, device=device)[:, None] * depth + ahead + self._first_row
        columns = upload(ends, torch.int64, device)[:, None] + ahead
        return rows.scatter_(1, columns, own.int())
