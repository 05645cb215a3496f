"""SGLang's own scheduler on a CPU, over a model that only stores hashes of its inputs.

``HashModel`` replaces the model worker. A KV row holds the hash of the prefix that ends with its
token, and a state slot the hash of all its tokens. Each forward pass can thus detect a wrong row, a
stale state, or a state of another length. The next token is a function of that hash.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from zlib import crc32

import numpy as np
import torch
from sglang.srt.arg_groups import mamba_hook, speculative_hook
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers import overlap_utils
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.registry import registered_radix_cache_backends
from sglang.srt.model_executor.model_runner_components.ngram_embedding_manager import (
    NgramEmbeddingManager,
)
from sglang.srt.runtime_context import SpawnRanks, get_context, get_parallel, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.spec_utils import (
    commit_mamba_states_after_verify,
    prepare_mamba_track_for_verify,
)

from hybridcache.sglang import NAME, plug_in, translation
from tests.sglang.pools import CHUNK, World, new_pools
from tests.sglang.waits import Streams, Waits

VOCAB = 64
ROOMS: dict[int, tuple[CPUScheduler, Req]] = {}
"""Submitted requests, by the number of their transfer between nodes."""
CONFIG = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "full_attention_interval": 4,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1023,
}
_POWERS = np.cumprod(np.full(8192, 6364136223846793005, np.uint64)).view(np.int64)


def hashes(req: Req, tokens: Iterable[int]) -> np.ndarray:
    """Return the hash of every prefix of ``tokens`` that ends with each token: int64[n]. It depends
    on the request's adapter and salt."""
    ids = np.fromiter(tokens, np.int64) + 1
    return np.cumsum(ids * _POWERS[: len(ids)]) + crc32(
        repr((req.extra_key, req.cache_salt)).encode()
    )


