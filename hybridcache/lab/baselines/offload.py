"""vLLM's native offload: a store of blocks in host memory next to its block pool.

Source: the published behaviour of its ``OffloadingConnector`` and CPU manager at 0.33, defaults.

- A chunk is one block of any group, so a state takes as many as there are state groups.
- *Stored* as soon as they are computed: whole attention blocks of the *prompt*, and the states at
  block boundaries of the prompt that the device's cache keeps (its retention). Answers and parts of
  a block are never stored. Blocks that the device already had are offered too, unless the request
  loaded some.
- An offer is stored whole or not at all. It may evict older entries, but none that it names.
- *Loaded*: looked up past the device's own hit. Attention must be present block after block, up to
  the deepest boundary that has all state groups; at most ``prompt - 1`` tokens. Attention that the
  device still has past its last state does not count. Everything found is loaded.
- *Order*: a request's blocks are as recent as the request's end, and deeper blocks are older. A
  state that is hit on the device is not refreshed.

Left out: parts of a block (with a match unit; the device's tail is then not extended), copies that
are still in progress, ARC, and the tiers below.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Generic, TypeVar

from sortedcontainers import SortedDict

_Key = TypeVar("_Key", bound=Hashable)


class ChunkStore(Generic[_Key]):
    """``num_chunks`` chunks by key; the next to be evicted is found in O(log n). Keys must be
    orderable."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.num_stored = 0
        """Chunks written so far."""
        self._rank_of: dict[_Key, tuple[int, int, _Key]] = {}
        self._by_rank: SortedDict[tuple[int, int, _Key], _Key] = SortedDict()
        self._clock = 0

    def __contains__(self, key: _Key) -> bool:
        return key in self._rank_of

    def __len__(self) -> int:
        return len(self._rank_of)

    def tick(self) -> int:
        """Return the recency of a new request, later than all before."""
        self._clock += 1
        return self._clock

    def offer(self, keys: Mapping[_Key, int], recency: int) -> bool:
        """Store the missing ones of ``keys``, a map from key to end position. Returns False, and
        stores and evicts nothing, if there is no room for them next to the rest of the offer.
        O(keys log n + keys that are kept)."""
        self.use(keys, recency)
        missing = [key for key in keys if key not in self._rank_of]
        if len(keys) > self.num_chunks:
            return not missing
        excess = len(self._rank_of) + len(missing) - self.num_chunks
        if excess > 0:
            old = (key for key in self._by_rank.values() if key not in keys)
            for key in list(islice(old, excess)):
                del self._by_rank[self._rank_of.pop(key)]
        for key in missing:
            self._set(key, (recency, -keys[key], key))
        self.num_stored += len(missing)
        return True

    def use(self, keys: Mapping[_Key, int], recency: int) -> None:
        """Refresh the stored ones of ``keys`` to the ``recency`` of a request that used them."""
        for key, end in keys.items():
            rank = self._rank_of.get(key)
            if rank is not None and rank[:2] < (recency, -end):
                self._set(key, (recency, -end, key))

    def finish(self, keys: Iterable[_Key]) -> None:
        """Record the end of a request that used ``keys``, ordered from head to tail: the tail is
        older."""
        for key in reversed(list(keys)):
            if key in self._rank_of:
                self._set(key, (self.tick(), 0, key))

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._rank_of)

    def check(self) -> None:
        """Check that no more is stored than fits and that both indices agree. Raises AssertionError
        otherwise. O(n)."""
        assert len(self._rank_of) <= self.num_chunks, "more chunks than there is room for"
        assert {key: rank for rank, key in self._by_rank.items()} == self._rank_of, "two orders"

    def _set(self, key: _Key, rank: tuple[int, int, _Key]) -> None:
        old = self._rank_of.get(key)
        if old is not None:
            del self._by_rank[old]
        self._rank_of[key] = rank
        self._by_rank[rank] = key
