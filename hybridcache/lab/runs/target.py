"""Simulated caches: the project's own behind leases, or a rebuilt peer."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np

from hybridcache.allocators.moves import DEVICE
from hybridcache.allocators.pools import ByteBudget, PageAllocator, SlotAllocator, slab_rows
from hybridcache.config import CacheConfig, build_on, build_prefix_cache
from hybridcache.lab.results.result import EvictionRecord, Plain
from hybridcache.lab.rivals.protocol import BaselineConfig, PeerSession, begin
from hybridcache.lab.rivals.systems import BASELINES
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.trace import TraceRequest
from hybridcache.radix.api import Listener, PrefixMatch
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import PromptBoundaries, raise_failure
from hybridcache.radix.tokens import INT32, Tokens
from hybridcache.radix.tree import Checkpoint, Edge, RadixNode


def build_target(scenario: Scenario, unit: int) -> Target:
    """Build an empty target for a cell of ``scenario``, at one size."""
    return (BaselineTarget if scenario.baseline else LeaseTarget)(scenario, unit)


def build_counted(config: CacheConfig) -> HybridRadixCache:
    """Return a cache with all decisions of one in an arena, whose rows never move: a state takes
    the bytes of whole rows (``hybridcache.allocators.pools``)."""
    (row_bytes, state_bytes), page_size = config.unit_bytes, config.page_size
    num_rows = (config.total_bytes or 0) // row_bytes
    num_rows -= num_rows % page_size
    budget, slab = ByteBudget(num_rows * row_bytes), slab_rows(state_bytes, row_bytes, page_size)
    num_slots = num_rows // slab if config.prefix_cache == "hybrid" else 0
    pages = PageAllocator(num_rows, page_size, row_bytes, budget)
    return build_on(config, pages, SlotAllocator(num_slots, slab * row_bytes, budget))


class ItemLog(Listener):
    """Evictions of a cache, and the items that its requests find or miss. Ages in requests."""

    def __init__(self, unit: int) -> None:
        self.unit, self.num_requests = unit, 0
        self.evictions: dict[int, EvictionRecord] = {}
        """Evictions in their order, by the serial number of the item."""

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._note(node.checkpoint)

    def kv_removed(self, node: RadixNode) -> None:
        self._note(node.kv)

    def _note(self, item: Edge | Checkpoint | None) -> None:
        assert item is not None
        label, (span, num_bytes) = getattr(item, "title", ""), item.span_and_size()
        lengths = item.position * self.unit, span * self.unit
        age = self.followed.now - item.last_used  # type: ignore[attr-defined]
        facts = self.num_requests, item.kind, label, item.superseded, item.uses, age
        self.evictions[item.serial] = EvictionRecord(*facts, *lengths, num_bytes)

    def of_match(self, found: PrefixMatch) -> Plain:
        """Return the fields of a ``RequestRecord`` on the items of its match."""
        hit, lost, known = found.resumed, found.missed, dict[str, Any]()
        if hit is not None:
            known |= {"hit": hit.title, "hit_uses": hit.uses}
        if lost is not None and (was := self.evictions.get(lost.serial)) is not None:
            if was.missed is None:
                self.evictions[lost.serial] = was._replace(missed=self.num_requests)
            ago = self.num_requests - was.request
            known |= {"lost": was.label, "lost_uses": was.uses, "lost_age": ago}
        return known


class LeaseTarget:
    """The project's own cache, driven through leases exactly as the engine drives it."""

    def __init__(self, scenario: Scenario, unit: int) -> None:
        geometry = scenario.geometry()
        build = build_counted if scenario.memory == "arena" else build_prefix_cache
        self.cache = cache = build(scenario.cache_config(geometry, unit))
        self.exchange = scenario.exchange(geometry, unit)
        self.placement = scenario.placement(unit)
        self.request_type: type[LeasedRequest] = LeasedRequest
        self.uncomputed = 1 if unit == 1 else 0
        """Tokens at an answer's end that have no KV: the last sampled token is never computed; in
        units of many tokens it is within the last one."""
        self._stateful = bool(geometry.num_linear_layers)
        self._own_slots = None if geometry.checkpoint_bytes is None else count()
        """Slot numbers of running requests, if their states are outside the cache's memory: each
        gets its own, as in the engine."""
        self._has_no_slot = self._stateful and self._own_slots is None and not cache.num_slots
        """True if the pool of states is smaller than one, so that no request fits."""
        self.now_s = 0.0
        """Timestamp of the present request: the clock of policies in replays."""
        cache.policy.set_clock(lambda: self.now_s)
        self.items = ItemLog(unit) if scenario.by_request else None
        if self.items is not None:
            cache.subscribe(self.items)
        self.priority_classes = cache.policy.has_priority_classes
        """True if unreachable KV and superseded checkpoints are evicted before all other items."""

    def begin(self, request: TraceRequest) -> LeasedRequest | None:
        """Match, and take memory for the prompt. None, holding nothing, if it is refused."""
        self.now_s = request.timestamp_s
        if self.items is not None:
            self.items.num_requests += 1
        if self._has_no_slot:
            return None
        asked = LeaseRequest(
            request.tokens,
            request.namespace,
            PromptBoundaries(request.boundaries, request.answer_survives),
            stateful=self._stateful,
            own_slot=None if self._own_slots is None else next(self._own_slots),
            returns_within_s=request.returns_within_s,
            session=str(request.session),
        )
        before = {} if self.exchange is None else self._fetched_bytes()
        lease = Lease.begin(self.cache, self.placement, asked, self.exchange)
        if lease is None:
            return None
        served = self.request_type(self, lease, request)
        if self.items is not None:
            served.found = self.items.of_match(lease.match)
        if self.exchange is not None:
            after = self._fetched_bytes()
            copied = {word: after[word] - before[word] for word in after}
            served.copy_s = self.exchange.copy_seconds(copied)
        if not served.claim():
            lease.abort()
            return None
        return served

    def _fetched_bytes(self) -> dict[str, int]:
        """Return the bytes copied to the device so far, by tier."""
        lower = self.cache.offload
        if lower is None:
            return {}
        rows = lower.copied_rows
        return {word: rows.get((word, DEVICE), 0) * lower.row_bytes for word in lower.names}

    def counters(self) -> dict[str, int]:
        """Return the counters of the cache, in ids and slots. Raises the failure of a user's policy
        in the last request."""
        raise_failure(self.cache.policy.failure)
        lower, arena = self.cache.offload, self.cache.arena
        found = self.cache.stats.as_dict()
        if lower is not None:
            for (src, dst), rows in lower.copied_rows.items():
                found[f"{src}_to_{dst}_bytes"] = rows * lower.row_bytes
        if arena is not None:
            found |= {"moved_slabs": arena.num_moves, "moved_tokens": arena.num_moved_rows}
        return found


