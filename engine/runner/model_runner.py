"""Model runner: computes the logits of a Batch, with the model, its pools and the tensors of each
step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.config import EngineConfig
from engine.interfaces import HostTier, TierCopierFactory
from engine.layers.inputs import (
    DecodePart,
    LayerInputs,
    PrefillPart,
    RotaryTable,
    VerifyPart,
    tokens_before,
)
from engine.layers.parameters import Build, WeightSpec
from engine.layers.rank import ALONE, Rank
from engine.models import read_model
from engine.plugins import engine_plugins
from engine.runner.backends import Kernels, identity_of
from engine.runner.device import Device
from engine.runner.graphs import (
    DecodeGraphs,
    PrefillGraphs,
    Record,
    VerifyGraphs,
    WarmUp,
    measure,
    verify_buckets,
    warm_up,
)
from engine.runner.memory import (
    STAGING_BYTES,
    Copies,
    Memory,
    MemoryPlan,
    RequestTable,
    RunningStates,
    state_slot_bytes,
)
from engine.schedule.batch import Batch, Newest, Segment, logit_rows, pieces
from engine.weights.loading import DTYPES, load_model, resolve_dtype
from engine.weights.model_config import ModelConfig, ModelError, read_config
from engine.weights.quantized_formats import read_quantization
from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.shares import share_of
from hybridcache.geometry.sizes import ModelSizes, SizesError
from hybridcache.geometry.units import GIB, counted
from hybridcache.tokens import Indices, Tokens
from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed
from kernels.recording import NotRecordableError
from kernels.recording import record as record_native
from kernels.upload import upload


class PendingHeadRows(Protocol):
    """Rows of a multi-token head that are not computed yet."""

    def admit(self, batch: Batch) -> None: ...
    def hold(self, batch: Batch) -> None: ...
    def count(self) -> None: ...
    def settle(self) -> None: ...


class ModelFollower(Protocol):
    """Multi-token head that follows every step of the model and drafts tokens; see
    ``Plugin.model_follower``."""

    pending: PendingHeadRows

    def record(self, record: Record) -> None: ...
    def follow(self, token_ids: torch.Tensor, hidden: torch.Tensor, step: LayerInputs) -> None: ...
    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Tokens]: ...


class ModelRunner:
    """Owns the weights and the pools, and computes one Batch after the other. Independent of cache
    and requests."""

    def __init__(self, config: EngineConfig, rank: Rank = ALONE) -> None:
        self.rank, self.device = rank, Device.resolve(config.device)
        if rank.count > 1:
            self.device = self.device.of_rank(rank.number)
            config = config if self.device.is_cpu else replace(config, graphs="off")
        self._config = config
        self.device.make_current()
        config = config.settled(on_cpu=self.device.is_cpu)
        self.kernels = Kernels.choose(self.device, config.kernels)
        if not self.device.supports(config.quantization):
            raise ModelError(
                f"{self.device.describe()} does not support fp8; use --quantization int8."
            )
        raw = read_config(config.model_dir)
        family, self.config = read_model(raw)
        self.sizes = shared_sizes(self.config, rank.count)
        """Sizes of the part that this rank computes and stores."""
        self.name = config.model_dir.name
        self.dtype = resolve_dtype(config.dtype, self.config, self.device)
        self.state_dtype = DTYPES[config.state_dtype]
        has_sums = self.sizes.state_size("recurrent") > 0
        self.checkpoints = CheckpointFormat.parse(config.checkpoint_dtype) if has_sums else None
        self.num_step_states = config.num_step_states
        self.most_step_tokens, self.max_running_rows = config.most_step_tokens, config.max_running
        self.model, self._head, self.weights_note = load_model(
            config.model_dir,
            family,
            self.config,
            Build(self.kernels, self._weight_spec(config, raw), rank),
            load_format=config.load_format,
            num_workers=config.load_workers or 1,
            seed=config.seed,
            with_head=config.drafts.head_len > 0,
        )
        if self._head is not None:
            sizes = replace(self.config.sizes, beside=self._head.keeps)
            self.config = replace(self.config, sizes=sizes)
            self.sizes = sizes
        followers = [plugin.model_follower() for plugin in engine_plugins(config)]
        self._follower = next((follower for follower in followers if follower is not None), None)
        self.num_guesses = config.drafts.head_len
        self.geometry = ModelGeometry.from_sizes(
            self.name,
            self.config.sizes,
            kv_dtype=str(self.dtype).removeprefix("torch."),
            conv_dtype=str(self.dtype).removeprefix("torch."),
            state_dtype=config.state_dtype,
            checkpoint_dtype=config.checkpoint_dtype,
        )
        state_bytes = state_slot_bytes(self.sizes, self.dtype, self.state_dtype)
        self.step_state_bytes = self.num_step_states * state_bytes
        """Bytes of the states after each verified token, outside the cache's memory."""
        most_staged = self.most_step_tokens // config.tile_size + self.max_running_rows
        self._num_staged = max(1, min(most_staged, STAGING_BYTES // max(state_bytes, 1)))
        num_own = 0 if self.checkpoints is None else self._num_staged + self.max_running_rows
        self.own_state_bytes = num_own * state_bytes
        """Bytes of running and exported states that are outside the cache's memory, with a
        checkpoint format."""
        warms_up = config.warm_up and not self.device.is_cpu
        reserved_bytes = (
            self._rehearse(config) if warms_up else self.step_state_bytes + self.own_state_bytes
        )
        plan = MemoryPlan.fit(
            self.sizes,
            self.dtype,
            self.device,
            kv_bytes=_bytes(config.kv_gib),
            state_bytes=_bytes(config.state_gib),
            cache_bytes=_bytes(config.cache_gib),
            page_size=config.page_size,
            state_dtype=self.state_dtype,
            reserved_bytes=reserved_bytes,
            checkpoints=self.checkpoints,
            num_ranks=rank.count,
        ).agreed(rank, self.device)
        self._allocate(plan, self._max_model_len(plan, config.max_model_len), config.graphs)
        self.warmed: WarmUp | None = self._warm_up() if warms_up else None
        """Result of the warm-up, or None if there was none (disabled, or on a CPU)."""

    def _weight_spec(self, config: EngineConfig, raw: Mapping[str, Any]) -> WeightSpec:
        """Return the format of the weights. Raises ModelError if the files are quantised in a way
        that is not supported."""
        place = self.device.torch_device, self.dtype, config.quantization
        if config.load_format == "dummy":
            return WeightSpec(*place)
        products = {
            (format, columns)
            for format, columns in self.kernels["linear"].PRODUCTS
            if self.device.supports(format)
        }
        files = read_quantization(raw, config.model_dir)
        return WeightSpec(*place, files, frozenset(products))

    def _warm_up(self) -> WarmUp:
        try:
            return warm_up(self)
        except torch.OutOfMemoryError:
            raise ModelError(
                "there is no memory left for graphs and the largest step: reduce --cache-gib, or "
                "use --graphs off."
            ) from None

    def _rehearse(self, config: EngineConfig) -> int:
        """Measure the bytes to keep free for tables, graphs and the largest step, by allocating the
        smallest pools."""
        longest = config.max_model_len or self.config.max_len
        free_bytes = self.device.unused_bytes()
        smallest = MemoryPlan.smallest(self.sizes, self.dtype, self.state_dtype, self.checkpoints)
        self._allocate(smallest, longest, config.graphs)
        num_bytes = max(0, free_bytes - self.device.unused_bytes()) + measure(self)
        del self.tensors, self.table, self._rotary, self.step_inputs
        del self._predictor, self.graphs, self.verify_graphs, self._copies, self.running
        return num_bytes

    def _allocate(self, plan: MemoryPlan, max_model_len: int, graphs: str) -> None:
        """Allocate the pools, and make the tables and graphs for them."""
        self.memory, self.max_model_len = plan, max_model_len
        keeps = [step.block.keeps for step in self.model.mixers]
        if self._head is not None:
            keeps.append(self._head.keeps)
        self.tensors = Memory.allocate(
            plan,
            keeps,
            self.dtype,
            self.state_dtype,
            self.device,
            num_step_states=self.num_step_states,
            num_scratch_rows=self.num_guesses * self.max_running_rows,
            checkpoints=self.checkpoints,
            num_own_states=self.max_running_rows,
            num_staged=self._num_staged,
        )
        self.running = RunningStates(self.tensors.step_slots)
        self._copies = Copies(self.tensors, self.kernels, self.device)
        self.table = RequestTable(
            self.max_running_rows, max_model_len, self.tensors.padding_row, self.device
        )
        rope, device = self.config.rope, self.device.torch_device
        self._rotary = RotaryTable(rope, max_model_len, device, self.dtype)
        self.step_inputs = StepInputs(
            self.tensors,
            self.table,
            self._rotary,
            self.running,
            multiple=self.kernels["linear"].ROWS,
            tile_size=self._config.tile_size,
        )
        parts = self.model, self.tensors, self.table, self._rotary
        self._predictor: ModelFollower | None = None
        if self._head is not None:
            assert self._follower is not None, "the multi-token head requires a plugin"
            self._predictor = self._follower(self._head, *parts)
        self.pool_specs = keeps
        """Declared tensors of each entry of ``tensors.pools``."""
        self.use_graphs(graphs)

    def flush_pending(self) -> None:
        """Complete pending writes and move displaced states to the slots of their requests, except
        for a step that is not committed yet."""
        if self._predictor is not None:
            self._predictor.pending.settle()
        self._copies.return_states(self.running)

    def watch_layers(self, on_mixed: Callable[[int], None]) -> None:
        """Call ``on_mixed`` in every step with prefills; see ``LayerInputs``."""
        self.step_inputs.on_mixed = on_mixed

    @property
    def is_asynchronous(self) -> bool:
        """True if ``forward`` returns before the device is done."""
        return not self.device.is_cpu

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def table_row(self, row: int, end: int) -> Indices:
        """Return the KV indices of the positions of ``row`` below ``end``: a view of the host's
        table."""
        return self.table.host[row, :end]

    def use_graphs(self, word: str, record: Record | None = None) -> None:
        """Select the steps to capture as graphs.

        ``decode`` captures steps of decodes, with or without drafts; ``all`` captures prefills too;
        ``auto`` captures everything that the device supports; ``off`` captures nothing. On a CPU,
        decode steps are recorded if all their kernels are native.

        ``record`` replaces the device's function. Raises ModelError for a device without graphs,
        and for reference kernels: they read lengths on the host, so a graph would repeat the
        captured lengths.
        """
        self.graphs: tuple[DecodeGraphs | None, PrefillGraphs | None] = None, None
        self.verify_graphs: VerifyGraphs | None = None
        if word == "off":
            return
        if record is None and self.device.is_cpu and word != "all" and self._record_decode():
            return
        if record is None:
            obstacle = self._graph_obstacle()
            if obstacle is not None:
                if word == "auto":
                    return
                raise ModelError(f"{obstacle}; use --graphs off.")
            record = self.device.recorder()
        decodes, self.verify_graphs = self._decode_graphs(record)
        prefills = None
        if word != "decode":
            prefills = PrefillGraphs(
                self.model, self.tensors, record, most_tokens=self.most_step_tokens
            )
        self.graphs = decodes, prefills

    def _decode_graphs(
        self, record: Record, *, is_native: bool = False
    ) -> tuple[DecodeGraphs, VerifyGraphs | None]:
        """Make the graphs of steps without drafts, and of steps with drafts."""
        parts = self.model, self._forward, self.tensors, self.table, self._rotary
        decodes = DecodeGraphs(*parts, record)
        buckets = verify_buckets(
            self.model,
            self.table,
            self.sizes,
            max_verified=self.num_step_states,
            is_native=is_native,
        )
        if not buckets:
            return decodes, None
        longest = min(1 + self._config.drafts.max_len, self.max_model_len)
        verifies = VerifyGraphs(
            *parts, self.running, record, buckets=buckets, longest=longest, is_native=is_native
        )
        return decodes, verifies

    @torch.inference_mode()
    def _record_decode(self) -> bool:
        """Record decode steps if all their kernels are native. Returns True if they are."""
        if self.kernels.words().get("linear") != "native":
            return False
        decodes, verify_graphs = self._decode_graphs(record_native, is_native=True)
        try:
            decodes.capture(decodes.buckets[-1])
            if verify_graphs is not None:
                verify_graphs.capture(verify_graphs.buckets[-1])
                self.verify_graphs = verify_graphs
            if self._predictor is not None:
                self._predictor.record(record_native)
        except NotRecordableError:
            return False
        self.graphs = decodes, None
        return True

    def _graph_obstacle(self) -> str | None:
        """Return the reason why graphs cannot be captured, or None if they can."""
        if self.device.traits.graph_class is None:
            return f"{self.device.describe()} has no graphs"
        others = [name for name, word in self.kernels.words().items() if word != "fused"]
        if others:
            return f"graphs require Triton kernels, which are not used for {', '.join(others)}"
        return None

    @torch.inference_mode()
    def forward(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits ``[rows, vocab]`` in the model's dtype, on the device.

        Rows are in segment order: 1 for "last", one per token for "all", none for "none". The
        batch's moves, row writes and restores are executed first. The states that it exports are in
        their slots afterwards. ``drawn`` are the tokens that the previous step drew, int64 on the
        device, for the batch's ``late_tokens``.
        """
        self.device.make_current()  # The calling thread may be a new one.
        self._place(batch)
        if self.checkpoints is None:
            return self._forward_piece(batch, drawn)
        parts = [self._forward_piece(one, drawn) for one in pieces(batch, self._num_staged)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _forward_piece(self, batch: Batch, drawn: torch.Tensor | None) -> torch.Tensor:
        if self._predictor is not None:
            self._predictor.pending.admit(batch)
        self._copies.move(batch.moves)
        self.table.write(batch.row_writes)
        self._copies.restore(batch.restores)
        logits = self._logits(batch, drawn)
        if self._predictor is not None:
            self._predictor.pending.count()
        saved = batch.saved_by_decodes
        if self.tensors.checkpoints is not None:
            exports = [slot for s in batch.segments if not s.is_decode for _, slot in s.exports]
            saved += zip(self.tensors.checkpoints.staging, exports, strict=False)
        self._copies.save(saved)
        return logits

    def _place(self, batch: Batch) -> None:
        """Assign slots to the states of a verification. States that ``batch`` moves, copies or does
        not verify are in the slots of their requests afterwards."""
        self.running.drop_verified()
        moves = batch.moves or batch.restores
        verified = [
            (segment.slot, len(segment.token_ids))
            for segment in batch.segments
            if segment.num_drafts and segment.slot is not None
        ]
        self._copies.return_states(self.running, () if moves else dict(verified))
        self.running.verify(verified)

    @torch.inference_mode()
    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """Keep the state of each segment with drafts after ``taken`` tokens, without copying it,
        and save the checkpoints up to there."""
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
        self._copies.save(saved)

    def _logits(self, batch: Batch, drawn: torch.Tensor | None) -> torch.Tensor:
        if not batch.segments:
            return self.model.embedding.weight.new_empty(0, self.vocab_size)

        def patch(token_ids: torch.Tensor) -> None:
            if batch.late_tokens and drawn is not None:
                places, rows = self._int64(np.array(batch.late_tokens, dtype=np.int64).T.copy())
                token_ids[places] = drawn[rows]

        if self._predictor is not None:
            self._predictor.pending.hold(batch)
        rows = logit_rows(batch.segments)
        decodes, prefills = self.graphs
        if all(segment.is_decode for segment in batch.segments):
            logits: torch.Tensor | None = None
            if any(segment.num_drafts for segment in batch.segments):
                if self.verify_graphs is not None and not batch.late_tokens:
                    logits = self.verify_graphs.run(batch.segments)
            elif decodes is not None:
                logits = decodes.run(batch.segments, patch)
            if logits is not None:
                return logits if len(rows) == len(logits) else logits[self._int64(rows)]
        token_ids, step = self.step_inputs.of(batch)
        patch(token_ids)
        hidden: torch.Tensor | None = None
        if prefills is not None:
            hidden = prefills.run(token_ids, step)
        if hidden is None:
            hidden = self._forward(token_ids, step)
        elif self._predictor is not None:
            self._predictor.follow(token_ids, hidden, step)
        return self.model.head(hidden[self._int64(rows)])

    def _forward(self, token_ids: torch.Tensor, step: LayerInputs) -> torch.Tensor:
        """Compute the hidden states of a step, and run the multi-token head on them."""
        mixers = self.tensors.pools[: len(self.model.mixers)]
        hidden = self.model.forward(token_ids, step, mixers)
        if self._predictor is not None:
            self._predictor.follow(token_ids, hidden, step)
        return hidden

    @torch.inference_mode()
    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Tokens]:
        """Draft tokens with the multi-token head; see ``Runner.guess``."""
        assert self._predictor is not None, "no multi-token head is loaded"
        self.device.make_current()
        at = [one._replace(slot=self.running.at(one.slot)) for one in newest]
        return self._predictor.guess(at, most)

    def attach_tiers(self, copier: TierCopierFactory, num_host_rows: int) -> HostTier:
        """See ``Runner.attach_tiers``."""
        tier = copier(self.tensors.rows, self.memory, self.device, num_host_rows)
        self._copies.copier = tier
        return tier

    def identity(self, weights_digest: str | None = None) -> Mapping[str, str]:
        """See ``Runner.identity``. O(bytes of the weights), unless their digest is given."""
        device = self.device.torch_device
        return identity_of(self._config, self.kernels, self.dtype, device, weights_digest)

    def _int64(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return upload(values, torch.int64, self.device.torch_device)

    def _max_model_len(self, plan: MemoryPlan, asked: int | None) -> int:
        longest = plan.max_request_len
        if asked is None:
            return min(self.config.max_len, longest)
        if asked > longest:
            need = (asked + plan.num_kv_tokens - longest) * plan.row_bytes / GIB
            what = "its KV and states" if plan.slab_rows else "KV"
            raise ModelError(
                f"one request of max_model_len {asked} needs {need:.3g} GiB for {what}; "
                f"there is room for {counted(longest, 'token')}."
            )
        return asked


def shared_sizes(config: ModelConfig, num_ranks: int) -> ModelSizes:
    """Return the sizes of one of ``num_ranks``. Raises ModelError if they cannot be divided
    evenly."""
    try:
        return share_of(config.sizes, num_ranks)
    except SizesError as error:
        raise ModelError(f"--tp {num_ranks} is not possible for this model: {error}.") from None


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)


class StepInputs:
    """Arranges the tokens of a batch, decodes first, padded to a multiple of ``multiple`` rows."""

    def __init__(
        self,
        tensors: Memory,
        table: RequestTable,
        rotary: RotaryTable,
        running: RunningStates,
        *,
        multiple: int,
        tile_size: int,
    ) -> None:
        self._tensors, self._table, self._rotary = tensors, table, rotary
        self._running, self._multiple = running, multiple
        self.tile_size = tile_size
        self._device = table.device.device
        self.on_mixed: Callable[[int], None] | None = None
        """Called in steps with prefills; see ``LayerInputs``."""

    def of(self, batch: Batch) -> tuple[torch.Tensor, LayerInputs]:
        """Return token ids ``[num_rows]`` and all other inputs of the layers."""
        segments = batch.segments
        num_tokens = batch.num_tokens
        num_rows = -(-num_tokens // self._multiple) * self._multiple
        decodes = [segment for segment in segments if segment.is_decode and not segment.num_drafts]
        verified = [segment for segment in segments if segment.num_drafts]
        prefills = list(segments[len(decodes) + len(verified) :])
        token_ids = np.zeros(num_rows, dtype=np.int64)
        positions = np.empty(num_tokens, dtype=np.int64)
        kv_indices = np.empty(num_tokens, dtype=np.int64)
        offset = 0
        for segment in segments:
            span = slice(offset, offset + len(segment.token_ids))
            token_ids[span] = segment.token_ids
            positions[span] = np.arange(segment.start, segment.end)
            kv_indices[span] = self._table.host[segment.row, segment.start : segment.end]
            offset = span.stop
        cos, sin = self._rotary(self._int64(positions))
        step = LayerInputs(
            num_tokens=num_tokens,
            num_decode=len(decodes),
            num_rows=num_rows,
            cos=cos,
            sin=sin,
            kv_indices=self._int64(kv_indices),
            table=self._table.device,
            decode=self._decode_part(decodes) if decodes else None,
            prefill=self._prefill_part(prefills) if prefills else None,
            num_verify=sum(len(segment.token_ids) for segment in verified),
            verify=self._verify_part(verified) if verified else None,
            on_mixed=self.on_mixed if prefills else None,
        )
        return self._int64(token_ids), step

    def _decode_part(self, segments: Sequence[Segment]) -> DecodePart:
        return DecodePart(sequences=self._sequences(segments), slots=self._slots(segments))

    def _verify_part(self, segments: Sequence[Segment]) -> VerifyPart:
        lengths = [len(segment.token_ids) for segment in segments]
        rows = [segment.row for segment in segments for _ in segment.token_ids]
        kv_lens = [end for s in segments for end in range(s.start + 1, s.end + 1)]
        steps = [slot for slots in self._running.step_slots for slot in slots]
        return VerifyPart(
            packed=Packed.from_lengths(lengths, self._device),
            sequences=self._sequences(segments),
            tokens=Sequences.of(rows, kv_lens, self._device),
            slots=self._slots(segments),
            step_slots=upload(steps, torch.int32, self._device),
            before=self._int64(tokens_before(lengths, sum(lengths))),
        )

    def _prefill_part(self, segments: Sequence[Segment]) -> PrefillPart:
        lengths = [len(segment.token_ids) for segment in segments]
        packed = Packed.from_lengths(lengths, self._device, self.tile_size)
        exports = [
            (rank, position - segment.start, slot)
            for rank, segment in enumerate(segments)
            for position, slot in segment.exports
        ]
        if self._tensors.checkpoints is not None:
            staging = self._tensors.checkpoints.staging
            exports = [(rank, at, staging[i]) for i, (rank, at, _) in enumerate(exports)]
        return PrefillPart(
            packed=packed,
            sequences=self._sequences(segments),
            slots=self._slots(segments),
            resumed=upload([segment.start > 0 for segment in segments], torch.bool, self._device),
            exports=Exports.plan(packed, exports),
        )

    def _sequences(self, segments: Sequence[Segment]) -> Sequences:
        return Sequences.of(
            [segment.row for segment in segments],
            [segment.end for segment in segments],
            self._device,
        )

    def _slots(self, segments: Sequence[Segment]) -> torch.Tensor:
        slots = [self._running.at(s.slot) for s in segments if s.slot is not None]
        return upload(slots, torch.int32, self._device)

    def _int64(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return upload(values, torch.int64, self._device)
