"""What goes first: words in a dict -> small classes. Plain LRU is the default; others stand in sibling modules."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace

from hybridcache.policies.own import load_class
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

Entry = tuple[int, int, Item]
"""(last use when entered, serial, item): what the heaps are ordered by."""


class LRU:
    """Least recently used first, over both kinds; ties go in order of creation.

    Two lazy heaps. ``touch`` does nothing: an item only ever grows younger, so an entry that has become too old is put in
    its place when it comes to the top. ``discard`` only unmarks; stale entries leave at the top, or all at once when a heap
    has doubled. Amortised O(log n) each.
    """

    def __init__(self) -> None:
        self._kv: list[Entry] = []
        self._checkpoints: list[Entry] = []
        self._limit = 64
        """Length at which a heap is swept."""

    def add(self, item: Item) -> None:
        item.memo = entry = (item.last_used, item.serial, item)
        heap = self._kv if item.kind == "kv" else self._checkpoints
        heappush(heap, entry)
        if len(heap) > self._limit:
            self._sweep()

    def discard(self, item: Item) -> None:
        item.memo = None

    def touch(self, item: Item) -> None:
        """Nothing to do: see above."""

    def missed(self, item: Item) -> None:
        """Recency does not learn from ghosts."""

    def victim(self, kind: Kind | None) -> Item | None:
        if kind == "kv":
            return _oldest(self._kv)
        checkpoint = _oldest(self._checkpoints)
        if kind == "checkpoint":
            return checkpoint
        kv = _oldest(self._kv)
        if kv is None or checkpoint is None:
            return kv or checkpoint
        kv_age, checkpoint_age = (
            (kv.last_used, kv.serial),
            (checkpoint.last_used, checkpoint.serial),
        )
        return kv if kv_age < checkpoint_age else checkpoint

    def _sweep(self) -> None:
        """Drop stale entries. O(n), as many steps after the last sweep."""
        for heap in (self._kv, self._checkpoints):
            heap[:] = [entry for entry in heap if entry[2].memo is entry]
            heapify(heap)
        self._limit = 64 + 2 * max(len(self._kv), len(self._checkpoints))


def _oldest(heap: list[Entry]) -> Item | None:
    """The least recently used item of ``heap``, after stale entries above it are gone. Amortised O(log n)."""
    while heap:
        entry = heap[0]
        item = entry[2]
        if item.memo is not entry:
            heappop(heap)
        elif item.last_used > entry[0]:
            item.memo = entry = (item.last_used, entry[1], item)
            heapreplace(heap, entry)
        else:
            return item
    return None


EVICTION: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU}
"""Words for ``CacheConfig.eviction``."""


def make_eviction(word: str) -> Callable[[], EvictionPolicy]:
    """The policy class ``word`` names: a word of ``EVICTION``, or ``module:Class``. ValueError lists the words that exist."""
    if ":" in word:
        return load_class(word)
    try:
        return EVICTION[word]
    except KeyError:
        known = ", ".join(sorted(EVICTION))
        raise ValueError(f"unknown eviction policy {word!r}; known: {known}") from None