class LeasedRequest:
    """One request of a ``LeaseTarget``, which takes memory for a prompt or an answer at once."""

    __slots__ = ("_lease", "_request", "_target", "cached_len", "copy_s", "found", "losses")

    def __init__(self, target: LeaseTarget, lease: Lease, request: TraceRequest) -> None:
        self._target, self._lease, self._request = target, lease, request
        self.cached_len = lease.cached_len
        self.losses = lease.match.losses
        self.found: Plain = {}
        """Facts of the items that it found or missed, if they are kept."""
        self.copy_s = 0.0
        """Seconds of copies from lower tiers that this request waited for."""

    def claim(self) -> bool:
        """Take memory for the prompt. Returns False if it is refused."""
        return self._extend(self.cached_len, len(self._request.tokens))

    def _extend(self, start: int, end: int) -> bool:
        """Take memory for ids ``start`` to ``end`` and their checkpoints. False if refused."""
        if not self._lease.extend(end):
            return False
        self._lease.take_checkpoint_slots(start, end)
        steps = self._target.cache.steps
        if steps.transfers:  # There are no tensors, and no tables of rows.
            steps.take().done()
        elif steps.restores:
            steps.restores.clear()
        return True

    def prefilled(self) -> None:
        """Publish the prompt, which is computed."""
        self._lease.publish(self._request.tokens, len(self._request.tokens))

    def finish(self, output: Tokens, stop_reason: str | None = None) -> None:
        """Publish the answer ``output``, which is decoded, and release all memory. Without a
        ``stop_reason`` it is that of the request."""
        lease, tokens, num_ids = self._lease, self._request.tokens, len(self._request.tokens)
        computed_len = num_ids + len(output) - self._target.uncomputed
        stop_reason = self._request.stop_reason if stop_reason is None else stop_reason
        if computed_len <= num_ids:
            lease.finish(tokens, num_ids, stop_reason=stop_reason)
            return
        # Memory for the whole answer.
        decoded_len = computed_len if self._extend(num_ids, computed_len) else num_ids
        everything = np.empty(num_ids + len(output), INT32)
        everything[num_ids:] = output
        start = lease.published_len  # The lease does not read earlier ids again.
        if start < num_ids:
            everything[start:num_ids] = tokens[start:]
        lease.finish(everything, decoded_len, stop_reason=stop_reason)


# --- Rebuilt competitors ------------------------------------------------------------------------


class BaselineTarget:
    """A rebuilt peer. Its losses are not known."""

    priority_classes = items = None

    def __init__(self, scenario: Scenario, unit: int) -> None:
        geometry = scenario.geometry()
        config = BaselineConfig(
            budget_bytes=scenario.budget_bytes,
            kv_bytes_per_token=geometry.kv_bytes_per_token,
            state_bytes=geometry.state_bytes,
            num_full_layers=geometry.num_full_layers,
            num_linear_layers=geometry.num_linear_layers,
            grid=scenario.grid,
            unit=unit,
            token_flops=geometry.flops_per_token,
            pair_flops=geometry.attention_flops_per_pair,
        )
        self.baseline = BASELINES[str(scenario.baseline)](config)

    def begin(self, request: TraceRequest) -> PeerSession | None:
        facts = request._asdict() | {"clock": lambda: request.timestamp_s}
        return begin(self.baseline, facts.pop("tokens"), facts.pop("namespace"), **facts)

    def counters(self) -> dict[str, int]:
        return {}


Target = LeaseTarget | BaselineTarget
Served = LeasedRequest | PeerSession