class HashModel:
    """Model worker and model runner with the interface of SGLang's scheduler."""

    is_hybrid_swa = False
    sliding_window_size = None
    weight_load_time = 0.0
    graph_time_usage = graph_memory_usage = None

    def __init__(self, world: World, model_config: Any, max_requests: int) -> None:
        self.world = world
        self.model_config = model_config
        self.max_requests = max_requests
        keys = world.rows.get_kvcache().full_kv_pool.k_buffer[0]
        self.rows = keys.flatten(1).view(torch.int64)[:, 0].numpy()
        states = world.requests.mamba_pool.mamba_cache.temporal[0]
        self.states = states.flatten(1).view(torch.int64)[:, 0]
        self.answer: np.ndarray | None = None
        """Answer of the only running request, or None for the hash model's own."""
        self.resumed_tokens = 0
        """Tokens from the cache, each compared with its expected hash. Those of a request's own
        chunks, and of requests that were retracted, are compared but not counted."""
        self.model_runner = SimpleNamespace(
            model_config=model_config,
            token_to_kv_pool=world.rows.get_kvcache(),
            token_to_kv_pool_allocator=world.rows,
            effective_logical_max_total_num_tokens=world.rows.size,
            kv_cache_dtype_str="bfloat16",
            req_to_token_pool=world.requests,
            mtp_draft_device_pools=(),
            mtp_draft_mamba_pools=(),
            spec_algorithm=SimpleNamespace(is_dspark=lambda: False, is_none=lambda: True),
            canary_manager=None,
            ngram_embedding_manager=NgramEmbeddingManager(enabled=False, table=None, n=0),
            attn_backend=SimpleNamespace(needs_cpu_seq_lens=True),
            forward_stream=torch.cpu.Stream(),
            device="cpu",
            weight_load_mem_usage=0.0,
            prefill_aware_swa=False,
            device_timer=None,
            eplb_manager=None,
            lora_manager=None,
            hisparse_coordinator=None,
            memory_pool_config=None,
            model=None,
        )

    def get_memory_pool(self) -> tuple[Any, Any]:
        return self.world.requests, self.world.rows

    def get_pad_input_ids_func(self) -> None:
        return None

    def forward_batch_generation(self, batch: Any, **_: Any) -> GenerationBatchResult:
        self._copy_and_clear(batch)
        pool = self.world.requests
        slots = pool.get_mamba_indices(batch.req_pool_indices).to(torch.int64)
        work = self._extend if batch.forward_mode.is_extend() else self._decode
        after = work(batch, slots)
        tokens = torch.from_numpy(np.abs(after) % VOCAB)
        if self.answer is not None:
            [req] = batch.reqs
            tokens = torch.tensor([int(self.answer[len(req.output_ids)])])
        return GenerationBatchResult(
            logits_output=LogitsProcessorOutput(next_token_logits=None),
            next_token_ids=tokens,
            can_run_cuda_graph=False,
        )

    def _copy_and_clear(self, batch: Any) -> None:
        """Copy and clear states, as the model runner does before a forward pass."""
        pool = self.world.requests.mamba_pool
        if batch.mamba_clear_indices is not None:
            pool.clear_slots(batch.mamba_clear_indices)
        if batch.mamba_cow_src_indices is not None:
            pool.copy_from(batch.mamba_cow_src_indices, batch.mamba_cow_dst_indices)
        batch.mamba_clear_indices = None
        batch.mamba_cow_src_indices = batch.mamba_cow_dst_indices = None

    def _extend(self, batch: Any, slots: torch.Tensor) -> np.ndarray:
        after = np.zeros(len(batch.reqs), np.int64)
        for index, req in enumerate(batch.reqs):
            start, end = batch.prefix_lens[index], req.extend_end
            chain = hashes(req, req.full_untruncated_fill_ids[:end])
            rows = self.world.requests.req_to_token[req.kv.req_pool_idx, :end].numpy()
            assert np.array_equal(self.rows[rows[:start]], chain[:start]), f"{req.rid}: wrong rows"
            state, expected = int(self.states[slots[index]]), chain[start - 1] if start else 0
            assert state == expected, f"{req.rid}: wrong state at {start}"
            if req.extend_batch_idx == 1 and not req.retracted_stain:
                self.resumed_tokens += start
            self.rows[rows[start:]] = chain[start:]
            self.states[slots[index]] = int(chain[-1])
            if batch.mamba_track_mask is not None and batch.mamba_track_mask[index]:
                covered = int(batch.mamba_track_seqlens[index]) - start
                at = start + covered // CHUNK * CHUNK
                self.states[batch.mamba_track_indices[index]] = int(chain[at - 1])
            after[index] = chain[-1]
        return after

    def _decode(self, batch: Any, slots: torch.Tensor) -> np.ndarray:
        positions = batch.seq_lens.numpy() - 1
        before = self.states[slots].numpy()
        after = before + (batch.input_ids.numpy() + 1) * _POWERS[positions]
        self.states[slots] = torch.from_numpy(after)
        self.rows[batch.out_cache_loc.numpy()] = after
        if batch.mamba_track_mask is not None:
            mask = batch.mamba_track_mask
            self.states[batch.mamba_track_indices[mask]] = torch.from_numpy(after)[mask]
        return after


