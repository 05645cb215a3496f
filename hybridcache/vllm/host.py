"""``survival`` for vLLM's host memory: a ``CachePolicy`` for ``cache_policy_module_path``.

vLLM stores blocks in host memory in *chunks*. A chunk has a key: the hash of the prefix that it
ends, and the number of its cache group. The policy sees no tokens and no layers, so it learns both
from the requests that end:

- Chunks of a request are a path, by their positions. A tree node's token is the start of a hash.
- Groups whose chunks are missing at some positions hold states; the others hold attention.

The scheduler class is not needed: any vLLM with ``OffloadingConnector`` can use this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.kv_offload.base import get_offload_block_hash, get_offload_group_idx, make_offload_key
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.radix.api import Listener
from hybridcache.radix.tokens import INT32, Tokens

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext
    from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

    from hybridcache.radix.tree import RadixNode


class SurvivalCachePolicy(CachePolicy, Listener):
    """Evict chunks of host memory in the order of ``survival``.

    Attention chunks behind the last state of a path go first, then superseded states, then the rest
    by the policy. Chunks that a running request has stored have no place in the tree yet, and are
    evicted only if nothing else is left.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.clear()

    def clear(self) -> None:
        self.chunks: dict[OffloadKey, ChunkStatus] = {}
        """All chunks, the oldest first."""
        self._evictable: set[OffloadKey] = set()
        self._groups: set[int] = set()
        """Numbers of the groups seen so far."""
        self._states: set[int] = set()
        """Numbers of the groups that hold states."""
        self._plant()

    def _plant(self) -> None:
        """Begin with an empty tree. All chunks have no place in it, and go first."""
        config = CacheConfig(
            prefix_cache="hybrid" if self._states else "radix",
            num_kv_tokens=self.cache_capacity + 1,
            num_slots=self.cache_capacity + 1,
            kv_bytes_per_token=max(len(self._groups - self._states), 1),
            state_bytes=max(len(self._states), 1),
            grid=1,
        )
        self.cache = build_prefix_cache(config)
        self.followed = None  # The former cache is forgotten.
        self.cache.subscribe(self)
        self.cache.policy.set_clock(lambda: float(self.cache.now))
        self._homes: dict[bytes, tuple[bytes | None, int]] = {}
        """Hash before it, and length of the path, of each hash in the tree."""
        self._hash_of: dict[int, bytes] = {}
        """Hash of each row."""
        self._first: dict[OffloadKey, None] = dict.fromkeys(self.chunks)
        """Chunks that the tree has given up, the next victims first."""

    # --- vLLM's interface -------------------------------------------------------------------------

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self.chunks.get(key)

    def insert(
        self, key: OffloadKey, chunk: ChunkStatus, req_context: ReqContext | None = None
    ) -> None:
        self.chunks[key] = chunk
        if chunk.ref_cnt == 0:
            self._evictable.add(key)

    def remove(self, key: OffloadKey) -> None:
        del self.chunks[key]
        self._evictable.discard(key)
        self._first.pop(key, None)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        path = self._path(map(get_offload_block_hash, keys))
        if len(path):
            self.cache.touch(self.cache.match(np.append(path, np.int32(0))))

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Do nothing: ghosts are counted when the request ends."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """Give the chunks of a request their places in the tree, and count its use."""
        position = req_context.get_offload_key_position
        keys = [*chain.from_iterable(key_groups)]
        if None in map(position, keys):
            return  # Not of a version that is supported: they remain without a place.
        found: defaultdict[bytes, set[int]] = defaultdict(set)
        for key in sorted(keys, key=position):
            found[get_offload_block_hash(key)].add(get_offload_group_idx(key))
        self._learn(found.values())
        attention = self._groups - self._states
        path = [name for name, of in found.items() if attention <= of or name in self._homes]
        whole = [*takewhile(lambda name: self._has(name, attention), path)]
        if whole:
            self._publish(whole)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        if n > len(self._evictable) - sum(key in self._evictable for key in protected):
            return None
        victims: list[tuple[OffloadKey, ChunkStatus]] = []
        candidates = self._candidates()
        with self.cache.lock_kv(self._path(map(get_offload_block_hash, protected))):
            while len(victims) < n:
                key = next(candidates)
                if key in self._evictable and key not in protected:
                    victims.append((key, self.chunks[key]))
                    self.remove(key)
        return victims

    def _candidates(self) -> Iterator[OffloadKey]:
        """Yield the chunks that the tree gives up, the next victims first, and then all others."""
        yield from list(self._first)
        while self.cache.evict_next():
            yield from list(self._first)
        yield from list(self.chunks)

    def mark_evictable(self, key: OffloadKey) -> None:
        self._evictable.add(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        self._evictable.discard(key)

    # --- Tree -------------------------------------------------------------------------------------

    def _learn(self, sets: Collection[set[int]]) -> None:
        """Learn the kinds of the groups from those that have a chunk at each position."""
        groups = self._groups.union(*sets)
        states = {group for group in groups if any(group not in one for one in sets)}
        if states == groups:  # Parts of a request, which tell nothing.
            states = set()
        if groups != self._groups or not states <= self._states:
            self._groups, self._states = groups, self._states | states
            self._plant()

    def _path(self, names: Iterable[bytes]) -> Tokens:
        """Return the tokens of the longest path in the tree that ends in one of the hashes, or
        none."""
        known = [name for name in names if name in self._homes]
        end = max(known, key=lambda name: self._homes[name][1], default=None)
        path = list[bytes]()
        while end is not None:
            path.append(end[:4])
            end = self._homes[end][0]
        return np.frombuffer(b"".join(path[::-1]), INT32)

    def _has(self, name: bytes, groups: Iterable[int]) -> bool:
        """Return whether the chunks of ``groups`` with the hash ``name`` are there."""
        return all(make_offload_key(name, group) in self.chunks for group in groups)

    def _publish(self, names: Sequence[bytes]) -> None:
        """Store a path whose attention chunks are all there, and its states."""
        cache, homes = self.cache, self._homes
        known = max((i for i, name in enumerate(names, 1) if name in homes), default=0)
        before = names[known - 1] if known else None
        tokens = self._path(names)
        first, new = len(tokens), names[known:]
        tokens = np.append(tokens, np.array(new, "S4").view(INT32))
        match = cache.match(np.append(tokens, np.int32(0)))
        if match.kv_match_len != first:
            return  # Another path has the same tokens: these chunks remain without a place.
        cache.touch(match)
        rows = cache.allocate_kv(len(new))
        assert rows is not None, "there is a row for each chunk"
        self._hash_of |= zip(rows.tolist(), new, strict=True)
        for length, name in enumerate(new, first + 1):
            homes[name], before = (before, length), name
        saves = []
        for name in names if self._states else ():
            if self._has(name, self._states):
                slot = cache.allocate_slot()
                assert slot is not None, "there are two slots for each state"
                saves.append((homes[name][1], slot))
        rows = np.append(np.zeros(first, INT32), rows)  # The first ones are not read.
        result = cache.insert(tokens, rows, saves, None, first)
        for slot in result.rejected_slots:  # The tree had these states.
            cache.free_slot(slot)
        for name in names:
            for group in self._groups:
                self._first.pop(make_offload_key(name, group), None)

    def kv_removed(self, node: RadixNode) -> None:
        assert node.kv is not None
        for row in node.kv.indices.tolist():
            name = self._hash_of.pop(row)
            del self._homes[name]
            self._give_up(name, self._groups - self._states)

    def checkpoint_removed(self, node: RadixNode) -> None:
        assert node.kv is not None
        self._give_up(self._hash_of[int(node.kv.indices[-1])], self._states)

    def _give_up(self, name: bytes, groups: Iterable[int]) -> None:
        for group in groups:
            key = make_offload_key(name, group)
            if key in self.chunks:
                self._first[key] = None

    def check(self) -> None:
        """Check the invariants. O(chunks)."""
        self.cache.check(held_tokens=0, held_slots=0)
        assert self._evictable <= self.chunks.keys() and self._first.keys() <= self.chunks.keys()
        assert len(self.chunks) <= self.cache_capacity
        assert self._homes.keys() == {*self._hash_of.values()}
        for before, length in self._homes.values():
            assert length == (self._homes[before][1] if before is not None else 0) + 1
