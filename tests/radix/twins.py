"""The cache and its plain twin, driven together: each operation must give the same result on
both."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.allocators.pools import ArenaAllocator
from hybridcache.config import CacheConfig, build_policy, build_prefix_cache
from hybridcache.policies.registry import make_eviction
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.cache import HybridRadixCache, LockHandle
from hybridcache.radix.protocol import EvictionPolicy, Item, Kind
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import RadixNode
from tests.plain_cache import Piece, PlainCache, Victim


class CandidateLedger(EvictionPolicy):
    """Eviction policy that forwards all calls and checks that no item is added or discarded
    twice."""

    def __init__(self, inner: EvictionPolicy) -> None:
        self.inner = inner
        self.held: set[Any] = set()
        self.discarded: dict[Item, bool] = {}
        """Value of ``evicted`` for each item discarded since the last check."""
        self.ghost_hits: list[Item] = []
        """Items passed to ``on_ghost_hit``."""

    def add(self, item: Item) -> None:
        assert item not in self.held, f"{item} added twice"
        self.held.add(item)
        self.inner.add(item)

    def discard(self, item: Item, evicted: bool) -> None:
        assert item in self.held, f"{item} discarded but never added"
        self.held.remove(item)
        self.discarded[item] = evicted
        self.inner.discard(item, evicted)

    def touch(self, item: Item) -> None:
        assert item in self.held, f"{item} touched but is not a candidate"
        self.inner.touch(item)

    def on_ghost_hit(self, item: Item) -> None:
        self.ghost_hits.append(item)
        self.inner.on_ghost_hit(item)

    def on_ghost_hit_above(self, item: Item) -> None:
        self.inner.on_ghost_hit_above(item)

    def candidates(self) -> Iterable[Item] | None:
        return self.inner.candidates()

    def victim(self, kind: Kind | None) -> Item | None:
        item = self.inner.victim(kind)
        assert item is None or item in self.held, f"{item} is not a candidate"
        return item


class VictimLog:
    """Victims of a cache from now on."""

    def __init__(self, cache: HybridRadixCache) -> None:
        self.chosen_items: list[Victim] = []
        self._victim = cache.policy.victim
        vars(cache.policy)["victim"] = self._note

    def _note(self, kind: Kind | None) -> Item | None:
        item = self._victim(kind)
        if item is not None and not item.node.locks:
            self.chosen(item)
        return item

    def chosen(self, item: Any) -> None:
        self.chosen_items.append((item.kind, *prefix_of(item.node)))


def prefix_of(node: RadixNode) -> tuple[Hashable, tuple[int, ...]]:
    """Return (namespace, tokens from the root to the end of ``node``)."""
    ids: list[int] = []
    while node.parent is not None:
        ids = node.tokens.tolist() + ids
        node = node.parent
    return node.key, tuple(ids)


@dataclass(eq=False)
class Request:
    """Request in flight on both caches, with the rows and locks that it holds."""

    tokens: Tokens
    namespace: Hashable
    match: PrefixMatch
    handle: Any
    node: Any
    piece: Any
    rows: np.ndarray
    published_len: int


class HeldRows:
    """Rows held by the caller of both twins. Moves of the cache's arena come first and rename
    them."""

    def __init__(self, twins: Twins) -> None:
        self.twins = twins

    def rows_moved(self, move: Move) -> int:
        twins = self.twins
        twins.moves.append(move)
        held = sum(len(move.rename(rows)) for rows in twins.held_rows)
        for request in twins.requests:
            held += sum(move.rename(request.rows) >= request.published_len)
        return held


class PlainHeldRows(HeldRows):
    """The same rows in the plain twin's arena. The same move has renamed them already."""

    def rows_moved(self, move: Move) -> int:
        twins = self.twins
        first = twins.moves.pop(0)
        assert [part.tolist() for part in first[1:]] == [part.tolist() for part in move[1:]]
        held = [request.rows[request.published_len :] for request in twins.requests]
        return sum(int(np.isin(rows, move.dst).sum()) for rows in held + twins.held_rows)