class HashDrafter(BaseSpecWorker):
    """Draft worker of multi-token prediction, nearly half of whose drafts are rejected.

    The drafts are chains of the hash model's own answers. A pass verifies them as SGLang's worker
    does: it writes the KV rows of all drafts, also of rejected ones, and SGLang's own functions
    select the accepted state and the tracked one.
    """

    target_worker = draft_worker = None

    def __init__(self, model: HashModel, num_draft_tokens: int) -> None:
        super().__init__()
        self.target_worker = model
        self.num_draft_tokens = num_draft_tokens
        self.num_accepted = self.num_rejected = 0
        model.model_runner.req_to_token_pool = model.world.requests
        model.model_runner.attn_backend.update_mamba_state_after_mtp_verify = self._commit

    def forward_batch_generation(
        self, batch: Any, on_publish: Callable[[torch.Tensor], None] | None = None, **_: Any
    ) -> GenerationBatchResult:
        if batch.forward_mode.is_extend():
            result = self.target_worker.forward_batch_generation(batch)
            result.new_seq_lens, bonus = batch.seq_lens, result.next_token_ids
        else:
            result, bonus = self._verify(batch)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        unused = torch.zeros(len(bonus), 1)
        result.next_draft_input = EagleDraftInput(
            bonus_tokens=bonus,
            topk_p=unused,
            topk_index=unused.to(torch.int64),
            hidden_states=unused,
        )
        return result

    def _verify(self, batch: Any) -> tuple[GenerationBatchResult, torch.Tensor]:
        model, width = self.target_worker, self.num_draft_tokens
        pool, indices = model.world.requests, batch.req_pool_indices
        prepare_mamba_track_for_verify(batch)
        self._slots = pool.get_mamba_indices(indices).to(torch.int64)
        places = batch.seq_lens.numpy()[:, None] + np.arange(width)
        chains = np.empty(places.shape, np.int64)
        last, drafts = model.states[self._slots].numpy(), batch.spec_info.bonus_tokens.numpy()
        accepted = np.ones(len(last), np.int64)
        is_right = np.ones(len(last), bool)
        for step in range(width):
            last = last + (drafts.astype(np.int64) + 1) * _POWERS[places[:, step]]
            chains[:, step] = last
            is_right &= (last >> 20) % 3 > 0
            accepted += is_right & (step + 1 < width)
            drafts = (np.abs(last) + ~is_right) % VOCAB
        rows = pool.req_to_token[indices[:, None], torch.from_numpy(places)].numpy()
        model.rows[rows] = chains
        self._chains = torch.from_numpy(chains)
        self.num_accepted += int(accepted.sum()) - len(last)
        self.num_rejected += len(last) * width - int(accepted.sum())
        lens = torch.from_numpy(accepted)
        index = torch.arange(chains.size).reshape(chains.shape)
        kept = torch.where(torch.arange(width) < lens[:, None], index, -1)
        commit_mamba_states_after_verify(model, batch, lens, kept, width)
        answers = torch.from_numpy(np.abs(chains) % VOCAB)
        result = GenerationBatchResult(
            logits_output=LogitsProcessorOutput(next_token_logits=None),
            next_token_ids=answers.flatten(),
            can_run_cuda_graph=False,
            speculative_num_draft_tokens=width,
            accept_lens=lens,
            new_seq_lens=batch.seq_lens + lens,
        )
        return result, answers.gather(1, lens[:, None] - 1)[:, 0]

    def _commit(
        self,
        *,
        last_correct_step_indices: torch.Tensor,
        mamba_track_indices: torch.Tensor | None,
        mamba_steps_to_track: torch.Tensor | None,
        **_: Any,
    ) -> None:
        """Store the states after the accepted drafts, and after the tracked ones."""
        states, row = self.target_worker.states, torch.arange(len(self._chains))
        states[self._slots] = self._chains[row, last_correct_step_indices]
        if mamba_track_indices is not None and mamba_steps_to_track is not None:
            is_tracked = (mamba_steps_to_track >= 0) & (mamba_track_indices >= 0)
            steps = mamba_steps_to_track[is_tracked]
            states[mamba_track_indices[is_tracked]] = self._chains[row[is_tracked], steps]


def write_rows(
    requests: torch.Tensor,
    req_to_token: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    rows: torch.Tensor,
    batch_size: int,
) -> None:
    """Store new rows of requests, as SGLang's kernel ``assign_req_to_token_pool`` does."""
    counts = (ends - starts).tolist()
    assert len(counts) == batch_size and sum(counts) == len(rows)
    for request, start, new in zip(requests, starts.tolist(), rows.split(counts), strict=True):
        req_to_token[request, start : start + len(new)] = new.to(req_to_token.dtype)


