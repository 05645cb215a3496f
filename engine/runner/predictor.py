"""Drafts of a model's multi-token head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.layers.blocks import pad_rows, padded_count
from engine.layers.prediction import PredictionHead
from engine.models.decoder import Decoder
from engine.runner.steps import Bucket, Record, Replay, StepLayout, bucket_for
from hybridcache.radix.tokens import Tokens
from kernels.attention.sequences import Sequences
from kernels.upload import upload


class Newest(NamedTuple):
    """Newest token of a request, which is not computed yet, and the place of those before it."""

    row: int
    """Row in the request table."""
    slot: int
    """State slot."""
    token_id: int
    position: int
    """Position of the token, 1 or more."""


ALIGNED_COLUMNS = 16
"""Triton compiles a kernel for strides that are a multiple of this number, and for others."""


class Predictor:
    """A multi-token head, the pools of its state, and separate rows for drafts."""

    def __init__(self, head: PredictionHead, model: Decoder, inputs: StepLayout) -> None:
        """The last pools of the memory are the head's; the rows after its padding row are for
        drafts."""
        memory, self.table, self.rotary = inputs.memory, inputs.table, inputs.rotary
        self.model, self.head, self.pools = model, head, memory.pools[-1]
        self._padding, self.first_row = memory.padding_row, memory.padding_row + 1
        self._row_multiple: int = model.build.kernels["linear"].ROWS
        self._sizes, self._bounds = list[int](), list[int]()
        self._replays: dict[Bucket, Replay] = {}

    def record(self, record: Record, sizes: Sequence[int], bounds: Sequence[int]) -> None:
        """Repeat passes from now on, for numbers of requests up to one of ``sizes``, with keys up
        to one of ``bounds``: without Python between native calls or launches, those of a small
        model take a third of the time. Longer ones are computed directly."""
        self._sizes, self._bounds, self._record = sorted(sizes), sorted(bounds), record
        self._replays = {}  # Former ones use the former addresses.
        most = self._sizes[-1]
        columns = torch.ones(3, most, dtype=torch.int64, device=self.table.device.device)
        columns[2] = self._padding
        width = padded_count(self._bounds[-1], ALIGNED_COLUMNS)
        rows = columns.new_full((most, width), self._padding, dtype=torch.int32)
        before = self.pools[-1].new_zeros(most, self.pools[-1].shape[1])
        self._kept = columns[0], before, columns[1], columns[2], rows
        self._lengths = columns.new_ones(most, dtype=torch.int32)
        self._places = torch.arange(most, dtype=torch.int32, device=columns.device)

    def compute_directly(self) -> None:
        """Repeat no recording from now on."""
        self._sizes, self._bounds, self._replays = [], [], {}

    @property
    def buckets(self) -> list[Bucket]:
        """List the numbers of requests with the bounds of their keys, largest first."""
        return [(size, bound) for size in self._sizes[::-1] for bound in self._bounds[::-1]]

    def capture(self, bucket: Bucket) -> None:
        """Record the pass of one of the ``buckets``, computed on padding."""
        self._replay((), bucket)

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> list[Tokens]:
        """Draft the ``most`` (1 or more) most likely tokens after each request's newest one, with
        one pass of the head per token over all requests that still need one."""
        order = sorted(range(len(newest)), key=lambda place: -most[place])
        requests, wanted = [newest[place] for place in order], [most[place] for place in order]
        device = self.table.device.device
        tokens = upload([request.token_id for request in requests], torch.int64, device)
        slots = upload([request.slot for request in requests], torch.int64, device)
        before, rows = self.pools[-1][slots], self._rows(requests, wanted[0])
        if self._sizes:
            kept = self._kept[-1][: len(rows), : rows.shape[1]]
            kept.copy_(rows[: len(kept), : kept.shape[1]])
        guessed = []
        for step in range(wanted[0]):
            count = sum(length > step for length in wanted)
            lengths = [request.position + step for request in requests[:count]]
            at = upload(lengths, torch.int64, device)
            kv_indices = rows[:count].gather(1, at[:, None] - 1)[:, 0].long()
            inputs = tokens[:count], before[:count], at, kv_indices
            size = bucket_for(count, self._sizes)
            bound = bucket_for(max(lengths), self._bounds)
            if size is None or bound is None:
                sequences = Sequences.of(range(count), lengths, device)
                tokens, before = self._pass((*inputs, rows[:count]), sequences)
            else:
                tokens, before = self._replay(inputs, (size, bound))
            guessed.append(tokens[:count].clone())
        drafts = torch.nn.utils.rnn.pad_sequence(guessed).int().cpu().numpy()
        found = dict(zip(order, drafts, strict=True))
        return [found[place][:length] for place, length in enumerate(most)]

    def _pass(
        self, inputs: Sequence[torch.Tensor], sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most likely next token of each request, and h. ``inputs``: tokens and h before
        them, positions, rows to write, rows of each request."""
        tokens, before, at, kv_indices, rows = inputs
        embedded, count = self.model.embedding(tokens), len(tokens)
        parts = at, kv_indices, rows, sequences, self.rotary, self.pools
        hidden = self.head.draft(embedded, before, *parts)
        padded = pad_rows(hidden, padded_count(count, self._row_multiple))
        return self.model.head(padded)[:count].argmax(-1), hidden

    def _replay(
        self, inputs: Sequence[torch.Tensor], bucket: Bucket
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute ``_pass`` by a recording, which reads lengths and rows from memory. Requests that
        fill the bucket have one key, and write to the padding row."""
        size, bound = bucket
        kept = [tensor[:size] for tensor in self._kept]
        for own, given in zip(kept, inputs, strict=False):
            if given.data_ptr() != own.data_ptr():  # Not the results of the pass before.
                own[: len(given)].copy_(given)
        count = len(inputs[0]) if inputs else 0
        kept[2][count:], kept[3][count:] = 1, self._padding
        lengths = self._lengths[:size].copy_(kept[2])
        if bucket in self._replays:
            self._replays[bucket]()
            return kept[0], kept[1]
        places = self._places[:size]  # Kept here, because a recording uses its address.
        sequences = Sequences(tuple(range(size)), (bound,) * size, places, lengths)

        def work() -> None:
            for own, result in zip(kept, self._pass(kept, sequences), strict=False):
                own.copy_(result)

        self._replays[bucket] = self._record(work)
        return kept[0], kept[1]

    def _rows(self, requests: Sequence[Newest], depth: int) -> torch.Tensor:
        """Return int32[B, M]: KV rows of positions 1, 2, ... of each request up to its newest
        token, then ``depth`` separate rows for that token and the drafts."""
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
