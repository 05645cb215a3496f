"""Implementation of SGLang's prefix-cache interface with this project's tree.

Ownership of a request's rows: the tree owns ``[0, cache_protected_len)`` under the request's lock.
The request owns the rest until ``checkpoint`` publishes it or SGLang frees it. No decision depends
on a clock or on an order that differs between processes, so all ranks build the same tree.
"""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sglang.srt.disaggregation.kv_events import namespaced_block_hash
from sglang.srt.mem_cache import base_prefix_cache as base
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, default_radix_cache_factory
from sglang.srt.mem_cache.utils import hash_str_to_int64, split_node_hash_value
from sglang.srt.runtime_context import (
    get_disagg,
    get_memory,
    get_parallel,
    get_spec,
    mamba_checkpoint_grid,
)
from sglang.srt.utils.rank_consensus_checker import rank_consensus

from hybridcache.allocators.moves import Indices
from hybridcache.allocators.pools import SlotAllocator
from hybridcache.config import CacheConfig, build_on
from hybridcache.radix.api import Listener
from hybridcache.radix.cache import HybridRadixCache, LockHandle
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import SESSION_END, NodeHandle, PathPart, RadixNode
from hybridcache.sglang.translation import (
    EVERY_VARIABLE,
    STATES_VARIABLE,
    HostReader,
    HostTier,
    LossMeter,
    Offer,
    PendingLoad,
    RequestStates,
    RowView,
    SlotView,
    TokenWords,
    boundaries_of,
    branch_position,
    chosen_eviction,
    namespace_of,
    read_every,
    to_host,
    why_not,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_SESSIONS = 4096
"""Most sessions whose close is noticed: those with the newest requests."""


class HybridRadixBackend(base.BasePrefixCache):
    """``HybridRadixCache`` as a prefix cache of SGLang."""

    disable = False
    sliding_window_size = None
    cache_controller = None
    """None, because the host tier is not SGLang's."""
    enable_storage = False
    ongoing_write_through = ongoing_load_back = ()

    def __init__(
        self,
        params: CacheInitParams,
        is_hybrid_ssm: bool,
        eviction: str | None = None,
        host: HostSettings | None = None,
    ) -> None:
        """Build an empty cache over the pools of ``params``. ``eviction`` replaces its
        ``eviction_policy``. Evicted prefixes are kept on the host if ``host`` is given."""
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.device = params.token_to_kv_pool_allocator.device
        token_bytes, state_bytes = sizes_in_bytes(params, is_hybrid_ssm)
        self._rows = RowView(params.token_to_kv_pool_allocator, params.page_size, token_bytes)
        self._reader = HostReader(self.device)
        self._every = read_every(os.environ.get(EVERY_VARIABLE))
        self._grid: int = params.page_size
        """Distance of a prefill's states in tokens."""
        self._states: RequestStates | None = None
        """None for a model without recurrent layers."""
        slots = SlotAllocator(0)
        if is_hybrid_ssm:
            pool, extra_buffer = params.req_to_token_pool, params.enable_mamba_extra_buffer
            slots = view = SlotView(pool.mamba_allocator, state_bytes)
            self._states = RequestStates(
                pool, view, self._settle, self._reader, extra_buffer=extra_buffer
            )
            if extra_buffer:
                self._grid = mamba_checkpoint_grid(params.page_size)
        device_bytes = self._rows.capacity * token_bytes + slots.capacity * state_bytes
        config = CacheConfig(
            prefix_cache="hybrid" if is_hybrid_ssm else "radix",
            num_kv_tokens=self._rows.capacity,
            num_slots=slots.capacity,
            kv_bytes_per_token=token_bytes,
            state_bytes=state_bytes,
            page_size=params.page_size,
            grid=1,
            host_bytes=0 if host is None else host.num_bytes(device_bytes),
            eviction=params.eviction_policy if eviction is None else eviction,
            debug=False,  # SGLang allocates rows itself.
        )
        self._make = partial(build_on, config, self._rows, slots)
        self._words = TokenWords()
        self._events = EventRecorder(params, self._words)
        self.kv_events = self._events.recorder
        self._meter: LossMeter | None = None
        if params.enable_metrics:
            self.init_metrics_collector()
            self._meter = LossMeter(self._grid, self.metrics_collector.labels)
        self._cache: HybridRadixCache
        self._host: HostTier | None = None
        self.reset()
        if host is not None:
            kv, mamba = params.token_to_kv_pool_allocator.get_kvcache(), pool.mamba_pool
            kv = getattr(kv, "full_kv_pool", kv)
            rows = [*kv.kv_buffer] if hasattr(kv, "kv_buffer") else [*kv.k_buffer, *kv.v_buffer]
            states = [*mamba.mamba_cache.conv, mamba.mamba_cache.temporal]
            [tier] = self._cache.offload.tiers
            state_rows = self._cache.offload.state_rows
            self._host = HostTier(rows, states, tier.pages.capacity, state_rows, host.fence)

    def reset(self) -> None:
        """Discard all contents. SGLang clears its pools itself after this call."""
        if self._events.followed is not None:
            self._cache.unsubscribe(self._events)
        self._cache = self._make()
        self._sent: dict[str, list[Indices]] = {}
        """Rows of each request that were sent, and are the tree's in other rows."""
        self._ends: OrderedDict[str, RadixNode | None] = OrderedDict()
        """Node at the end of the newest request of each open session."""
        if self._events.recorder.enabled:
            self._events.restart()
            self._cache.subscribe(self._events)

    def _settle(self) -> None:
        """Queue the copies of evictions and loads, and then free evicted rows in SGLang."""
        if self._host is not None:
            plan = self._cache.take_step()
            if plan.transfers:
                self._host.run(plan.transfers)
            plan.done()
        self._rows.give_back()

    @property
    def tree(self) -> HybridRadixCache:
        """The underlying tree, for inspection and rendering."""
        return self._cache

    def match_prefix(self, params: base.MatchPrefixParams) -> base.MatchResult:
        """Match ``params.key``. O(n). A request counts as a use at its first ``checkpoint``, a
        match without one immediately."""
        key, req = params.key, params.req
        prompt = self._words.prompt_of(key)
        found = self._cache.match(prompt, namespace_of(key.extra_key, key.cache_salt))
        branch = None
        if self._states is not None:
            if params.cow_mamba and found.checkpoint is not None:
                found = self._states.resume(self._cache, req, prompt, found)
            if self._states.extra_buffer:
                declared = boundaries_of(req)
                branch = branch_position(prompt, found, self._grid, declared, self._every)
        if req is None:
            self._cache.touch(found)
        else:
            req.hybridcache_match = found
        handle: Any = handle_of(found.node)
        best, num_loadable = handle, 0
        if req is not None and found.loadable:
            best = PendingLoad(found.loadable[-1], prompt, found.namespace)
            num_loadable = best.resumable.position - found.cached_len
        return base.MatchResult(
            device_prefix_len=found.cached_len,
            last_device_node=handle,
            last_host_node=handle,
            best_match_node=best,
            host_hit_length=num_loadable,
            mamba_host_hit_length=int(num_loadable > 0),
            mamba_branching_seqlen=branch,
            full_kv_hit_length=min(found.kv_match_len, len(prompt) - 1),
        )

    def init_load_back(self, params: base.InitLoadBackParams) -> tuple[int, Handle]:
        """Load the prefix that ``match_prefix`` found on the host, if there is room. Returns the
        number of loaded tokens and the last node. O(tokens)."""
        req, pending = params.req, params.best_match_node
        assert self._states is not None
        found = self._states.load(self._cache, req, pending)
        self._settle()
        if found is None:
            return 0, req.last_node
        req.hybridcache_match = found
        if self._states.extra_buffer:
            declared = boundaries_of(req)
            req.mamba_branching_seqlen = branch_position(
                pending.prompt, found, self._grid, declared, self._every
            )
        return found.cached_len - req.prefix_len, handle_of(found.node)

    @property
    def full_kv_pool_host(self) -> SimpleNamespace:
        """Size and free rows of the host tier, for SGLang's metrics."""
        offload = self._cache.offload
        assert offload is not None
        pages = offload.tiers[0].pages
        return SimpleNamespace(logical_size=pages.capacity, available_size=lambda: pages.num_free)

    def check_hicache_events(self) -> None:
        """Do nothing: all copies are queued on the scheduling stream, in order."""

    def ready_to_load_host_cache(self) -> int:
        """Return -1: the pass waits for loads on the scheduling stream, not layer by layer."""
        return -1

    def touch_prefix(self, key: RadixKey) -> None:
        """Refresh the resume point of a waiting request. O(n)."""
        found = self._cache.match(
            self._words.prompt_of(key), namespace_of(key.extra_key, key.cache_salt)
        )
        self._cache.refresh(found.node)

    @rank_consensus(same_params=["req.rid", "up_to"])
    def checkpoint(self, req: Req, *, up_to: int, **kwargs: object) -> None:
        """Publish a request's first ``up_to`` tokens, as far as they can be resumed, after each
        chunk and when it has finished. O(up_to)."""
        self._count(req)
        finished = req.finished()
        tokens = self._words.of(req.full_untruncated_fill_ids, up_to)
        states = self._states
        if states is None:
            self._publish(req, tokens, None)
        elif finished:
            offer = states.offer_finished(req, len(tokens))
            states.release(req, offer, self._publish_state(req, tokens, offer))
        elif (offer := states.offer_running(self._cache, req, len(tokens))) is not None:
            states.settle_running(req, offer, self._publish_state(req, tokens, offer))
        if finished:
            self._end(req)
        self._settle()

    def _end(self, req: Req) -> None:
        """Note the end of a request of a session, for ``release_radix_session``."""
        session_id = req.session_id or ("" if req.session is None else req.session.session_id)
        node = None if req.lock is None else req.lock.receipt.receipt.node
        self._cache.label_tip(node, "", None, session_id)
        if session_id:
            self._ends[session_id] = node
            self._ends.move_to_end(session_id)
            if len(self._ends) > MAX_SESSIONS:
                self._ends.popitem(last=False)

    def release_radix_session(self, session_id: str) -> None:
        """Let all that only this session used be evicted first: its client has closed it."""
        node = self._ends.pop(session_id, None)
        while node is not None and node.kv is None:
            node = node.parent
        self._cache.label_tip(node, SESSION_END, None, session_id)

    def _count(self, req: Req) -> None:
        """Count an admitted request as a use when it has computed its first chunk."""
        found = getattr(req, "hybridcache_match", None)
        if found is not None:
            req.hybridcache_match = None
            self._cache.touch(found)
            if self._meter is not None:
                self._meter.record(found)

    def _publish_state(self, req: Req, tokens: Tokens, offer: Offer | None) -> bool:
        """Publish tokens up to an offered state. Returns True if the tree took the state."""
        if offer is None:
            return False
        position = offer.position
        first = max(req.kv.cache_protected_len, 1)
        if position % self.page_size or not first <= position <= len(tokens):
            return False
        return self._publish(req, tokens[:position], offer.number)

    def _publish(self, req: Req, tokens: Tokens, slot: int | None) -> bool:
        """Insert the request's rows for ``tokens``, with a state at their end, and move its lock.
        Rows that the tree already had are replaced by the tree's."""
        kv, end = req.kv, len(tokens)
        owned = kv.cache_protected_len
        if end - end % self.page_size < max(owned, 1):
            return False
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        rows = np.empty(end, np.int32)
        rows[owned:] = self._reader.read(row[owned:end])
        checkpoints = () if slot is None else ((end, slot),)
        namespace = namespace_of(req.extra_key, req.cache_salt)
        after = None if req.lock is None else req.lock.receipt.receipt.node
        result = self._cache.insert(tokens, rows, checkpoints, namespace, owned, (), after)
        num_known = len(result.duplicates)
        if num_known:
            # A decode node may still be reading those that a prefill node has sent.
            num_sent = max(req.start_send_idx - owned, 0)
            self._sent.setdefault(req.rid, []).append(result.duplicates[:num_sent])
            self._rows.free(result.duplicates[num_sent:])
            known = self._cache.gather(result.node)[owned : owned + num_known]
            place = (kv.req_pool_idx, slice(owned, owned + num_known))
            self.req_to_token_pool.write(place, self._rows.to_device(known).to(torch.int32))
        lock = self.lock(result.node)
        self.unlock(req.lock)
        req.lock = lock
        req.last_node = result.node
        kv.cache_protected_len = result.inserted_len
        kv.cache_inserted_len = max(kv.cache_inserted_len, result.inserted_len)
        return not result.rejected_slots

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """Free rows whose transfer has ended, and slots of an aborted or preempted request."""
        for rows in self._sent.pop(req.rid, ()):
            self._rows.free(rows)
        self._settle()
        if not checkpointed and self._states is not None:
            self._states.release(req, None, taken=False)

    @rank_consensus(same_params=["len(params.key)"], same_results=["result.prefix_len"])
    def insert(self, params: base.InsertParams) -> base.InsertResult:
        """Insert a key with its rows and optional state. Rows that the tree had are freed.

        The caller keeps the state if ``mamba_exist``. Waits for the current stream; SGLang's
        scheduler does not call it.
        """
        key, owned = params.key, params.prev_prefix_len
        tokens = self._words.of(key.token_ids, len(key))
        end = len(tokens) - len(tokens) % self.page_size
        state = params.mamba_value if end else None
        rows = to_host(params.value[:end])
        checkpoints = () if state is None else ((end, int(state)),)
        namespace = namespace_of(key.extra_key, key.cache_salt)
        result = self._cache.insert(tokens[:end], rows, checkpoints, namespace, owned)
        self._rows.free(result.duplicates)
        self._settle()
        return base.InsertResult(
            prefix_len=owned + len(result.duplicates),
            total_len=end,
            last_device_node=handle_of(result.node),
            mamba_exist=bool(result.rejected_slots),
        )

    @rank_consensus(same_params=True, same_results=True)
    def evict(self, params: base.EvictParams) -> base.EvictResult:
        """Evict until this many rows and slots are freed, or nothing evictable is left."""
        began = time.perf_counter()
        evicted = self._cache.evict(params.num_tokens, params.mamba_num)
        self._settle()
        self.update_eviction_metrics(evicted.num_tokens, began)
        return base.EvictResult(
            num_tokens_evicted=evicted.num_tokens, mamba_num_evicted=evicted.num_slots
        )

    def inc_lock_ref(self, node: Handle) -> LockReceipt:
        """Lock a node's state and the rows of its path. O(1)."""
        return LockReceipt(receipt=self._cache.lock(node_of(node)))

    def dec_lock_ref(self, node: Handle, params: LockReceipt) -> base.DecLockRefResult:
        """Release one ``inc_lock_ref``, whose result ``params`` is. O(1)."""
        self._cache.unlock(params.receipt)
        return base.DecLockRefResult()

    def path_device_indices(self, node: Handle) -> torch.Tensor:
        """Return the rows from the root to a node: int64[position] on the device. O(position)."""
        return self._rows.to_device(self._cache.gather(node_of(node)))

    def root_node_handle(self, extra_key: str | None = None) -> Handle:
        return handle_of(None)

    def dfs_weight_order(self, node_handles: Sequence[Handle]) -> list[int]:
        """Return the indices of handles in depth-first order, heaviest branch first. Deeper nodes
        precede shallower ones, and ties are broken by first appearance. O(handles * depth)."""
        paths = [_path(node_of(handle)) for handle in node_handles]
        weight = Counter(node for path in paths for node in path)
        rank: dict[RadixNode, int] = {node: number for number, node in enumerate(weight)}

        def place(index: int) -> tuple[tuple[int, int], ...]:
            return (*((-weight[node], rank[node]) for node in paths[index]), (1, 0))

        return sorted(range(len(node_handles)), key=place)

    def supports_mamba(self) -> bool:
        return self._states is not None

    def full_evictable_size(self) -> int:
        return self._cache.cached_tokens - self._cache.protected().num_tokens

    def full_protected_size(self) -> int:
        return self._cache.protected().num_tokens

    def mamba_evictable_size(self) -> int:
        return self._cache.num_checkpoints - self._cache.protected().num_checkpoints

    def mamba_protected_size(self) -> int:
        return self._cache.protected().num_checkpoints

    evictable_size, protected_size = full_evictable_size, full_protected_size

    def total_size(self) -> tuple[int, int]:
        return self._cache.cached_tokens, self._cache.num_checkpoints

    def all_values_flatten(self) -> torch.Tensor:
        nodes = self._cache.iter_nodes()
        parts = [node.kv.indices for node in nodes if node.kv is not None]
        return self._rows.to_device(np.concatenate([np.empty(0, np.int32), *parts]))

    def all_mamba_values_flatten(self) -> torch.Tensor:
        nodes = self._cache.iter_nodes()
        slots = [node.checkpoint.slot for node in nodes if node.checkpoint is not None]
        return torch.tensor(slots, dtype=torch.int64)

    def sanity_check(self) -> None:
        self._cache.check()

    def pretty_print(self) -> None:
        print(self._cache.render())


# --- References ---------------------------------------------------------------------------------


ROOT = "<root>"
"""Handle of an empty match. SGLang uses None for "not matched yet"."""

Node = NodeHandle | None
Handle = NodeHandle | str


def handle_of(node: Node) -> Handle:
    return ROOT if node is None else node


def node_of(handle: Handle) -> Node:
    """Return the node or path part of a handle, or None for the root."""
    return None if isinstance(handle, str) else handle


@dataclass(kw_only=True)
class LockReceipt(base.IncLockRefResult, base.DecLockRefParams):
    """Lock receipt with both of SGLang's interfaces."""

    receipt: LockHandle

    def to_dec_params(self) -> LockReceipt:
        return self


def _path(node: Node) -> list[RadixNode]:
    last = node.last() if isinstance(node, PathPart) else node
    above = last if isinstance(last, RadixNode) else None
    path = []
    while above is not None:
        path.append(above)
        above = above.parent
    return path[::-1]


# --- KV events ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Shadow:
    """Attributes of a node that the recorder reads."""

    parent: Shadow | None
    key: RadixKey
    hash_value: list[str] | None = None
    event_hash_value: list[str] | None = None


class EventRecorder(Listener):
    """Listener that feeds SGLang's recorder, which identifies a page by the hash of its path and
    stores it at nodes: here, at a ``Shadow`` of each. States are reported if ``STATES_VARIABLE`` is
    1."""

    def __init__(self, params: CacheInitParams, words: TokenWords) -> None:
        self._words = words
        self._reports_states = os.environ.get(STATES_VARIABLE) == "1"
        self.recorder = KVCacheEventRecorder(
            enabled=params.enable_kv_cache_events,
            page_size=params.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        self._page_size: int = params.page_size
        self._root = Shadow(None, RadixKey(array("q")), [])
        self._shadows: dict[int, Shadow] = {}

    def restart(self) -> None:
        """Report that all contents were discarded."""
        self._shadows.clear()
        self.recorder.record_all_cleared()

    def kv_stored(self, node: RadixNode) -> None:
        assert node.parent is not None
        above = node.parent.kv
        parent = self._root if above is None else self._shadows[above.serial]
        names: Any = node.namespace or (None, None)
        extra_key, cache_salt = names
        ids = self._words.ids_of(node.tokens)
        shadow = Shadow(parent, RadixKey(ids, extra_key, cache_salt=cache_salt))
        self._shadows[node.serial] = shadow
        self.recorder.record_store(shadow)

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        shadow, length = self._shadows[lower.serial], upper.end - upper.start
        top = Shadow(shadow.parent, shadow.key[:length])
        for name in ("hash_value", "event_hash_value"):
            halves = split_node_hash_value(getattr(shadow, name), length, self._page_size)
            for half, hashes in zip((top, shadow), halves, strict=True):
                setattr(half, name, hashes)
        shadow.parent, shadow.key = top, shadow.key[length:]
        self._shadows[upper.serial] = top

    def kv_removed(self, node: RadixNode) -> None:
        self.recorder.record_remove(self._shadows.pop(node.serial))

    def checkpoint_stored(self, node: RadixNode) -> None:
        self._report("BlockStored", node)

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._report("BlockRemoved", node)

    def _report(self, kind: str, node: RadixNode) -> None:
        """Send an event of a state as vLLM encodes it: SGLang's records have no group."""
        if self._reports_states:
            shadow, recorder = self._shadows[node.serial], self.recorder
            name = hash_str_to_int64(recorder._node_event_hash_values(shadow)[-1])
            name = namespaced_block_hash(name, namespace_seed=recorder._namespace_seed(shadow))
            group = {"group_idx": 1, "kv_cache_spec_kind": "mamba", "block_size": self._page_size}
            recorder._queue.append({"type": kind, "block_hashes": [name], **group})


# --- Construction ---------------------------------------------------------------------------------

logger = logging.getLogger("hybridcache.sglang")


class HostSettings(NamedTuple):
    """Settings of ``--enable-hierarchical-cache``."""

    size_gb: int
    """``--hicache-size``: size per rank in GB, or 0 if the ratio counts."""
    ratio: float
    """``--hicache-ratio``: size as a multiple of the device's."""
    fence: Any
    """Stream of the forward passes."""

    def num_bytes(self, device_bytes: int) -> int:
        return self.size_gb * 10**9 if self.size_gb else int(self.ratio * device_bytes)


def build_backend(ctx: TreeCacheBuildContext) -> base.BasePrefixCache:
    """Build the cache of one scheduler. Raises ValueError if a setting is not supported."""
    if ctx.disable_radix_cache:
        return default_radix_cache_factory(ctx)
    memory = get_memory()
    refusal = why_not(ctx, memory, get_disagg(), get_parallel(), get_spec())
    if refusal is not None:
        raise ValueError(refusal)
    eviction = chosen_eviction(ctx, memory)
    logger.info("hybridcache: eviction policy %s", eviction)
    host = None
    if ctx.enable_hierarchical_cache:
        fence = ctx.tp_worker.model_runner.forward_stream
        host = HostSettings(memory.hicache_size, memory.hicache_ratio, fence)
    return HybridRadixBackend(ctx.params, ctx.is_hybrid_ssm, eviction, host)


def sizes_in_bytes(params: CacheInitParams, is_hybrid_ssm: bool) -> tuple[int, int]:
    """Return the bytes of one token's KV and of one state, summed over all pipeline stages, because
    all ranks must use equal sizes."""
    kv_cache = params.token_to_kv_pool_allocator.get_kvcache()
    held = kv_cache.get_kv_size_bytes()
    sizes = [(sum(held) if isinstance(held, tuple) else held) // kv_cache.size, 0]
    if is_hybrid_ssm:
        pool = params.req_to_token_pool.mamba_pool
        sizes[1] = pool.get_kv_size_bytes() // (pool.size + 1)
    if params.pp_size > 1:
        summed = torch.tensor(sizes)
        torch.distributed.all_reduce(summed, group=params.pp_cache_group)
        sizes = summed.tolist()
    return max(sizes[0], 1), max(sizes[1], 1)