class CPUScheduler(Scheduler):
    """SGLang's scheduler over ``HashModel``, with its loop driven step by step."""

    make_worker: Callable[[Any], HashModel]
    streams: Streams
    """Streams of the device that the cache sees."""
    has_pass_in_flight = False
    num_waits = 0
    """Calls of the cache that wait for a forward pass."""
    num_checkpoints_in_flight = 0
    """Calls of ``checkpoint`` while a pass was in flight."""

    def init_ipc_channels(self, port_args: PortArgs) -> None:
        self.ipc_channels = SchedulerIpcChannels.create(
            port_args=port_args,
            is_rank_zero=False,
            skip_tokenizer_init=True,
            metrics_enabled=False,
            enable_scripted_runtime=False,
        )
        self.load_snapshot_writer = self.recv_from_tokenizer = None

    def init_model_worker(self) -> None:
        worker = type(self).make_worker(self.model_config)
        self.tp_worker = self.model_worker = worker
        self.draft_worker = None
        if self.spec_algorithm.is_some():
            num_draft_tokens = self.server_args.speculative_num_draft_tokens
            self.draft_worker = self.model_worker = HashDrafter(worker, num_draft_tokens)
        self.kv_cache_allocation_time = 0.0
        self.device = "cpu"
        self.schedule_stream = torch.cpu.Stream()
        self.forward_stream = worker.model_runner.forward_stream
        self.max_total_num_tokens = worker.world.rows.size
        self.max_prefill_tokens = 16384
        self.max_running_requests = worker.max_requests
        self.max_queued_requests = None
        self.max_req_len = min(self.model_config.context_len, self.max_total_num_tokens) - 1
        self.max_req_input_len = self.max_req_len - 5
        self.random_seed = 0
        self.min_free_slots_delayer = None
        get_context().override("cpu", pp_max_micro_batch_size=self.max_running_requests)
        parallel = get_parallel()
        self.tp_group, self.attn_tp_group = parallel.tp_group, parallel.attn_tp_group
        self.attn_cp_group, self.pp_group = parallel.attn_cp_group, parallel.pp_group
        self.world_group = parallel.world_group
        self.tp_cpu_group = self.tp_group.cpu_group
        self.attn_tp_cpu_group = self.attn_tp_group.cpu_group
        self.attn_cp_cpu_group = self.attn_cp_group.cpu_group
        self.dp_tp_group = scheduler_module.get_dp_tp_group()
        self.dp_tp_cpu_group = self.dp_tp_group.cpu_group
        self.pad_input_ids_func = None
        self.startup_available_gpu_memory_gb = 0.0

    def count_drafts(self) -> tuple[int, int]:
        """Return the numbers of accepted and of rejected drafts."""
        drafter = self.draft_worker
        return (0, 0) if drafter is None else (drafter.num_accepted, drafter.num_rejected)

    def step(self) -> bool:
        """Run one iteration of SGLang's event loop. Returns False if there was nothing to do."""
        batches = {"running_batch": self.running_batch, "last_batch": self.last_batch}
        mode = self.disaggregation_mode.value
        if mode == "prefill":
            self.waiting_queue.extend(self.disagg_prefill_bootstrap_queue.pop_bootstrapped())
            plan = self.get_next_disagg_prefill_batch_to_run(**batches)
        elif mode == "decode":
            self.process_decode_queue()
            plan = self.get_next_disagg_decode_batch_to_run(self.running_batch)
        else:
            plan = self.get_next_batch_to_run(**batches)
        self.running_batch = plan.running_batch
        busy = (self._run_overlap if self.enable_overlap else self._run_normal)(plan.batch_to_run)
        if mode == "prefill":
            self.process_disagg_prefill_inflight_queue()
        if mode == "null":  # of a transfer it knows nothing
            self.invariant_checker.self_check_during_busy()
        return busy or not self.is_fully_idle()

    def _run_normal(self, batch: Any) -> bool:
        """Process a batch as in ``event_loop_normal``."""
        if batch:
            self.process_batch_result(batch, self.run_batch(batch))
        else:
            self.on_idle()
        self.last_batch = batch
        return batch is not None

    def _run_overlap(self, batch: Any) -> bool:
        """Process a batch as in ``event_loop_overlap``: the last result is processed after this
        batch starts. On a GPU, the scheduling stream then waits for the pass of this batch, so each
        call that waits for that stream also waits for the pass: such calls of the cache are
        counted."""
        last = self.last_batch
        at_once = self.is_disable_overlap_for_batch(batch, last_batch=last)
        if at_once:
            self.process_batch_result(*self.result_queue.popleft())
        result = None
        if batch:
            result = self.run_batch(batch)
            self.result_queue.append((batch.copy(), result))
        if last and not at_once:
            self.has_pass_in_flight = batch is not None
            self.process_batch_result(*self.result_queue.popleft())
            self.has_pass_in_flight = False
        elif not last and batch is None:
            self.on_idle()
        self.launch_batch_sample_if_needed(result, batch)
        self.last_batch = batch
        return batch is not None or bool(last)

    def submit(self, rid: str, tokens: Iterable[int], max_new_tokens: int, **names: Any) -> Req:
        """Add a greedy request with the ids ``tokens`` to the waiting queue. ``names`` are those of
        its adapter and salt: ``extra_key``, ``cache_salt``."""
        req = Req(
            rid=rid,
            bootstrap_host="prefill",
            bootstrap_room=1 + len(ROOMS),
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(
                temperature=0, max_new_tokens=max_new_tokens, ignore_eos=True
            ),
            vocab_size=self.model_config.vocab_size,
            **names,
        )
        ROOMS[req.bootstrap_room] = self, req
        req.sampling_params.normalize(None)
        self.init_req_max_new_tokens(req)
        self._add_request_to_queue(req)
        return req


