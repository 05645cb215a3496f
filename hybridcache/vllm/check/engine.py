"""Engine without tensors: vLLM's scheduler, and a worker that stores identities of prefixes.

Limit: this worker writes one state per step, that after the accepted tokens. vLLM's worker also
copies states of accepted drafts at ends of blocks. So the check cannot judge states of a decode
with drafts, only those of prefills and all rows.
"""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1 import kv_cache_interface
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from hybridcache.vllm import NAME
from hybridcache.vllm.check.isolation import Turn, identity
from hybridcache.vllm.check.transfers import GARBAGE, Transfers

MAX_LEN = 1 << 18
"""Longest prompt with its answer."""
ENCODER_TOKENS = 512
"""Budget of a step, and half of the cache, for encoded images."""
STEP_S, TOKEN_S, COPY_S = 8e-3, 25e-6, 26e-6
"""Time model: seconds of a step, of each of its tokens, and of each block copy. Guessed for
Qwen3-Next-80B-A3B on one large GPU."""
POWERS = np.cumprod(np.full(MAX_LEN, 6364136223846793005, np.uint64)).view(np.int64)

SMALL = {
    "layers": 1,
    "state_groups": 2,
    "row_bytes": 256,
    "state_bytes": 128 * 256,
    "chunk": 512,
}
"""Options of a model with blocks of 128 tokens."""


