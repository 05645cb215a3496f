"""What the engine can say about its cache at any moment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.schedule.cache_manager import CacheManager


@dataclass(frozen=True, slots=True)
class PoolReport:
    """Where the units of one pool are: KV rows, or state slots. ``free + cached + held == total``."""

    total: int
    free: int
    cached: int
    held: int


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Sizes, rates and losses of one engine's cache."""

    prefix_cache: str
    eviction: str
    checkpoints: tuple[str, ...]
    grid: int
    page_size: int
    kv: PoolReport
    slots: PoolReport
    num_running: int
    num_waiting: int
    token_hit_rate: float
    request_hit_rate: float
    usage: dict[str, int]
    """Counters since the start: requests, hits, prompt and cached tokens, tokens lost by cause, and what came and went."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def cache_report(
    config: EngineConfig,
    kind: str,
    manager: CacheManager,
    *,
    num_kv_tokens: int,
    num_slots: int,
    num_running: int,
    num_waiting: int,
) -> CacheReport:
    """Read off the allocators, the tree and the leases; ``kind`` is the cache in use. O(running requests + namespaces)."""
    cache = manager.cache
    held_tokens, held_slots = manager.held()
    total = cache.stats.total
    return CacheReport(
        prefix_cache=kind,
        eviction=config.eviction,
        checkpoints=config.checkpoints,
        grid=cache.grid,
        page_size=cache.page_size,
        kv=PoolReport(num_kv_tokens, cache.free_tokens, cache.cached_tokens, held_tokens),
        slots=PoolReport(num_slots, cache.free_slots, cache.num_checkpoints, held_slots),
        num_running=num_running,
        num_waiting=num_waiting,
        token_hit_rate=total.token_hit_rate,
        request_hit_rate=total.request_hit_rate,
        usage=cache.stats.as_dict(),
    )