class Twins:
    """The cache and its plain twin. Each operation asserts that both agree."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.cache = build_prefix_cache(config)
        assert isinstance(self.cache, HybridRadixCache)
        self.ledger = CandidateLedger(build_policy(config))
        self.cache.policy = self.ledger
        self.log = VictimLog(self.cache)
        other = build_prefix_cache(config)
        assert isinstance(other, HybridRadixCache)
        orders_classes = make_eviction(config.eviction)().orders_classes
        self.plain = PlainCache(
            other._pages,
            other._slots,
            grid=config.grid,
            ghost_bytes=config.ghost_bytes,
            priority_classes=config.priority_classes and not orders_classes,
        )
        self.held_slots: list[int] = []
        self.held_rows: list[np.ndarray] = []
        self.requests: list[Request] = []
        self.locks: list[tuple[LockHandle, Piece | None]] = []
        """Locks of callers without a request."""
        self.moves: list[Move] = []
        """Moves of the cache that the plain twin has not repeated yet."""
        if config.memory == "arena":
            self.holders = HeldRows(self), PlainHeldRows(self)
            self.arena(self.cache).holders[self.holders[0]] = None
            self.arena(other).holders[self.holders[1]] = None

    @staticmethod
    def arena(cache: HybridRadixCache) -> ArenaAllocator:
        assert cache.arena is not None
        return cache.arena

    def _follow(self) -> None:
        """Pass the cache's last victims to the plain twin. It finds those of LRU itself."""
        if self.config.eviction != "lru":
            done = len(self.plain.chosen)
            self.plain.script = self.log.chosen_items[done:]

    def _agree_on_victims(self) -> None:
        assert self.log.chosen_items == self.plain.chosen

    def match(self, tokens: Tokens, namespace: Hashable) -> PrefixMatch:
        found = self.cache.match(tokens, namespace)
        plain = self.plain.match(tokens, namespace)
        assert found.cached_len == plain.cached_len
        assert found.kv_match_len == plain.kv_match_len
        assert found.seen_len == plain.seen_len
        assert found.forks == plain.forks
        assert found.checkpoint == plain.slot
        assert found.losses == plain.losses
        assert sum(found.losses) + found.cached_len == len(tokens)
        assert (found.missed.position if found.missed else 0) == plain.missed_len
        rows = self.cache.gather(found.node).tolist()
        assert rows == self.plain.gather(tokens, plain.cached_len, namespace)
        return found

    def allocate_kv(self, num_tokens: int) -> np.ndarray | None:
        rows = self.cache.allocate_kv(num_tokens)
        self._follow()
        plain = self.plain.allocate_kv(num_tokens)
        self._agree_on_victims()
        assert (rows is None) == (plain is None)
        assert rows is None or plain is None or rows.tolist() == plain.tolist()
        return rows

    def allocate_slot(self) -> int | None:
        slot = self.cache.allocate_slot()
        self._follow()
        assert slot == self.plain.allocate_slot()
        self._agree_on_victims()
        if slot is not None:
            self.held_slots.append(slot)
        return slot

    def free_slot(self, slot: int) -> None:
        self.held_slots.remove(slot)
        self.cache.free_slot(slot)
        self.plain.slots.free(slot)

    def free_kv(self, rows: np.ndarray) -> None:
        self.cache.free_kv(rows)
        self.plain.pages.free(rows)

    def evict(self, num_tokens: int, num_slots: int) -> None:
        eviction = self.cache.evict(num_tokens, num_slots)
        self._follow()
        assert tuple(eviction) == self.plain.evict(num_tokens, num_slots)
        self._agree_on_victims()

    def lock_kv(self, tokens: Tokens, namespace: Hashable) -> None:
        """Lock the cached KV of ``tokens``, which may end inside an edge and without a state."""
        handle = self.cache.lock_kv(tokens, namespace)
        piece = self.plain.lock_kv(tokens, namespace)
        assert (handle.node is None) == (piece is None)
        assert piece is None or handle.node.end == piece.end
        self.locks.append((handle, piece))

    def unlock(self, number: int) -> None:
        self._unlock(*self.locks.pop(number))

    def protected(self) -> None:
        assert tuple(self.cache.protected()) == self.plain.protected()

    def reset(self) -> None:
        self.cache.reset()
        self._follow()
        self.plain.reset()
        self._agree_on_victims()

    def begin(self, tokens: Tokens, namespace: Hashable) -> Request | None:
        """Match, lock, touch and allocate rows for the rest. None if refused; nothing is held."""
        match = self.match(tokens, namespace)
        handle = self.cache.lock(match.node)
        piece = self._lock_piece(tokens, match.cached_len, namespace)
        self.ledger.ghost_hits.clear()
        self.cache.touch(match)
        assert self.ledger.ghost_hits == ([] if match.missed is None else [match.missed])
        self.plain.touch(tokens, match.cached_len, namespace)
        new = self.allocate_kv(len(tokens) - match.cached_len)
        if new is None:
            self._unlock(handle, piece)
            return None
        rows = np.concatenate([self.cache.gather(match.node), new])
        request = Request(
            tokens, namespace, match, handle, match.node, piece, rows, match.cached_len
        )
        self.requests.append(request)
        return request

    def _lock_piece(self, tokens: Tokens, end: int, namespace: Hashable) -> Piece | None:
        """Lock the plain twin's piece that ends at ``end``. Return None for an empty prefix."""
        if not end:
            return None
        piece = self.plain.piece_at(tokens, end, namespace)
        piece.locks += 1
        return piece

    def _unlock(self, handle: Any, piece: Any) -> None:
        self.cache.unlock(handle)
        self.cache.unlock(handle)
        if piece is not None:
            piece.locks -= 1

    def publish(self, request: Request, length: int, positions: list[int], from_node: bool) -> None:
        """Insert the first ``length`` tokens with checkpoints at ``positions``, and lock their
        end."""
        length = max(length, request.published_len)
        saved = [(position, self.allocate_slot()) for position in positions]
        offered = [(position, slot) for position, slot in saved if slot is not None]
        tokens, namespace = request.tokens[:length], request.namespace
        result = self.cache.insert(
            tokens,
            request.rows[:length],
            offered,
            namespace,
            request.published_len,
            after=request.node if from_node else None,
        )
        duplicates, rejected = self.plain.insert(
            tokens, request.rows[:length], offered, namespace, request.published_len
        )
        assert result.inserted_len == length - length % self.config.page_size
        assert result.duplicates.tolist() == duplicates
        assert set(result.rejected_slots) == rejected
        for _, slot in offered:
            if slot in rejected:
                self.free_slot(slot)
            else:
                self.held_slots.remove(slot)
        handle = self.cache.lock(result.node)
        piece = self._lock_piece(tokens, result.inserted_len, namespace)
        self._unlock(request.handle, request.piece)
        request.handle, request.piece, request.node = handle, piece, result.node
        self.free_kv(result.duplicates)
        rows = self.cache.gather(result.node)
        assert rows.tolist() == self.plain.gather(tokens, result.inserted_len, namespace)
        request.rows[: len(rows)] = rows
        request.published_len = result.inserted_len

    def replace_rows(self, request: Request, start: int, num_tokens: int) -> None:
        """Point some of the published tokens of ``request`` to newly allocated rows. The caller
        holds the former rows from then on."""
        rows = self.allocate_kv(num_tokens)
        if rows is None:
            return
        former = self.cache.replace_rows(request.node, start, rows)
        plain = self.plain.replace_rows(
            request.tokens, request.published_len, request.namespace, start, rows.tolist()
        )
        assert former.tolist() == plain
        self.held_rows.append(former)

    def end(self, request: Request) -> None:
        """Unlock, and free all rows that were not published."""
        self.requests.remove(request)
        self._unlock(request.handle, request.piece)
        self.free_kv(request.rows[request.published_len :])

    def check(self) -> None:
        """Check the cache's invariants, the number of held rows and slots, and the policy's
        items."""
        held = sum(len(request.rows) - request.published_len for request in self.requests)
        held += sum(map(len, self.held_rows))
        self.cache.check(held_tokens=held, held_slots=len(self.held_slots))
        assert not self.moves, "the plain twin did not repeat a move"
        assert self.ledger.held == set(self.cache.candidates())
        for item, evicted in self.ledger.discarded.items():
            is_gone = item not in (item.node.kv, item.node.checkpoint)
            assert evicted is is_gone, f"{item} was discarded with evicted={evicted}"
        self.ledger.discarded.clear()