@dataclass(frozen=True)
class Options:
    """Flags of one run. Those of the model are of Qwen3-Next-80B-A3B in bfloat16, with states in
    float32: blocks of 1,056 tokens."""

    gib: float = 4.0
    """Memory of the cache, GiB."""
    scheduler: str = "hybridcache"
    """hybridcache or vllm."""
    blocks: int = 0
    """Blocks of the cache. 0 is as many as ``gib`` has room for."""
    unit: int = 32
    """``--prefix-match-unit``; 0 is the block."""
    retention: int | None = 0
    """``--prefix-cache-retention-interval``."""
    sessions: int = 16
    """Requests at once."""
    chunk: int = 8192
    """``--max-num-batched-tokens``."""
    overlap: bool = False
    """Asynchronous scheduling: a step is scheduled before the last one's tokens are known."""
    drafts: int = 0
    """Draft tokens per step."""
    eagle: bool = False
    """Drafts of an EAGLE or MTP head, for which vLLM drops the end of each hit."""
    chaos: float = 0.0
    """Share of requests that are aborted in the middle. Priorities are random then."""
    resets: float = 0.0
    """Share of steps before which the cache is reset, half of them with the connector."""
    seed: int = 0
    """Seed of acceptances, aborts, priorities, resets and transfers."""
    kv_transfer_config: Mapping[str, Any] | None = None
    """``--kv-transfer-config``: OffloadingConnector, or RemotePrefill of this check."""
    late: int = 0
    """Largest number of steps by which a transfer ends late."""
    failures: float = 0.0
    """Share of loads that fail."""
    settings: Mapping[str, Any] | None = None
    """Value of ``additional_config["hybridcache"]``."""
    layers: int = 12
    """Layers of the model in each cache group."""
    state_groups: int = 3
    """Cache groups of the layers with states, beside one of attention."""
    row_bytes: int = 2048
    """Bytes of one token's KV in one layer."""
    state_bytes: int = 8192 * 3 * 2 + 32 * 128 * 128 * 4
    """Bytes of one layer's state."""
    exports: int = 0
    """Alignment of the state that kernels export inside a prefill, tokens: 1 for Mamba-2, 64 for
    KDA and FlashInfer. 0 exports none."""
    mamba_cache_mode: str = "align"
    """``--mamba-cache-mode``. vLLM 0.26 and 0.27 also have ``all``: a state in each block."""

    @property
    def block_size(self) -> int:
        """Tokens of a block whose page has room for a state, as vLLM chooses it."""
        return 16 * -(-self.state_bytes // (16 * self.row_bytes)) if self.state_groups else 16

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.row_bytes * self.layers

    @property
    def num_blocks(self) -> int:
        return self.blocks or int(self.gib * 2**30 // self.block_bytes)


@dataclass
class Report:
    """Result of one run."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    resumed_tokens: int = 0
    """Hits of preempted requests included. The rows and states of all are compared."""
    external_tokens: int = 0
    """Share of ``hit_tokens`` that a connector has loaded."""
    stored_blocks: int = 0
    """Blocks that went to the host."""
    loaded_blocks: int = 0
    failed_loads: int = 0
    resets: int = 0
    wrong_rows: int = 0
    wrong_states: int = 0
    """Copies from a block that another copy of the same step writes are wrong states too."""
    steps: int = 0
    preemptions: int = 0
    aborts: int = 0
    copied_blocks: int = 0
    computed_tokens: int = 0
    """Tokens of all steps, those of preempted requests and drafts included."""
    seconds: float = 0.0
    """Time of the steps in the time model, and below that from a request to its first token."""
    ttft_mean_s: float = 0.0
    ttft_p95_s: float = 0.0

    @property
    def num_wrong(self) -> int:
        return self.wrong_rows + self.wrong_states

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / max(self.prompt_tokens, 1)


class _Any(SimpleNamespace):
    """Configuration in which every field that was not given is None."""

    def __getattr__(self, name: str) -> Any:
        return None


def make_config(options: Options) -> Any:
    """Return the fields of a ``VllmConfig`` that a scheduler reads."""
    drafts, eagle = options.drafts, options.eagle
    config = _Any(
        scheduler_config=SchedulerConfig(
            max_model_len=MAX_LEN,
            is_encoder_decoder=False,
            max_num_batched_tokens=options.chunk,
            policy="priority" if options.chaos else "fcfs",
            async_scheduling=options.overlap,
        ),
        cache_config=CacheConfig(
            block_size=options.block_size, mamba_cache_mode=options.mamba_cache_mode
        ),
        parallel_config=ParallelConfig(),
        observability_config=ObservabilityConfig(),
        model_config=_Any(max_model_len=MAX_LEN, runner_type="generate"),
        ec_manager_config=_Any(get_encoder_cache_manager_obj=lambda: None),
        aux_output_config=_Any(),
        num_speculative_tokens=drafts,
        num_lookahead_tokens=drafts if eagle else 0,
        num_prefill_lookahead_tokens=int(eagle),
        num_hash_lookahead_tokens=0,
        max_in_flight_tokens=options.chunk,
        max_concurrent_batches=1 + options.overlap,
        additional_config={NAME: dict(options.settings or {})},
    )
    config.cache_config.num_gpu_blocks = options.num_blocks
    config.cache_config.prefix_match_unit = options.unit or None
    config.cache_config.prefix_cache_retention_interval = options.retention
    if options.kv_transfer_config is not None:
        config.kv_transfer_config = KVTransferConfig(
            **{"kv_role": "kv_both", "engine_id": "check", **options.kv_transfer_config}
        )
    if drafts:
        names = ("use_eagle", "use_eagle_block_drop", "needs_eagle_block_drop")
        answers = dict.fromkeys(names, lambda: eagle)
        config.speculative_config = _Any(max_num_new_slots_for_drafting=0, **answers)
    return config


def make_scheduler(options: Options) -> Any:
    """Build vLLM's scheduler, or this project's, for a model without tensors."""
    size = options.block_size
    attention = FullAttentionSpec(
        block_size=size, num_kv_heads=1, head_size=options.row_bytes // 4, dtype=torch.bfloat16
    )
    state = MambaSpec(
        block_size=size,
        shapes=((options.state_bytes // 4,),),
        dtypes=(torch.float32,),
        page_size_padded=size * options.row_bytes,
        mamba_cache_mode=options.mamba_cache_mode,
        num_speculative_blocks=options.drafts,
    )
    if options.exports:
        exported = {"num_prefill_checkpoint_blocks": 1}
        state = replace(state, prefill_checkpoint_alignment=options.exports, **exported)
    kinds = [attention, *[state] * options.state_groups]
    retention = {"prefix_cache_retention_interval": options.retention}
    known = inspect.signature(KVCacheConfig).parameters  # vLLM 0.28 and earlier have it elsewhere.
    config = KVCacheConfig(
        num_blocks=options.num_blocks,
        kv_cache_tensors=[_Any(size=options.num_blocks * options.block_bytes)],
        kv_cache_groups=[KVCacheGroupSpec(["layer"] * options.layers, kind) for kind in kinds],
        **(retention if retention.keys() <= known.keys() else {}),
    )
    grammar = _Any(
        accept_tokens=lambda *_: True,
        validate_tokens=lambda _, tokens: tokens,
        should_advance=lambda *_, **__: False,
    )
    kind: type[Scheduler] = AsyncScheduler if options.overlap else Scheduler
    if options.scheduler == NAME:  # Imported here: it refuses other versions of vLLM.
        from hybridcache.vllm.scheduler import HybridScheduler as kind
    return kind(
        vllm_config=make_config(options),
        kv_cache_config=config,
        structured_output_manager=grammar,
        block_size=size,
        hash_block_size=options.unit or size,
        log_stats=True,
    )


class Contents:
    """Worker that stores the identity of a prefix in place of each row and state.

    The first group of a request's ``tables`` is that of attention, the others hold states.
    """

    def __init__(self, options: Options, report: Report) -> None:
        self.size, self.report = options.block_size, report
        self.has_all_states = options.mamba_cache_mode == "all"
        self.exports, self.unit = options.exports, options.unit or options.block_size
        self.rows = np.full((options.num_blocks, self.size), GARBAGE, np.int64)
        self.state = np.full(options.num_blocks, GARBAGE, np.int64)

    def copy(self, copies: Sequence[Any]) -> None:
        """Copy blocks before a step, all at once."""
        src, dst = np.array(copies, np.intp).reshape(-1, 2).T
        self.report.wrong_states += int(np.isin(src, dst).sum())
        self.report.copied_blocks += len(src)
        self.rows[dst], self.state[dst] = self.rows[src], self.state[src]

    def _rows_of(self, table: Sequence[int], start: int, end: int) -> tuple[Any, Any]:
        """Return the blocks and the offsets in them of the tokens [start, end)."""
        spans, offsets = np.divmod(np.arange(start, end), self.size)
        return np.array(table)[spans], offsets

    def compare(self, tables: Sequence[Sequence[int]], prefix: np.ndarray, end: int) -> None:
        """Compare the rows [0, end) of a request with its prefixes."""
        found = self.rows[self._rows_of(tables[0], 0, end)]
        self.report.wrong_rows += int((found != prefix[1 : end + 1]).sum())

    def compute(
        self, tables: Sequence[Sequence[int]], prefix: np.ndarray, start: int, end: int, kept: int
    ) -> None:
        """Compute the tokens [start, end), of which those from ``kept`` on are rejected drafts."""
        for table in tables[1:] if start else ():
            found = self.state[table[(start - 1) // self.size]]
            self.report.wrong_states += int(found != prefix[start])
        rows = np.where(np.arange(start, end) < kept, prefix[start + 1 : end + 1], GARBAGE)
        self.rows[self._rows_of(tables[0], start, end)] = rows
        self._export(tables, prefix, start, end)
        for table in tables[1:]:
            for end in range((start // self.size + 1) * self.size, kept, self.size):
                if self.has_all_states:
                    self.state[table[end // self.size - 1]] = prefix[end]
            self.state[table[(kept - 1) // self.size]] = prefix[kept]

    def _export(
        self, tables: Sequence[Sequence[int]], prefix: np.ndarray, start: int, end: int
    ) -> None:
        """Export the state inside a prefill that vLLM's scheduler expects of such kernels."""
        position = (end - 1) // self.unit * self.unit
        if self.exports and kv_cache_interface.is_mamba_prefill_checkpoint_valid(
            start, end, position, self.unit, self.size, self.exports
        ):
            blocks = [table[-(-end // self.size) - 2] for table in tables[1:]]
            self.state[[one for one in blocks if one]] = prefix[position]


@dataclass(eq=False)
class Live:
    """Request of the workload in the engine."""

    request: Request
    text: list[int]
    """Prompt and answer."""
    prefix: np.ndarray
    rest: deque[Any]
    """Later requests of the session."""
    sent_s: float
    done: int = 0
    """Tokens that the worker has computed and accepted."""
    has_first_token: bool = False
    abort_at: int = 0
    """Length at which the client aborts. 0 is never."""


class StubEngine:
    """Engine with vLLM's scheduler and a worker without tensors."""

    def __init__(self, options: Options) -> None:
        self.options, self.report = options, Report()
        self.scheduler = make_scheduler(options)
        self.contents = Contents(options, self.report)
        self.live: dict[str, Live] = {}
        self.transfers = Transfers(self.contents, self.live, options)
        self.scheduler.max_num_encoder_input_tokens = ENCODER_TOKENS
        self.scheduler.encoder_cache_manager = EncoderCacheManager(2 * ENCODER_TOKENS)
        self.scheduler.lora_config = _Any(max_loras=2)
        self._chance = random.Random(options.seed)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(options.unit or options.block_size, sha256)
        self._pending: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._numbers = count(1)
        self.ttfts_s: list[float] = []
        """Time to the first token of each request, in the time model."""

    def submit(self, session: deque[Any]) -> None:
        """Add the next request of a session."""
        one, chance, options = session.popleft(), self._chance, self.options
        text = [*one.tokens.tolist(), *(one.output.tolist() or [1])]
        base, contents = 0, np.array(text, np.int64) + 1
        fields: dict[str, Any] = {}
        if isinstance(one, Turn):
            base, contents = one.contents()
            fields = one.request_fields()
        salt = None if one.namespace is None else str(one.namespace)
        params = SamplingParams(
            max_tokens=len(text) - len(one.tokens),
            ignore_eos=True,
            extra_args={f"{NAME}_boundaries": [*one.boundaries]},
            prompt_logprobs=getattr(one, "prompt_logprobs", None),
        )
        request = Request(
            f"r{next(self._numbers)}",
            None if fields.get("prompt_embeds") is not None else text[: len(one.tokens)],
            params,
            None,
            block_hasher=self._hasher,
            cache_salt=salt,
            priority=chance.randrange(3) if options.chaos else 0,
            **fields,
        )
        base += identity("salt", salt)
        prefix = base + np.append(0, np.cumsum(contents * POWERS[: len(contents)]))
        sent_s = self.report.seconds
        live = self.live[request.request_id] = Live(request, text, prefix, session, sent_s)
        if options.chaos and chance.random() < options.chaos:
            live.abort_at = chance.randrange(1, len(text))
        self.scheduler.add_request(request)

    def step(self) -> None:
        """Schedule and compute one step, deliver the tokens of it or of the last one, and continue
        the sessions of the requests that have ended."""
        self.report.steps += 1
        if self.options.resets and self._chance.random() < self.options.resets:
            self._reset()
        output = self.scheduler.schedule()
        self._pending.append((output, self._execute(output)))
        if len(self._pending) > self.options.overlap or not output.num_scheduled_tokens:
            self._deliver()
        for request_id, live in list(self.live.items()):
            if 0 < live.abort_at <= live.request.num_computed_tokens:
                self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
                self.report.aborts += 1
                live.abort_at = 0
            if request_id not in self.scheduler.requests:
                del self.live[request_id]
                if live.rest:
                    self.submit(live.rest)

    def _reset(self) -> None:
        """Reset the cache, and half of the times the connector. Running requests begin again,
        unless a transfer holds blocks: vLLM does not support that."""
        while self._pending:
            self._deliver()
        statuses = {live.request.status for live in self.live.values()}
        holds = RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.FINISHED_ABORTED
        begins_again = statuses.isdisjoint(holds) and not self.scheduler.deferred_frees
        with_connector = self._chance.random() < 0.5
        self.scheduler.reset_prefix_cache(begins_again, with_connector)
        self.report.resets += 1

    def _deliver(self) -> None:
        output, result = self._pending.popleft()
        self.scheduler.update_from_output(output, result)
        if self.options.drafts and not self.options.overlap:
            ids = [one for one in output.num_scheduled_tokens if one in self.scheduler.requests]
            drafts = DraftTokenIds(ids, [[1] * self.options.drafts for _ in ids])
            self.scheduler.update_draft_token_ids(drafts)

    def _execute(self, output: Any) -> ModelRunnerOutput:
        contents, report, manager = self.contents, self.report, self.scheduler.kv_cache_manager
        report.preemptions += len(output.preempted_req_ids or ())
        begun = {one.req_id for one in output.scheduled_new_reqs}
        begun |= output.scheduled_cached_reqs.resumed_req_ids
        if (meta := output.kv_connector_metadata) is not None:
            self.transfers.start(meta, report.steps)
        copies, num_tokens = output.kv_cache_block_copies or (), output.total_num_scheduled_tokens
        contents.copy(copies)
        report.computed_tokens += num_tokens
        report.seconds += (num_tokens > 0) * STEP_S + num_tokens * TOKEN_S + len(copies) * COPY_S
        sampled: list[list[int]] = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            live = self.live[request_id]
            request, tables = live.request, manager.get_block_ids(request_id)
            num_drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            if request_id in begun:
                live.done = request.num_computed_tokens - num_tokens
                contents.compare(tables, live.prefix, live.done)
                report.resumed_tokens += live.done
                if not request.num_preemptions:
                    report.requests += 1
                    report.prompt_tokens += request.num_tokens
                    report.hit_tokens += live.done
                    stats = getattr(request, "prefill_stats", None)
                    report.external_tokens += stats.num_external_cached_tokens if stats else 0
            start, end = live.done, min(live.done + num_tokens, len(live.prefix) - 1)
            first, accepted = start + num_tokens - num_drafts, 0
            if num_drafts and not request.is_prefill_chunk:
                accepted = self._chance.randint(0, num_drafts)
                accepted = min(accepted, len(live.text) - first - 1)
            live.done = max(min(first + accepted, end), start + 1)
            contents.compute(tables, live.prefix, start, end, min(live.done, end))
            tokens = live.text[first : first + accepted + 1] or [1]
            sampled.append([] if request.is_prefill_chunk else tokens)
            if sampled[-1] and not live.has_first_token:
                live.has_first_token = True
                self.ttfts_s.append(report.seconds - live.sent_s)
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={one: number for number, one in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=None if meta is None else self.transfers.finish(report.steps),
        )


def run(requests: Iterable[Any], options: Options) -> Report:
    """Serve ``requests``, ``options.sessions`` at once: each session one request after the other,
    or, one at a time, all requests in the order of the trace."""
    engine = StubEngine(options)
    sessions: dict[Any, deque[Any]] = {}
    for number, one in enumerate(requests):
        key = number if one.session is None or options.sessions == 1 else one.session
        sessions.setdefault(key, deque()).append(one)
    waiting = deque(sessions.values())
    while waiting or engine.live:
        while waiting and len(engine.live) < options.sessions:
            engine.submit(waiting.popleft())
        engine.step()
    report, waits_s = engine.report, engine.ttfts_s or [0.0]
    report.ttft_mean_s = float(np.mean(waits_s))
    report.ttft_p95_s = float(np.percentile(waits_s, 95))
    return report
