"""What the engine can say about its cache at any moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.memory import MemorySizes
from hybridcache.scheduling.planner import AdmissionReport


@dataclass(frozen=True, slots=True)
class PoolReport:
    """Where the units of one pool are: KV rows, state slots, or bytes. ``free + cached + held ==
    total``.

    In an arena what is free is free for rows and slots alike, so their totals change as it is used;
    those of the bytes do not.
    """

    total: int
    free: int
    cached: int
    held: int


@dataclass(frozen=True, slots=True)
class TierReport:
    """One memory below the device's, in bytes. ``free + cached == total``."""

    tier: str
    """``host`` or ``disk``."""
    total: int
    free: int
    cached: int
    """Of what left the memory above and is nowhere nearer."""
    taken_in: int
    """That came from above since the start."""
    fetched: int
    """That went back to the device since the start."""


@dataclass(frozen=True, slots=True)
class FolderReport:
    """The folder in which all that is cached is kept too, in bytes."""

    total: int
    """The most that it may take."""
    kept: int
    """Of what can be read: what lies in a nearer memory too is counted with the rest."""
    is_written: bool
    """False if another engine writes to it, or while ``problem`` says why not."""
    skipped: int
    """Runs and states not written since the start, for lack of room or time."""
    errors: int = 0
    """Operations that the file system refused since the start."""
    problem: str | None = None
    """Why the folder cannot be written, or not be used at all, at present. None if it can."""


@dataclass(frozen=True, slots=True)
class LowerReport:
    """What lies below the device's memory."""

    tiers: tuple[TierReport, ...]
    """The nearest first."""
    folder: FolderReport | None


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Sizes, rates and losses of one engine's cache."""

    prefix_cache: str
    eviction: str
    checkpoints: tuple[str, ...]
    grid: int
    page_size: int
    memory: str
    """``arena``: KV rows and state slots are the same bytes; ``pools``: each has its own."""
    bytes: PoolReport
    kv: PoolReport
    slots: PoolReport
    num_running: int
    num_waiting: int
    token_hit_rate: float
    request_hit_rate: float
    usage: dict[str, int]
    """Counters since the start: requests, hits, prompt and cached tokens, tokens lost by cause, and
    what came and went."""
    admission: str
    """The policy that orders waiting requests."""
    queue: AdmissionReport
    transfers: dict[str, int] | None = None
    """What went to or came from other engines since the start, by the names of
    ``TransferCounts``; None: nothing does."""

    lower: LowerReport | None = None
    """None: there is nothing below the device's memory."""
    draft_index_bytes: int = 0
    """Host memory that drafters take for their indices of texts."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def cache_report(
    config: EngineConfig,
    kind: str,
    manager: CacheManager,
    memory: MemorySizes,
    *,
    num_running: int,
    num_waiting: int,
    queue: AdmissionReport,
    optional: Mapping[str, Any],
) -> CacheReport:
    """Read the allocators, the tree and the leases. ``kind`` is the cache in use, ``optional`` has
    the fields that plugins report. O(running requests + namespaces)."""
    cache = manager.cache
    held_tokens, held_slots = manager.held()
    kv = _pool(cache.free_tokens, cache.cached_tokens, held_tokens)
    slots = _pool(cache.free_slots, cache.num_checkpoints, held_slots)
    total = cache.stats.total
    return CacheReport(
        prefix_cache=kind,
        eviction=config.eviction,
        checkpoints=config.checkpoints,
        grid=cache.grid,
        page_size=cache.page_size,
        memory=memory.memory,
        bytes=_bytes(memory, kv, slots),
        kv=kv,
        slots=slots,
        num_running=num_running,
        num_waiting=num_waiting,
        token_hit_rate=total.token_hit_rate,
        request_hit_rate=total.request_hit_rate,
        usage=cache.stats.as_dict(),
        admission=str(config.admission),
        queue=queue,
        **optional,
    )


def _pool(free: int, cached: int, held: int) -> PoolReport:
    return PoolReport(free + cached + held, free, cached, held)


def _bytes(memory: MemorySizes, kv: PoolReport, slots: PoolReport) -> PoolReport:
    """Of both together; what is free of an arena counts once."""

    def of(num_rows: int, num_slots: int) -> int:
        return num_rows * memory.row_bytes + num_slots * memory.slot_bytes

    free = of(kv.free, 0 if memory.slab_rows else slots.free)
    return _pool(free, of(kv.cached, slots.cached), of(kv.held, slots.held))
