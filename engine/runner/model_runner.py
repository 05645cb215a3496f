"""Model runner: computes the logits of a Batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from engine.layers.rotary import RotaryTable
from engine.messages import Exactness
from engine.runner.backends import digest_of, digest_of_weights, machine_words
from engine.runner.loading import LoadedModel
from engine.runner.memory import Memory, MemoryPlan
from engine.runner.sampler import pick
from engine.runner.steps import (
    Copies,
    DecodeGraphs,
    Graphs,
    PrefillGraphs,
    Record,
    RequestTable,
    StepLayout,
    decode_buckets,
)
from engine.runner.verification import Verification
from engine.schedule.scheduler import Batch, logit_rows, pieces
from engine.weights.model_config import ModelError
from engine.weights.model_files import config_bytes
from hybridcache.allocators.moves import Indices, Move, Transfer
from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.geometry.units import counted, format_bytes, format_seconds
from kernels.recording import NotRecordableError
from kernels.recording import record as record_native
from kernels.upload import upload


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
        self.memory, self.max_model_len = plan, max_model_len
        self.is_asynchronous = not self.device.is_cpu
        """True if ``forward`` returns before the device is done."""
        self.tensors = Memory.allocate(
            plan,
            self.model.keeps,
            self.dtype,
            loaded.state_dtype,
            self.device,
            num_step_states=config.num_step_states,
            num_scratch_rows=config.drafts.head_len * config.max_running,
            checkpoints=loaded.checkpoints,
            num_own_states=config.max_running,
            num_staged=loaded.num_staged,
        )
        self._cache_write = self.kernels["cache_write"]
        self._state_copy = self.kernels["state_copy"]
        self._transfer: Callable[[Transfer], None] | None = None
        """Executes a transfer between tiers; None if there is only the device."""
        padding = self.tensors.padding_row
        self.table = RequestTable(config.max_running, max_model_len, padding, self.device)
        rotary = RotaryTable(self.config.rope, max_model_len, self.device.torch_device, self.dtype)
        multiple: int = self.kernels["linear"].ROWS
        self.step_inputs = StepLayout(self.tensors, self.table, rotary, multiple, config.tile_size)
        has_drafts = config.drafts.max_len > 0
        self.drafts = Verification(loaded, self.step_inputs) if has_drafts else None
        """Part of the steps with drafts, or None if the settings have none."""
        self.warmed: WarmUp | None = None
        self.exactness = Exactness()
        self.use_graphs(config.graphs)

    def settle(self) -> None:
        """Copy every state to its sequence's slot, except for a step that is not committed yet."""
        self.device.make_current()  # The calling thread may be a new one, as in ``forward``.
        if self.drafts is not None:
            self._copy_states(self.drafts.running.settle())

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
        self._stop_graphs()
        if word == "off":
            return
        words = self.kernels.words()
        if record is None and word != "all" and words.get("linear") == "native":
            with suppress(NotRecordableError), torch.inference_mode():
                graphs = self._decode_graphs(record_native, is_native=True)
                for kind in (graphs.decodes, graphs.verifies, graphs.guesses):
                    if kind is not None:
                        kind.capture(kind.buckets[-1])
                self.graphs = graphs
                return
            self._stop_graphs()
        if record is None:
            others = ", ".join(name for name, used in words.items() if used != "fused")
            if self.device.is_cpu or others:
                if word == "auto":
                    return
                raise ModelError(
                    f"graphs={word} needs a GPU and Triton kernels ({self.device.describe()}; "
                    f"other kernels: {others or 'none'}): use --graphs off."
                )
            record = self.device.recorder()
        self.graphs = self._decode_graphs(record)
        if word != "decode":
            parts = self.model, self.tensors, record
            most_tokens = self.loaded.settings.most_step_tokens
            prefills = PrefillGraphs(*parts, most_tokens=most_tokens)
            self.graphs = self.graphs._replace(prefills=prefills)

    def _stop_graphs(self) -> None:
        self.graphs = Graphs()
        if self.drafts is not None and self.drafts.predictor is not None:
            self.drafts.predictor.compute_directly()

    def _decode_graphs(self, record: Record, *, is_native: bool = False) -> Graphs:
        buckets = decode_buckets(self.table)
        decodes = DecodeGraphs(self.model, self.step_inputs, record, buckets)
        if self.drafts is None:
            return Graphs(decodes)
        verifies = self.drafts.graphs(record, is_native=is_native)
        return Graphs(decodes, verifies, guesses=self.drafts.predictor)

    @torch.inference_mode()
    def forward(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits ``[rows, vocab]`` in the model's dtype, on the device.

        Rows are those of ``num_logits`` of each segment. ``drawn`` are the tokens that the previous
        step drew, int64 on the device, for the batch's ``late_tokens``.
        """
        self.device.make_current()  # The calling thread may be a new one.
        if self.drafts is not None:
            self._copy_states(self.drafts.place(batch))
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
            if batch.restores:
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
        if saved:
            self._save(saved)
        return logits

    @torch.inference_mode()
    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """Keep the states and checkpoints of segments with drafts after ``taken`` tokens."""
        if self.drafts is not None:
            self._save(self.drafts.commit(batch, taken))

    def _save(self, copies: Copies) -> None:
        """Copy states to checkpoints: (slot of a state, checkpoint slot)."""
        if self.tensors.checkpoints is None:
            self._copy_states(copies)
        else:
            self.tensors.checkpoints.save(copies, self._state_copy)

    def _copy_states(self, copies: Copies) -> None:
        if not copies or not self.tensors.states:
            return
        pairs = np.array(copies, dtype=np.int32).T.copy()
        sources, targets = upload(pairs, torch.int32, self.device.torch_device)
        self._state_copy.copy_states(self.tensors.states, sources, targets)

    def _logits(self, batch: Batch, drawn: torch.Tensor | None) -> torch.Tensor:
        if not batch.segments:
            return self.model.new_empty(0, self.vocab_size)

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
                return pick(logits, rows)
        drafted = [segment for segment in batch.segments if segment.num_drafts]
        verified = self.drafts.part(drafted) if self.drafts is not None and drafted else None
        token_ids, step = self.step_inputs.of(batch, verified)
        patch(token_ids)
        hidden: torch.Tensor | None = None
        if self.graphs.prefills is not None:
            hidden = self.graphs.prefills.run(token_ids, step)
        if hidden is None:
            hidden = self.model.forward(token_ids, step, self.tensors.pools)
        return self.model.head(pick(hidden, rows))

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
        layout = self.memory.row_bytes, self.memory.state_bytes, self.model.keeps
        return {
            "weights": weights,
            "config": digest_of(config_bytes(config.model_dir)),
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
