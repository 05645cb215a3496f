"""Device graphs: launches that are captured once and repeated, so that the host is not what a step waits for.

A graph repeats the same launches on the same memory. So inputs are copied into buffers that stay where they are, and sizes
are rounded up to buckets; what is too much is padding, which reads and writes the padding rows and slots of the pools.

- `DecodeGraphs`: a step in which everybody decodes is one graph.
- `PrefillGraphs`: any other step is a graph per dense piece, from one mixer to the next. The mixers between them, whose
  launches depend on the sequences' lengths, are launched one by one.

Graphs are captured when a bucket first occurs. ``record`` is what `Device.recorder` gives: no graph's own memory outlives
the next replay, so logits are cloned, and pieces leave theirs in buffers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from engine.batch import Segment
from engine.layers.rotary import RotaryTable
from engine.layers.step import DecodePart, Step
from engine.memory import KVPool, RequestTable, StatePool
from engine.models.decoder import Decoder
from kernels.attention.sequences import Sequences
from kernels.upload import upload

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures what a function launches; the result launches it again."""

KV_BOUNDS = (2048, 8192, 32768, 131072)
"""A decode graph attends to at most this many tokens; more bounds than one, or every step would walk the longest."""
PREFILL_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def bucket_for(size: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds ``size``; None if it is too large for all. ``buckets`` ascend."""
    rank = bisect_left(buckets, size)
    return buckets[rank] if rank < len(buckets) else None


def decode_buckets(max_running: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then every multiple of 8 up to 64 and of 32 beyond, the last at least ``max_running``."""
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
        self._graphs: dict[tuple[int, int], _DecodeGraph] = {}

    def run(
        self, segments: Sequence[Segment], patch: Callable[[torch.Tensor], None]
    ) -> torch.Tensor | None:
        """Logits ``[len(segments), vocab]``, or None for more sequences than any bucket holds.

        ``patch`` puts tokens that only the device knows into the token ids.
        """
        size = bucket_for(len(segments), self._sizes)
        bound = bucket_for(max(segment.end for segment in segments), self._bounds)
        if size is None or bound is None:
            return None
        graph = self._graphs.get((size, bound))
        if graph is None:
            graph = self._graphs[size, bound] = self._capture(size, bound)
        graph.inputs[:, : len(segments)].copy_(self._inputs(segments))
        if len(segments) < size:
            graph.inputs[:, len(segments) :].copy_(graph.padding[:, len(segments) :])
        patch(graph.inputs[0])
        graph.replay()
        return graph.logits[: len(segments)].clone()

    def _inputs(self, segments: Sequence[Segment]) -> torch.Tensor:
        """int64[6, D]: token, position, KV index, row, KV length and slot of each sequence."""
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

    def _capture(self, size: int, bound: int) -> _DecodeGraph:
        slot = self._states.padding_slot if self._states is not None else 0
        column = np.array([0, 0, self._kv.padding_row, self._table.padding_row, 1, slot])
        padding = upload(
            np.repeat(column[:, None], size, axis=1), torch.int64, self._table.device.device
        )
        graph = _DecodeGraph(padding)

        def work() -> None:
            token_ids, positions, kv_indices, rows, kv_lens, slots = graph.inputs.unbind()
            cos, sin = self._rotary(positions)
            sequences = Sequences(
                rows=(self._table.padding_row,) * size,
                kv_lens=(bound,) * size,
                row_table=rows.int(),
                kv_len_table=kv_lens.int(),
            )
            step = Step(
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
            graph.logits = self._model.head(hidden)

        graph.replay = self._record(work)
        return graph


class _DecodeGraph:
    """One bucket's graph and the memory it works on."""

    def __init__(self, padding: torch.Tensor) -> None:
        self.padding = padding
        self.inputs = padding.clone()
        self.logits: torch.Tensor
        self.replay: Callable[[], None]


class PrefillGraphs:
    """Steps with prompts in them, piece by piece."""

    def __init__(
        self, model: Decoder, kv: KVPool, states: StatePool | None, record: Record
    ) -> None:
        self._model, self._record = model, record
        self._kv_pools = (kv.key, kv.value)
        self._state_pools = states.tensors if states is not None else None
        self._pieces: dict[int, _Pieces] = {}

    def run(self, token_ids: torch.Tensor, step: Step) -> torch.Tensor | None:
        """Hidden states as ``Decoder.forward`` gives them, or None for more tokens than any bucket holds."""
        bucket = bucket_for(step.num_tokens, PREFILL_BUCKETS)
        if bucket is None:
            return None
        pieces = self._pieces.get(bucket)
        if pieces is None:
            pieces = self._pieces[bucket] = _Pieces(
                self._model, bucket, token_ids.device, self._record
            )
        pieces.token_ids[: step.num_tokens].copy_(token_ids[: step.num_tokens])
        pieces.token_ids[step.num_tokens :].zero_()
        step = replace(step, num_rows=bucket)
        for rank, layer in enumerate(self._model.layers):
            pieces.replays[rank]()
            pools = self._kv_pools if layer.is_full else self._state_pools
            assert pools is not None
            mixed = layer.mixer.mix(pieces.projected[layer.is_full], step, pools)
            pieces.mixed[layer.is_full][: step.num_tokens].copy_(mixed)
        pieces.replays[-1]()
        return pieces.hidden


class _Pieces:
    """One bucket's graphs: up to the first mixer, between each two, and behind the last. All layers share the buffers."""

    def __init__(self, model: Decoder, num_rows: int, device: torch.device, record: Record) -> None:
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.projected: dict[bool, torch.Tensor] = {}
        """By whether the layer is a full-attention one: what its mixer reads."""
        self.mixed: dict[bool, torch.Tensor] = {}
        """What its mixer leaves."""
        self.residual: torch.Tensor
        self.hidden: torch.Tensor
        self._model, self._num_rows = model, num_rows
        self._allocate()
        layers = range(len(model.layers))
        self.replays = [record(lambda rank=rank: self._before(rank)) for rank in layers]
        self.replays.append(record(self._end))

    def _allocate(self) -> None:
        """Buffers of the shapes that the layers give, found by one run of each kind's input product."""
        model = self._model
        hidden = model.embedding(self.token_ids)
        self.residual, self.hidden = torch.zeros_like(hidden), torch.zeros_like(hidden)
        for layer in model.layers:
            if layer.is_full not in self.projected:
                projected, _ = layer.project(hidden, None)
                self.projected[layer.is_full] = torch.zeros_like(projected)
                shape = (self._num_rows, *layer.mixer.mixed_shape)
                self.mixed[layer.is_full] = hidden.new_zeros(shape)

    def _before(self, rank: int) -> None:
        """Everything between the mixers of layers ``rank - 1`` and ``rank``."""
        layer = self._model.layers[rank]
        if rank == 0:
            projected, residual = layer.project(self._model.embedding(self.token_ids), None)
        else:
            projected, residual = layer.project(*self._finish(rank - 1))
        self.projected[layer.is_full].copy_(projected)
        self.residual.copy_(residual)

    def _end(self) -> None:
        hidden, residual = self._finish(len(self._model.layers) - 1)
        self.hidden.copy_(self._model.norm.add(hidden, residual)[0])

    def _finish(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._model.layers[rank]
        mixed, projected = self.mixed[layer.is_full], self.projected[layer.is_full]
        return layer.finish(mixed, projected, self.residual, self._num_rows)
