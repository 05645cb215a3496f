"""Model runner: computes the logits of a Batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from engine.layers.blocks import LayerInputs, pad_rows, padded_count
from engine.layers.prediction import PredictionHead
from engine.layers.rotary import RotaryTable
from engine.messages import Exactness
from engine.models.decoder import Decoder
from engine.runner.backends import digest_of, digest_of_weights, machine_words
from engine.runner.loading import LoadedModel
from engine.runner.memory import Memory, MemoryPlan
from engine.runner.steps import (
    Bucket,
    DecodeGraphs,
    Graphs,
    PrefillGraphs,
    Record,
    Replay,
    RequestTable,
    RunningStates,
    StepInputs,
    VerifyGraphs,
    decode_buckets,
    verify_buckets,
)
from engine.schedule.scheduler import Batch, Newest, logit_rows, pieces
from engine.weights.model_config import ModelError
from hybridcache.allocators.moves import Move, Transfer
from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.geometry.units import counted, format_bytes, format_seconds
from hybridcache.tokens import Indices, Tokens
from kernels.attention.sequences import Sequences
from kernels.recording import NotRecordableError
from kernels.recording import record as record_native
from kernels.upload import upload

ALIGNED_COLUMNS = 16
"""Triton compiles a kernel for strides that are a multiple of this number, and for others."""


class Predictor:
    """A multi-token head, the pools of its state, and separate rows for drafts."""

    def __init__(self, head: PredictionHead, model: Decoder, inputs: StepInputs) -> None:
        """The last pools of the memory are the head's; the rows after its padding row are for
        drafts."""
        memory, self.table, self.rotary = inputs.memory, inputs.table, inputs.rotary
        self.model, self.head, self.pools = model, head, memory.pools[-1]
        self.first_row = memory.padding_row + 1
        self._row_multiple: int = model.build.kernels["linear"].ROWS
        self._replays: dict[int, Replay] = {}
        """Recorded passes by number of requests."""

    def record(self, record: Record) -> None:
        """Record the passes of a CPU: without Python between native calls, those of a small model
        take a third of the time. Raises NotRecordableError; passes are then computed directly."""
        most, length = self.table.padding_row, self.table.host.shape[1]
        columns = torch.ones(3, most, dtype=torch.int64)
        columns[2] = self.first_row
        rows = torch.full((most, length), self.first_row, dtype=torch.int32)
        before = self.pools[-1].new_zeros(most, self.pools[-1].shape[1])
        self._kept = columns[0], before, columns[1], columns[2], rows
        self._lengths = torch.ones(most, dtype=torch.int32)
        self._ranks = torch.arange(most, dtype=torch.int32)
        self._record = record
        self._replay(self._kept, 1)

    def follow(self, token_ids: torch.Tensor, hidden: torch.Tensor, step: LayerInputs) -> None:
        """Write the head's rows of a step with the result ``hidden``."""
        hidden = hidden[: len(token_ids)]
        self.head.follow(self.model.embedding(token_ids), hidden, step, self.pools)

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> list[Tokens]:
        """Draft the ``most`` (1 or more) most likely tokens after each request's newest one, with
        one pass of the head per token over all requests that still need one."""
        order = sorted(range(len(newest)), key=lambda rank: -most[rank])
        requests, wanted = [newest[rank] for rank in order], [most[rank] for rank in order]
        device = self.table.device.device
        tokens = upload([request.token_id for request in requests], torch.int64, device)
        slots = upload([request.slot for request in requests], torch.int64, device)
        before, rows = self.pools[-1][slots], self._rows(requests, wanted[0])
        guessed = []
        for step in range(wanted[0]):
            count = sum(length > step for length in wanted)
            lengths = [request.position + step for request in requests[:count]]
            at = upload(lengths, torch.int64, device)
            kv_indices = rows[:count].gather(1, at[:, None] - 1)[:, 0].long()
            inputs = tokens[:count], before[:count], at, kv_indices, rows[:count]
            if self._replays:
                tokens, before = self._replay(inputs, count)
            else:
                tokens, before = self._pass(inputs, Sequences.of(range(count), lengths, device))
            guessed.append(tokens.clone())
        drafts = torch.nn.utils.rnn.pad_sequence(guessed).int().cpu().numpy()
        found = dict(zip(order, drafts, strict=True))
        return [found[rank][:length] for rank, length in enumerate(most)]

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
        self, inputs: Sequence[torch.Tensor], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute ``_pass`` by a recording, which reads lengths from memory."""
        kept = [tensor[:count] for tensor in self._kept]
        for own, given in zip(kept[:-1], inputs, strict=False):
            own.copy_(given[:count])
        kept[-1][:, : inputs[-1].shape[1]].copy_(inputs[-1][:count])
        lengths = self._lengths[:count].copy_(kept[2])
        if count in self._replays:
            self._replays[count]()
            return kept[0], kept[1]
        ranks = self._ranks[:count]  # Kept here, because a recording uses its address.
        sequences = Sequences(tuple(range(count)), (1,) * count, ranks, lengths)

        def work() -> None:
            for own, result in zip(kept, self._pass(kept, sequences), strict=False):
                own.copy_(result)

        self._replays[count] = self._record(work)
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


class WarmUp(NamedTuple):
    """Results and costs of a warm-up."""

    num_graphs: int
    num_steps: int
    num_bytes: int
    """Device memory that stays allocated."""
    seconds: float

    def describe(self) -> str:
        """Return the line for the start screen."""
        graphs, steps = counted(self.num_graphs, "graph"), counted(self.num_steps, "step")
        size = format_bytes(self.num_bytes)
        return f"{graphs} and {steps} in {format_seconds(self.seconds)}, {size}"


class ModelRunner:
    """Owns the memory of a loaded model, and computes one Batch after the other."""

    def __init__(self, loaded: LoadedModel, plan: MemoryPlan, max_model_len: int) -> None:
        config, self.loaded = loaded.settings, loaded
        self.device, self.kernels, self.model = loaded.device, loaded.kernels, loaded.model
        self.config, self.geometry, self.dtype = loaded.config, loaded.geometry, loaded.dtype
        self.vocab_size = self.config.vocab_size
        self.step_state_bytes = loaded.step_state_bytes
        self.num_step_states, self.num_guesses = config.num_step_states, config.drafts.head_len
        self.most_step_tokens, self.max_running_rows = config.most_step_tokens, config.max_running
        self.memory, self.max_model_len = plan, max_model_len
        self.is_asynchronous = not self.device.is_cpu
        """True if ``forward`` returns before the device is done."""
        self._keeps = [step.block.keeps for step in self.model.mixers]
        """Declared tensors of each entry of ``tensors.pools``."""
        if loaded.head is not None:
            self._keeps.append(loaded.head.keeps)
        self.tensors = Memory.allocate(
            plan,
            self._keeps,
            self.dtype,
            loaded.state_dtype,
            self.device,
            num_step_states=self.num_step_states,
            num_scratch_rows=self.num_guesses * self.max_running_rows,
            checkpoints=loaded.checkpoints,
            num_own_states=self.max_running_rows,
            num_staged=loaded.num_staged,
        )
        self.running = RunningStates(self.tensors.step_slots)
        self._cache_write = self.kernels["cache_write"]
        self._state_copy = self.kernels["state_copy"]
        self._transfer: Callable[[Transfer], None] | None = None
        """Executes a transfer between tiers; None if there is only the device."""
        self.table = RequestTable(
            self.max_running_rows, max_model_len, self.tensors.padding_row, self.device
        )
        rotary = RotaryTable(self.config.rope, max_model_len, self.device.torch_device, self.dtype)
        multiple: int = self.kernels["linear"].ROWS
        self.step_inputs = StepInputs(
            self.tensors, self.table, rotary, self.running, multiple, config.tile_size
        )
        self._predictor: Predictor | None = None
        if loaded.head is not None:
            self._predictor = Predictor(loaded.head, self.model, self.step_inputs)
        model, pools, predictor = self.model, self.tensors.pools, self._predictor

        def forward(token_ids: torch.Tensor, step: LayerInputs) -> torch.Tensor:
            hidden = model.forward(token_ids, step, pools)
            if predictor is not None:
                predictor.follow(token_ids, hidden, step)
            return hidden

        self._forward = forward
        """Computes hidden states. Graphs keep it, so it must not keep the runner and its memory."""
        self.warmed: WarmUp | None = None
        self.exactness = Exactness()
        self.use_graphs(config.graphs)

    def return_states(self, but: Collection[int] = ()) -> None:
        """Copy displaced states back to their requests' slots, except to the slots ``but`` and
        those of a step that is not committed yet."""
        self.device.make_current()  # The calling thread may be a new one, as in ``forward``.
        self._copy_states(self.running.take_displaced(but))

    def table_row(self, row: int, end: int) -> Indices:
        """Return the KV indices of the positions of ``row`` below ``end``, on the host."""
        return self.table.host[row, :end]

    def use_graphs(self, word: str, record: Record | None = None) -> None:
        """Select the steps to capture as graphs.

        ``decode`` captures steps of decodes, with or without drafts; ``all`` captures prefills too;
        ``auto`` captures everything that the device supports; ``off`` captures nothing. On a CPU,
        decode steps are recorded if all their kernels are native. ``record`` replaces the device's
        function. Raises ModelError for a device without graphs, and for reference kernels, which
        read lengths on the host.
        """
        self.graphs = Graphs()
        if word == "off":
            return
        words = self.kernels.words()
        if record is None and word != "all" and words.get("linear") == "native":
            with suppress(NotRecordableError), torch.inference_mode():
                graphs = self._decode_graphs(record_native, is_native=True)
                for kind in (graphs.decodes, graphs.verifies):
                    if kind is not None:
                        kind.capture(kind.buckets[-1])
                if self._predictor is not None:
                    self._predictor.record(record_native)
                self.graphs = graphs
                return
        if record is None:
            others = ", ".join(name for name, used in words.items() if used != "fused")
            if (self.device.is_cpu or others) and word == "auto":
                return
            if self.device.is_cpu:
                raise ModelError(f"{self.device.describe()} has no graphs; use --graphs off.")
            if others:
                raise ModelError(
                    f"graphs require Triton kernels, which are not used for {others}; use --graphs "
                    "off."
                )
            record = self.device.recorder()
        self.graphs = self._decode_graphs(record)
        if word != "decode":
            parts = self.model, self.tensors, record
            prefills = PrefillGraphs(*parts, most_tokens=self.most_step_tokens)
            self.graphs = self.graphs._replace(prefills=prefills)

    def _decode_graphs(self, record: Record, *, is_native: bool = False) -> Graphs:
        parts = self.model, self._forward, self.step_inputs, record
        buckets, most = list[Bucket](), self.num_step_states
        if most:
            buckets = verify_buckets(
                self.model, self.table, self.loaded.sizes, max_verified=most, is_native=is_native
            )
        longest = min(1 + self.loaded.settings.drafts.max_len, self.max_model_len)
        verifies = VerifyGraphs(*parts, buckets, longest) if buckets else None
        return Graphs(DecodeGraphs(*parts, decode_buckets(self.table)), verifies)

    @torch.inference_mode()
    def forward(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits ``[rows, vocab]`` in the model's dtype, on the device.

        Rows are in segment order: 1 for "last", one per token for "all", none for "none".
        ``drawn`` are the tokens that the previous step drew, int64 on the device, for the batch's
        ``late_tokens``.
        """
        self.device.make_current()  # The calling thread may be a new one.
        if self.num_step_states:
            self._place(batch)
        saved = self.tensors.checkpoints
        if saved is None:
            return self._forward_piece(batch, drawn)
        parts = pieces(batch, len(saved.staging))
        return torch.cat([self._forward_piece(part, drawn) for part in parts])

    def _forward_piece(self, batch: Batch, drawn: torch.Tensor | None) -> torch.Tensor:
        # One after the other, because a move may read rows that another wrote.
        for transfer in batch.moves:
            if isinstance(transfer, Move):
                pairs = np.stack([transfer.src, transfer.dst])
                sources, targets = upload(pairs, torch.int32, self.device.torch_device)
                self._cache_write.move_rows(self.tensors.rows, sources, targets)
            else:
                assert self._transfer is not None, "there is no tier outside the device"
                self._transfer(transfer)
        self.table.write(batch.row_writes)
        if self.tensors.checkpoints is None:
            self._copy_states(batch.restores)
        else:
            self.tensors.checkpoints.restore(batch.restores, self._state_copy)
        logits = self._logits(batch, drawn)
        saved = [
            (segment.slot, slot)
            for segment in batch.segments
            if segment.is_decode and not segment.num_drafts and segment.slot is not None
            for position, slot in segment.exports
            if position == segment.end
        ]
        if self.tensors.checkpoints is not None:
            exports = [slot for s in batch.segments if not s.is_decode for _, slot in s.exports]
            saved += zip(self.tensors.checkpoints.staging, exports, strict=False)
        self._save(saved)
        return logits

    def _save(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy states to checkpoints: (slot of a state, checkpoint slot)."""
        if self.tensors.checkpoints is None:
            self._copy_states(copies)
        else:
            self.tensors.checkpoints.save(copies, self._state_copy)

    def _copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies or not self.tensors.states:
            return
        pairs = np.array(copies, dtype=np.int32).T.copy()
        sources, targets = upload(pairs, torch.int32, self.device.torch_device)
        self._state_copy.copy_states(self.tensors.states, sources, targets)

    def _place(self, batch: Batch) -> None:
        """Assign slots to the states of a verification, and return other states to theirs."""
        self.running.drop_verified()
        moves = batch.moves or batch.restores
        verified = [
            (segment.slot, len(segment.token_ids))
            for segment in batch.segments
            if segment.num_drafts and segment.slot is not None
        ]
        self.return_states(() if moves else dict(verified))
        self.running.verify(verified)

    @torch.inference_mode()
    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """Keep the states and checkpoints of segments with drafts after ``taken`` tokens."""
        if not self.tensors.states:
            return
        saved: list[tuple[int, int]] = []
        verified = [segment for segment in batch.segments if segment.num_drafts]
        for segment, count, slots in zip(verified, taken, self.running.step_slots, strict=True):
            saved += [
                (slots[position - segment.start - 1], slot)
                for position, slot in segment.exports
                if segment.start < position <= segment.start + count
            ]
        self.running.take(taken)
        self._save(saved)

    def _logits(self, batch: Batch, drawn: torch.Tensor | None) -> torch.Tensor:
        if not batch.segments:
            return self.model.embedding.weight.new_empty(0, self.vocab_size)

        def patch(token_ids: torch.Tensor) -> None:
            if batch.late_tokens and drawn is not None:
                pairs = np.array(batch.late_tokens, dtype=np.int64).T.copy()
                places, sources = upload(pairs, torch.int64, device)
                token_ids[places] = drawn[sources]

        device = self.device.torch_device
        rows = logit_rows(batch.segments)
        last = batch.segments[-1]  # After segments without drafts, and decodes.
        graphs = self.graphs.verifies if last.num_drafts else self.graphs.decodes
        if last.is_decode and graphs is not None:
            logits = graphs.run(batch.segments, patch)
            if logits is not None:
                if len(rows) == len(logits):
                    return logits
                return logits[upload(rows, torch.int64, device)]
        token_ids, step = self.step_inputs.of(batch)
        patch(token_ids)
        hidden: torch.Tensor | None = None
        if self.graphs.prefills is not None:
            hidden = self.graphs.prefills.run(token_ids, step)
        if hidden is None:
            hidden = self._forward(token_ids, step)
        elif self._predictor is not None:
            self._predictor.follow(token_ids, hidden, step)
        return self.model.head(hidden[upload(rows, torch.int64, device)])

    @torch.inference_mode()
    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Tokens]:
        """Draft at most ``most`` tokens (1 or more) after each newest token with the multi-token
        head. Called between the ``commit`` of a batch and the next ``forward``."""
        assert self._predictor is not None, "no multi-token head is loaded"
        self.device.make_current()
        at = [one._replace(slot=self.running.at(one.slot)) for one in newest]
        return self._predictor.guess(at, most)

    def attach_tiers(self, copier: Callable[..., Any], num_host_rows: int) -> float | None:
        """Execute transfers between tiers with the result of ``copier``. Returns the measured
        bandwidth from host memory to the device, or None if there is no host tier."""
        made = copier(self.tensors.rows, self.memory, self.device, num_host_rows)
        self._transfer = made.make
        return cast("float | None", made.host_bytes_per_s)

    def identity(self, weights_digest: str | None = None) -> Mapping[str, str]:
        """Describe everything that the bits of KV and states depend on, and their layout. O(bytes
        of the weights), unless their saved digest is given."""
        config = self.loaded.settings
        weights = f"dummy, seed {config.seed}"
        if config.load_format != "dummy":
            weights = weights_digest or digest_of_weights(config.model_dir)
        checkpoints = CheckpointFormat.parse(config.checkpoint_dtype)
        kernels = sorted(self.kernels.words().items())
        quantization = config.quantization or "none"
        layout = self.memory.row_bytes, self.memory.state_bytes, self._keeps
        return {
            "weights": weights,
            "config": digest_of((config.model_dir / "config.json").read_bytes()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "state dtype": config.state_dtype,
            "checkpoint dtype": "auto" if checkpoints is None else checkpoints.spec,
            "quantization": quantization + ", fp8 activations" * config.fp8_activations,
            "multi-token head": str(config.drafts.head_len > 0),
            "layout of memory": digest_of(str(layout).encode()),
            "page size": str(config.page_size),
            "checkpoint grid": str(config.grid),
            "exact": str(config.exact),
            "kernels": ",".join(f"{name}={word}" for name, word in kernels),
            **machine_words(self.device.torch_device),
            "computed bits": self.exactness.digest,
        }
