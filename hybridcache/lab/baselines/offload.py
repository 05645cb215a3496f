"""vLLM's native offload: a store of blocks in host memory beside its block pool.

Source: the published behaviour of its ``OffloadingConnector`` and CPU manager at 0.33, defaults.

- A chunk is one block of any group, so a state takes as many as there are state groups.
- *Stored*, as soon as they are computed: whole attention blocks of the *prompt*, and the states at
  block boundaries of the prompt that the device's cache keeps (its retention); never the answer,
  never a part of a block. What the device already had is offered too, unless the request fetched.
- A whole offer is stored or none of it: it may push out all that is older, not what it names.
- *Fetched*: looked up past the device's own hit. Attention must be there block after block, then
  the deepest boundary at which all state groups are; at most ``prompt - 1`` tokens. Attention that
  the device still has past its last state is not counted on. Whatever is there is fetched.
- *Order*: a request's blocks are as recent as the request's end, the deeper the older; a state that
  is hit on the device is not.

Left out: parts of a block (with a match unit; the device's tail is then not added to), copies that
are still under way, ARC, and the tiers below.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Generic, TypeVar

from sortedcontainers import SortedDict

_Key = TypeVar("_Key", bound=Hashable)


class ChunkStore(Generic[_Key]):
    """``num_chunks`` chunks by key, the one to go first in O(log n). Keys can be ordered."""

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
        """A new request's recency, later than all before."""
        self._clock += 1
        return self._clock

    def offer(self, keys: Mapping[_Key, int], recency: int) -> bool:
        """Store what of ``keys`` (key: where it ends) is missing; False: there is no room for all
        of it beside the rest of the offer, and nothing was stored or let go. O(keys log n) and
        the keys that stay."""
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
        """A request of ``recency`` came by ``keys``: those that are here are as recent as it."""
        for key, end in keys.items():
            rank = self._rank_of.get(key)
            if rank is not None and rank[:2] < (recency, -end):
                self._set(key, (recency, -end, key))

    def finish(self, keys: Iterable[_Key]) -> None:
        """A request ended that came by ``keys``, from the head to the tail: the tail is older."""
        for key in reversed(list(keys)):
            if key in self._rank_of:
                self._set(key, (self.tick(), 0, key))

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._rank_of)

    def check(self) -> None:
        """AssertionError unless no more is held than fits, and both indices agree. O(n)."""
        assert len(self._rank_of) <= self.num_chunks, "more chunks than there is room for"
        assert {key: rank for rank, key in self._by_rank.items()} == self._rank_of, "two orders"

    def _set(self, key: _Key, rank: tuple[int, int, _Key]) -> None:
        old = self._rank_of.get(key)
        if old is not None:
            del self._by_rank[old]
        self._rank_of[key] = rank
        self._by_rank[rank] = key