def new_scheduler(
    folder: Path,
    num_kv_tokens: int,
    num_slots: int,
    *,
    max_requests: int = 6,
    strategy: str = "extra_buffer",
    overlap: bool = False,
    backend: str | None = NAME,
    context_len: int = 4096,
    draft_length: int = 0,
    **settings: Any,
) -> CPUScheduler:
    """Return SGLang's scheduler with this cache, or with its own if ``backend`` is None. One per
    process, because its settings are global. Multi-token prediction if ``draft_length`` > 0."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if NAME not in registered_radix_cache_backends():
        plug_in()
    # Replace device features that SGLang requires and CPUs do not have.
    mamba_hook._platform_supports_mamba_cache_extra_buffer = lambda: True
    bootstrap._bind_threads_if_cpu = lambda *, device: None
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.cuda.Event, torch.cuda.current_stream = MagicMock, torch.cpu.current_stream
    make_tensor = torch.tensor
    torch.tensor = lambda *given, pin_memory=False, **named: make_tensor(*given, **named)
    if draft_length:
        speculative_hook._disable_overlap_schedule_for_cpu = lambda server_args: None
        allocation.assign_req_to_token_pool_func = write_rows
        overlap_utils.gather_spec_extras = lambda at, *buffers: tuple(
            None if buffer is None else buffer[at] for buffer in buffers
        )
        settings |= {
            "speculative_algorithm": "NEXTN",
            "speculative_num_steps": draft_length,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": draft_length + 1,
        }
    args = ServerArgs(
        model_path=str(folder),
        device="cpu",
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        attention_backend="torch_native",
        radix_cache_backend=backend,
        max_running_requests=max_requests,
        max_total_tokens=num_kv_tokens,
        context_length=context_len,
        disable_overlap_schedule=not overlap,
        mamba_radix_cache_strategy=strategy,
        **settings,
    )
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    pools = {"extra_buffer": strategy != "no_buffer", "lazy": strategy == "extra_buffer_lazy"}
    pools["decodes"] = settings.get("disaggregation_mode") == "decode"
    world = new_pools(
        num_kv_tokens, num_slots, max_requests=max_requests, context_len=context_len, **pools
    )
    CPUScheduler.make_worker = lambda config: HashModel(world, config, max_requests)
    if backend is None or not overlap:
        return CPUScheduler(args, PortArgs.init_new(args))
    CPUScheduler.streams = streams = Streams()
    translation.streams_of = lambda device: streams
    scheduler = CPUScheduler(args, PortArgs.init_new(args))
    checkpoint = scheduler.tree_cache.checkpoint

    def counted(*given: Any, **named: Any) -> None:
        if not scheduler.has_pass_in_flight:
            return checkpoint(*given, **named)
        scheduler.num_checkpoints_in_flight += 1
        with Waits() as waits:
            checkpoint(*given, **named)
        scheduler.num_waits += waits.num
        return None

    scheduler.tree_cache.checkpoint = counted
    return scheduler
