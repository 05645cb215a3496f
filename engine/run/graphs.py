"""Device graphs: launches that are captured once and repeated, so that the host is not what a step
waits for.

A graph repeats the same launches on the same memory. So inputs are copied into buffers that stay
where they are, and sizes are rounded up to buckets; what is too much is padding, which reads and
writes the padding rows and slots of the pools.

- `DecodeGraphs`: a step in which everybody decodes is one graph.
- `PrefillGraphs`: any other step is a graph per dense piece, from one mixer to the next. The mixers
  between them, whose launches depend on the sequences' lengths, are launched one by one.

Graphs are captured in a warm-up, the largest first so that the others fit into its memory; without
one, when a bucket first occurs. ``record`` is what `Device.recorder` gives: no graph's own memory
outlives the next replay, so what a graph leaves goes to buffers, which all buckets share.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from engine.run.layers.inputs import DecodePart, LayerInputs
from engine.run.layers.rotary import RotaryTable
from engine.run.memory import KVPool, RequestTable, StatePool
from engine.run.models.decoder import Decoder
from engine.schedule.batch import Segment
from kernels.attention.sequences import Sequences
from kernels.upload import upload

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Captures what a function launches; the result launches it again."""

KV_BOUNDS = (2048, 8192, 32768, 131072)
"""A decode graph attends to at most this many tokens; more bounds than one, or every step would
walk the longest."""
PREFILL_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens. In a step of more than the last the device has more to do than the host, and needs no
graph."""


def prefill_buckets(most_tokens: int) -> tuple[int, ...]:
    """Those below ``most_tokens``, and it: no step is larger."""
    smaller = tuple(bucket for bucket in PREFILL_BUCKETS if bucket < most_tokens)
    return (*smaller, most_tokens) if most_tokens <= PREFILL_BUCKETS[-1] else PREFILL_BUCKETS


def bucket_for(size: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds ``size``; None if it is too large for all. ``buckets``
    ascend."""
    rank = bisect_left(buckets, size)
    return buckets[rank] if rank < len(buckets) else None


