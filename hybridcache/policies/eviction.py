"""What goes first: words in a dict -> small classes. Plain LRU is the default; others stand in sibling modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heappush, heapreplace

from hybridcache.policies.arc import ARC
from hybridcache.policies.class_age import ClassAge
from hybridcache.policies.clock import Clock
from hybridcache.policies.coverage import Coverage
from hybridcache.policies.fifo import FIFO
from hybridcache.policies.gdsf import GDSF
from hybridcache.policies.hits_per_token import HitsPerToken
from hybridcache.policies.hyperbolic import Hyperbolic
from hybridcache.policies.lfu import LFU
from hybridcache.policies.lhd import LHD
from hybridcache.policies.marconi import Marconi
from hybridcache.policies.own import load_class
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind
from hybridcache.policies.random_choice import Random
from hybridcache.policies.regret import Regret
from hybridcache.policies.s3_fifo import S3Fifo
from hybridcache.policies.sieve import Sieve
from hybridcache.policies.slru import SLRU
from hybridcache.policies.tail_lru import TailLRU
from hybridcache.policies.ttl import TTL
from hybridcache.policies.two_queue import TwoQueue
from hybridcache.policies.w_tiny_lfu import WTinyLFU

Entry = tuple[int, int, Item]
"""(last use when entered, serial, item): what the heaps are ordered by."""


class LRU:
    """Least recently used first, over both kinds; ties go in order of creation.

    Two lazy heaps. ``touch`` does nothing: an item only ever grows younger, so an entry that has become too old is put in
    its place when it comes to the top. ``discard`` only unmarks; stale entries leave at the top, or all at once when a heap
    has doubled. Amortised O(log n) each.

    Any class with these five methods is a policy; ``CacheConfig(eviction="module:Class")`` uses one of your own.
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


EVICTION: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "slru": SLRU,
    "2q": TwoQueue,
    "clock": Clock,
    "sieve": Sieve,
    "s3-fifo": S3Fifo,
    "arc": ARC,
    "w-tinylfu": WTinyLFU,
    "lhd": LHD,
    "gdsf": GDSF,
    "hyperbolic": Hyperbolic,
    "random": Random,
    "hits-per-token": HitsPerToken,
    "tail-lru": TailLRU,
    "ttl": TTL,
    "marconi": Marconi,
    "coverage": Coverage,
    "class-age": ClassAge,
    "regret": Regret,
}
"""Words for ``CacheConfig.eviction``."""

NUMBERED_EVICTION: dict[str, Callable[[float], EvictionPolicy]] = {
    "tail-lru": lambda tokens: TailLRU(int(tokens)),
    "ttl": lambda requests: TTL(int(requests)),
    "marconi": Marconi,
}
"""Words that also take a number, written ``word:number``: the target in tokens, the life in requests, alpha."""


def make_eviction(word: str) -> Callable[[], EvictionPolicy]:
    """The policy class ``word`` names: a word of ``EVICTION``, ``word:number``, or ``module:Class``. ValueError lists the words
    that exist, or the methods that a class lacks."""
    name, _, number = word.partition(":")
    if name in NUMBERED_EVICTION and number.replace(".", "", 1).isdecimal():
        return partial(NUMBERED_EVICTION[name], float(number))
    if ":" in word:
        return load_class(word, EvictionPolicy)
    try:
        return EVICTION[word]
    except KeyError:
        known = ", ".join(sorted(EVICTION))
        raise ValueError(f"unknown eviction policy {word!r}; known: {known}") from None
