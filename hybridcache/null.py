"""NullCache: caching off, same protocol. Every token is computed, nothing is kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from hybridcache.allocators.pages import PageAllocator
from hybridcache.allocators.slots import SlotAllocator
from hybridcache.interface import PrefixCache
from hybridcache.listener import Listener
from hybridcache.results import (
    Eviction,
    InsertResult,
    Losses,
    PrefixMatch,
    Resumable,
)
from hybridcache.stats import CacheStats
from hybridcache.tokens import Indices, Tokens, require_int32


class NullCache(PrefixCache):
    """Hands out KV rows and slots, and forgets. Every verb O(1), but for the rows handed out.

    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(prefix_cache="none", num_kv_tokens=100))
    >>> len(cache.allocate_kv(60)), cache.allocate_kv(60)
    (60, None)
    """

    cached_tokens = 0
    num_checkpoints = 0

    def __init__(self, pages: PageAllocator, slots: SlotAllocator, *, grid: int) -> None:
        self.page_size = pages.page_size
        self.grid = grid
        self.stats = CacheStats()
        self.arena = pages.arena
        self.lower = None
        self._pages = pages
        self._slots = slots

    @property
    def free_tokens(self) -> int:
        return self._pages.num_free

    @property
    def free_slots(self) -> int:
        return self._slots.num_free

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Always a miss: every token counts as never seen. O(1)."""
        require_int32(tokens, "tokens")
        n = len(tokens)
        return PrefixMatch(n, 0, 0, 0, None, Losses(n, 0, 0, 0, 0), None, namespace)

    def fetch(self, resumable: Resumable) -> bool:
        """Nothing is anywhere: False. O(1)."""
        return False

    def continuation(
        self, tokens: Tokens, max_tokens: int, namespace: Hashable = None, after: Any = None
    ) -> Tokens:
        """Nothing is remembered: always empty. O(1)."""
        return tokens[:0]

    def gather(self, node: Any) -> Indices:
        return self._pages.free_rows()[:0]

    def touch(self, match: PrefixMatch) -> None:
        self.stats.record(match)

    def lock(self, node: Any) -> None:
        """There is nothing to protect; the receipt is None."""
        return None

    def lock_kv(self, tokens: Tokens, namespace: Hashable = None) -> tuple[None, None]:
        """Return (None, None): nothing is cached."""
        return None, None

    def unlock(self, receipt: None) -> None:
        return None

    def insert(
        self,
        tokens: Tokens,
        kv_indices: Indices,
        checkpoints: Sequence[tuple[int, int]] = (),
        namespace: Hashable = None,
        owned_from: int = 0,
        labels: Sequence[str] = (),
        after: Any = None,
    ) -> InsertResult:
        """Nothing is taken: all rows and slots stay the caller's."""
        require_int32(tokens, "tokens")
        require_int32(kv_indices, "KV indices")
        return InsertResult(0, kv_indices[:0], tuple(slot for _, slot in checkpoints), None)

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        """Rows that are free; None, counted as a refusal, where there are too few: nothing can be
        evicted."""
        rows = self._pages.allocate(num_tokens)
        self.stats.refusals += rows is None
        return rows

    def allocate_slot(self) -> int | None:
        """A slot that is free; None, counted as a refusal, where there is none."""
        slot = self._slots.allocate()
        self.stats.refusals += slot is None
        return slot

    def free_kv(self, kv_indices: Indices) -> None:
        self._pages.free(kv_indices)

    def free_slot(self, slot: int) -> None:
        self._slots.free(slot)

    def evict(self, num_tokens: int = 0, num_slots: int = 0) -> Eviction:
        """Frees nothing: nothing is kept."""
        return Eviction(0, 0)

    def reset(self) -> None:
        return None

    def subscribe(self, listener: Listener) -> None:
        """There is nothing to tell, now or later."""

    def unsubscribe(self, listener: Listener) -> None:
        return None

    def render(self, form: str = "text", max_nodes: int = 1000) -> str:
        """There is no tree: the empty picture."""
        return ""

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        self._pages.check()
        self._slots.check()
        assert held_tokens is None or self._pages.num_taken == held_tokens, "KV rows leaked"
        assert held_slots is None or self._slots.num_taken == held_slots, "slots leaked"