def decode_buckets(max_running: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then every multiple of 8 up to 64 and of 32 beyond, the last at least
    ``max_running``."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_running:
        sizes.append(sizes[-1] + (4 if sizes[-1] < 8 else 8 if sizes[-1] < 64 else 32))
    return tuple(sizes)


class DecodeGraphs:
    """Steps of nothing but decoding sequences."""

    def __init__(
        self,
        model: Decoder,
        kv: KVPool,
        states: StatePool | None,
        table: RequestTable,
        rotary: RotaryTable,
        record: Record,
        *,
        max_running: int,
        max_model_len: int,
    ) -> None:
        self._model, self._kv, self._states = model, kv, states
        self._table, self._rotary, self._record = table, rotary, record
        self._sizes = decode_buckets(max_running)
        self._bounds = (*(b for b in KV_BOUNDS if b < max_model_len), max_model_len)
        self._replays: dict[tuple[int, int], Replay] = {}
        slot = states.padding_slot if states is not None else 0
        column = np.array([0, 0, kv.padding_row, table.padding_row, 1, slot])
        most = self._sizes[-1]
        self._padding = upload(
            np.repeat(column[:, None], most, axis=1), torch.int64, table.device.device
        )
        self._inputs = self._padding.clone()
        """int64[6, D]: token, position, KV index, row, KV length and slot of each sequence."""
        self._logits = kv.key.new_empty(most, model.config.vocab_size)

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(sequences, KV bound) of every graph, the largest first."""
        return [(size, bound) for size in self._sizes[::-1] for bound in self._bounds[::-1]]

    def run(
        self, segments: Sequence[Segment], patch: Callable[[torch.Tensor], None]
    ) -> torch.Tensor | None:
        """Logits ``[len(segments), vocab]``, or None for more sequences than any bucket holds.

        ``patch`` puts tokens that only the device knows into the token ids.
        """
        count = len(segments)
        size = bucket_for(count, self._sizes)
        bound = bucket_for(max(segment.end for segment in segments), self._bounds)
        if size is None or bound is None:
            return None
        if (size, bound) not in self._replays:
            self.capture((size, bound))
        self._inputs[:, :count].copy_(self._columns(segments))
        if count < size:
            self._inputs[:, count:size].copy_(self._padding[:, count:size])
        patch(self._inputs[0])
        self._replays[size, bound]()
        return self._logits[:count].clone()

    def _columns(self, segments: Sequence[Segment]) -> torch.Tensor:
        host = self._table.host
        columns = [
            (
                int(segment.token_ids[0]),
                segment.start,
                host[segment.row, segment.start],
                segment.row,
                segment.end,
                segment.slot or 0,
            )
            for segment in segments
        ]
        values = np.array(columns, dtype=np.int64).T.copy()
        return upload(values, torch.int64, self._table.device.device)

    def capture(self, bucket: tuple[int, int]) -> None:
        """Make the graph of one of the ``buckets``. Computes on padding."""
        size, bound = bucket
        self._inputs.copy_(self._padding)

        def work() -> None:
            token_ids, positions, kv_indices, rows, kv_lens, slots = self._inputs[:, :size].unbind()
            cos, sin = self._rotary(positions)
            sequences = Sequences(
                rows=(self._table.padding_row,) * size,
                kv_lens=(bound,) * size,
                row_table=rows.int(),
                kv_len_table=kv_lens.int(),
            )
            step = LayerInputs(
                num_tokens=size,
                num_decode=size,
                num_rows=size,
                cos=cos,
                sin=sin,
                kv_indices=kv_indices,
                table=self._table.device,
                decode=DecodePart(sequences, slots.int()),
                prefill=None,
            )
            hidden = self._model.forward(token_ids, step, self._kv, self._states)
            self._logits[:size].copy_(self._model.head(hidden))

        self._replays[bucket] = self._record(work)


class PrefillGraphs:
    """Steps with prompts in them, piece by piece: up to the first mixer, between each two, and
    behind the last."""

    def __init__(
        self,
        model: Decoder,
        kv: KVPool,
        states: StatePool | None,
        record: Record,
        *,
        most_tokens: int,
    ) -> None:
        self._model, self._record = model, record
        self._kv_pools = (kv.key, kv.value)
        self._state_pools = states.tensors if states is not None else None
        self._sizes = prefill_buckets(most_tokens)
        self._replays: dict[int, list[Replay]] = {}
        self._token_ids = torch.zeros(self._sizes[-1], dtype=torch.int64, device=kv.key.device)
        self._projected: dict[bool, torch.Tensor] = {}
        """By whether a layer is a full-attention one: what its mixer reads."""
        self._mixed: dict[bool, torch.Tensor] = {}
        """What its mixer leaves."""
        self._residual: torch.Tensor
        self._hidden: torch.Tensor
        self._allocate()

    @property
    def buckets(self) -> list[int]:
        """Tokens of every bucket, the largest first."""
        return list(self._sizes[::-1])

    @torch.inference_mode()
    def _allocate(self) -> None:
        """Buffers of the shapes that the layers give, found by one run of each kind's input
        product."""
        hidden = self._model.embedding(self._token_ids)
        self._residual, self._hidden = torch.zeros_like(hidden), torch.zeros_like(hidden)
        for layer in self._model.layers:
            if layer.is_full not in self._projected:
                projected, _ = layer.project(hidden, None)
                self._projected[layer.is_full] = torch.zeros_like(projected)
                shape = (len(hidden), *layer.mixer.mixed_shape)
                self._mixed[layer.is_full] = hidden.new_zeros(shape)

    def run(self, token_ids: torch.Tensor, step: LayerInputs) -> torch.Tensor | None:
        """Hidden states as ``Decoder.forward`` gives them, or None for more tokens than any bucket
        holds."""
        size = bucket_for(step.num_tokens, self._sizes)
        if size is None:
            return None
        if size not in self._replays:
            self.capture(size)
        self._token_ids[: step.num_tokens].copy_(token_ids[: step.num_tokens])
        self._token_ids[step.num_tokens : size].zero_()
        step = replace(step, num_rows=size)
        replays = self._replays[size]
        for rank, layer in enumerate(self._model.layers):
            replays[rank]()
            pools = self._kv_pools if layer.is_full else self._state_pools
            assert pools is not None
            mixed = layer.mixer.mix(self._projected[layer.is_full][:size], step, pools)
            self._mixed[layer.is_full][: step.num_tokens].copy_(mixed)
        replays[-1]()
        return self._hidden[:size]

    def capture(self, size: int) -> None:
        """Make the graphs of one of the ``buckets``."""
        layers = range(len(self._model.layers))
        self._replays[size] = [
            *(self._record(partial(self._before, rank, size)) for rank in layers),
            self._record(partial(self._end, size)),
        ]

    def _before(self, rank: int, size: int) -> None:
        """Everything between the mixers of layers ``rank - 1`` and ``rank``."""
        layer = self._model.layers[rank]
        if rank == 0:
            projected, residual = layer.project(self._model.embedding(self._token_ids[:size]), None)
        else:
            projected, residual = layer.project(*self._finish(rank - 1, size))
        self._projected[layer.is_full][:size].copy_(projected)
        self._residual[:size].copy_(residual)

    def _end(self, size: int) -> None:
        hidden, residual = self._finish(len(self._model.layers) - 1, size)
        self._hidden[:size].copy_(self._model.norm.add(hidden, residual)[0])

    def _finish(self, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._model.layers[rank]
        mixed, projected = self._mixed[layer.is_full][:size], self._projected[layer.is_full][:size]
        return layer.finish(mixed, projected, self._residual[:size], size)
