"""Reference implementation of ``HybridRadixCache`` with LRU, as plain as possible.

There is no tree, only a list of pieces with their whole prefixes. Every query scans the list, every
use updates the whole path, and "superseded" and "evictable" are computed from their definitions.
Both caches must agree in every result, row and slot.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np

from hybridcache.allocators.moves import Indices, Move
from hybridcache.allocators.pools import ArenaAllocator, PageAllocator, SlotAllocator
from hybridcache.radix.api import Losses
from hybridcache.radix.protocol import Kind
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import GHOST_NODE_BYTES, TOKEN_BYTES

Ids = tuple[int, ...]
Victim = tuple[Kind, Hashable, Ids]


@dataclass(eq=False)
class State:
    """A checkpoint."""

    slot: int
    last_used: int
    serial: int
    uses: int = 0


@dataclass(eq=False)
class Piece:
    """Tokens [start, len(prefix)) of one prefix."""

    namespace: Hashable
    prefix: Ids
    start: int
    rows: list[int] | None
    """KV rows, or None if the piece is a ghost."""
    last_used: int
    serial: int
    uses: int = 0
    state: State | None = None
    lost: bool = False
    locks: int = 0

    @property
    def end(self) -> int:
        """Position after the last token."""
        return len(self.prefix)


@dataclass(frozen=True)
class PlainMatch:
    """Comparable fields of a ``PrefixMatch``."""

    cached_len: int
    kv_match_len: int
    seen_len: int
    slot: int | None
    losses: Losses
    missed_len: int
    """Position of the deepest usable evicted checkpoint, or 0 if there is none."""
    forks: bool


class PlainCache:
    """Reference cache. ``priority_classes`` as in ``CacheConfig``."""

    def __init__(
        self,
        pages: PageAllocator,
        slots: SlotAllocator,
        *,
        grid: int,
        ghost_bytes: int,
        priority_classes: bool = True,
    ) -> None:
        self.pages, self.slots = pages, slots
        self.page_size = pages.page_size
        self.step = lcm(grid, pages.page_size)
        self.ghost_bytes = ghost_bytes
        self.priority_classes = priority_classes
        self.pieces: list[Piece] = []
        if isinstance(pages, ArenaAllocator):
            pages.holders[self] = None
        self.ghosts: list[Piece] = []
        """Oldest first."""
        self.now = 0
        self.num_items = 0
        self.chosen: list[Victim] = []
        """Evicted items, in order."""
        self.script: list[Victim] | None = None
        """Victims of another policy, which replace those of LRU. Each must be evictable."""

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of an emptied slab of the arena. Scans every row of every piece."""
        num_moved = 0
        new_rows = dict(zip(move.src.tolist(), move.dst.tolist(), strict=True))
        for piece in self.pieces:
            for place, row in enumerate(piece.rows or ()):
                if row in new_rows:
                    assert piece.rows is not None
                    piece.rows[place] = new_rows[row]
                    num_moved += 1
        return num_moved

    def _shared(self, piece: Piece, ids: Ids) -> int:
        """Return the length of the common prefix of ``piece`` and ``ids``, in whole pages."""
        length = 0
        for ours, theirs in zip(piece.prefix, ids, strict=False):
            if ours != theirs:
                break
            length += 1
        return length - length % self.page_size

    def _path(self, ids: Ids, namespace: Hashable) -> list[Piece]:
        """Return the pieces that are prefixes of ``ids``, from the root down."""
        whole = [p for p in self.pieces if p.namespace == namespace and p.prefix == ids[: p.end]]
        return sorted(whole, key=lambda p: p.end)

    def _children(self, piece: Piece) -> list[Piece]:
        """Return the resident pieces that continue ``piece``."""
        return [
            p
            for p in self.pieces
            if p.rows is not None
            and p.namespace == piece.namespace
            and p.start == piece.end
            and p.prefix[: p.start] == piece.prefix
        ]

    def is_superseded(self, piece: Piece) -> bool:
        """Return whether the unforked path below has a deeper checkpoint."""
        below = self._children(piece)
        while len(below) == 1:
            if below[0].state is not None:
                return True
            below = self._children(below[0])
        return False

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PlainMatch:
        """See ``HybridRadixCache.match``. Scans every piece: O(pieces * tokens)."""
        ids = tuple(tokens.tolist())
        n = len(ids)
        ours = [p for p in self.pieces if p.namespace == namespace]
        kv_match_len = max((self._shared(p, ids) for p in ours if p.rows is not None), default=0)
        seen_len = max((self._shared(p, ids) for p in ours), default=0)
        usable = [p for p in self._path(ids, namespace) if p.end < n]
        slot, cached_len = None, 0
        for piece in usable:
            if piece.state is not None:
                slot, cached_len = piece.state.slot, piece.end
        lost = [p.end for p in usable if p.lost and p.end > cached_len]
        lost_len = max((end for end in lost if end <= kv_match_len), default=cached_len)
        reachable = min(kv_match_len, n - 1) if n else 0
        grid_len = max(lost_len, reachable - reachable % self.step)
        losses = Losses(
            never_seen=n - seen_len,
            kv_evicted=seen_len - kv_match_len,
            checkpoint_evicted=lost_len - cached_len,
            never_checkpointed=grid_len - lost_len,
            below_grid=kv_match_len - grid_len,
        )
        seen = ids[:seen_len]
        forks = not seen or any(p.end > seen_len and p.prefix[:seen_len] == seen for p in ours)
        missed_len = max(lost, default=0)
        return PlainMatch(cached_len, kv_match_len, seen_len, slot, losses, missed_len, forks)

    def gather(self, tokens: Tokens, length: int, namespace: Hashable) -> list[int]:
        """Return the rows of the first ``length`` tokens, which must be resident."""
        ids = tuple(tokens[:length].tolist())
        rows: list[int] = []
        for piece in self._path(ids, namespace):
            assert piece.rows is not None
            rows += piece.rows
        return rows

    def replace_rows(
        self, tokens: Tokens, length: int, namespace: Hashable, start: int, rows: list[int]
    ) -> list[int]:
        """Exchange the rows from ``start`` on, on the path of the first ``length`` tokens, and
        return the former ones."""
        former = []
        for piece in self._path(tuple(tokens[:length].tolist()), namespace):
            assert piece.rows is not None
            for position in range(piece.start, piece.end):
                if start <= position < start + len(rows):
                    former.append(piece.rows[position - piece.start])
                    piece.rows[position - piece.start] = rows[position - start]
        return former

    def touch(self, tokens: Tokens, cached_len: int, namespace: Hashable) -> None:
        """Count a use of the first ``cached_len`` tokens: of all KV on the path and of the state at
        its end."""
        self.now += 1
        path = self._path(tuple(tokens[:cached_len].tolist()), namespace)
        for piece in path:
            piece.last_used = self.now
            piece.uses += 1
        if path and path[-1].state is not None:
            path[-1].state.last_used = self.now
            path[-1].state.uses += 1

    def piece_at(self, tokens: Tokens, length: int, namespace: Hashable) -> Piece:
        """Return the piece that ends at ``tokens[:length]``."""
        return self._path(tuple(tokens[:length].tolist()), namespace)[-1]

    def _serial(self) -> int:
        self.num_items += 1
        return self.num_items - 1

    def _cut(self, ids: Ids, namespace: Hashable) -> None:
        """Split the piece that contains the end of ``ids``, if there is one."""
        for piece in self.pieces:
            inside = piece.start < len(ids) < piece.end
            if inside and piece.namespace == namespace and piece.prefix[: len(ids)] == ids:
                upper = Piece(namespace, ids, piece.start, None, piece.last_used, 0, piece.uses)
                if piece.rows is not None:
                    cut = len(ids) - piece.start
                    upper.serial = self._serial()
                    upper.rows, piece.rows = piece.rows[:cut], piece.rows[cut:]
                piece.start = len(ids)
                self.pieces.append(upper)
                return

    def insert(
        self,
        tokens: Tokens,
        kv_indices: Indices,
        checkpoints: Sequence[tuple[int, int]],
        namespace: Hashable,
        owned_from: int,
    ) -> tuple[list[int], set[int]]:
        """Return (duplicate rows, rejected slots)."""
        n = len(tokens) - len(tokens) % self.page_size
        ids = tuple(tokens[:n].tolist())
        kv_match_len = min(self.match(tokens[:n], namespace).kv_match_len, n)
        seen_len = min(self.match(tokens[:n], namespace).seen_len, n)
        self._cut(ids[:kv_match_len], namespace)
        if seen_len > kv_match_len:
            self._cut(ids[:seen_len], namespace)
        for ghost in self._path(ids, namespace):
            if ghost.rows is None:
                ghost.rows = kv_indices[ghost.start : ghost.end].tolist()
                ghost.serial = self._serial()
                ghost.uses = 0
                if ghost in self.ghosts:
                    self.ghosts.remove(ghost)
        if seen_len < n:
            rows = kv_indices[seen_len:n].tolist()
            self.pieces.append(Piece(namespace, ids, seen_len, rows, self.now, self._serial()))
        for piece in self._path(ids, namespace):
            piece.last_used = self.now
        rejected = set()
        for position, slot in sorted(checkpoints, reverse=True):
            if position % self.step or not 0 < position <= n:
                rejected.add(slot)
                continue
            self._cut(ids[:position], namespace)
            piece = self._path(ids[:position], namespace)[-1]
            if piece.state is not None:
                rejected.add(slot)
                continue
            piece.state = State(slot, self.now, self._serial())
            piece.lost = False
        return kv_indices[owned_from:kv_match_len].tolist(), rejected

    def candidates(self, kind: Kind | None) -> list[tuple[int, int, int, Kind, Piece]]:
        """Return (priority class, last use, serial, kind, piece) of every evictable item."""
        found: list[tuple[int, int, int, Kind, Piece]] = []
        for piece in self.pieces:
            if piece.rows is None or piece.locks:
                continue
            if kind != "checkpoint" and not self._children(piece):
                dead = self.priority_classes and piece.state is None
                tier = 0 if dead else 2
                found.append((tier, piece.last_used, piece.serial, "kv", piece))
            if kind != "kv" and piece.state is not None:
                tier = 1 if self.priority_classes and self.is_superseded(piece) else 2
                state = piece.state
                found.append((tier, state.last_used, state.serial, "checkpoint", piece))
        return found

    def evict_one(self, kind: Kind | None) -> bool:
        """Evict the first candidate, or the next of ``script``. Return False if there is no
        candidate."""
        candidates = self.candidates(kind)
        if not candidates:
            return False
        first = min(candidates, key=lambda c: c[:3])
        if self.script is not None:
            victim = self.script.pop(0)
            named = [c for c in candidates if (c[3], c[4].namespace, c[4].prefix) == victim]
            assert named, f"{victim} is not evictable"
            assert named[0][0] == first[0], f"{victim} is of class {named[0][0]}, not {first[0]}"
            first = named[0]
        self.chosen.append((first[3], first[4].namespace, first[4].prefix))
        self.drop(first[3], first[4])
        return True

    def _locked_path(self, piece: Piece) -> bool:
        """Return whether ``piece`` or a piece below it is locked."""
        return any(
            p.locks and p.namespace == piece.namespace and p.prefix[: piece.end] == piece.prefix
            for p in self.pieces
        )

    def _evictable(self) -> tuple[int, int]:
        """Return the numbers of tokens and slots without a lock."""
        free = [p for p in self.pieces if p.rows is not None and not self._locked_path(p)]
        slots = sum(p.state is not None and not p.locks for p in self.pieces)
        return sum(p.end - p.start for p in free), slots

    def lock_kv(self, tokens: Tokens, namespace: Hashable) -> Piece | None:
        """Lock the piece that ends where the KV of ``tokens`` ends, or return None without any."""
        length = self.match(tokens, namespace).kv_match_len
        if not length:
            return None
        self._cut(tuple(tokens[:length].tolist()), namespace)
        piece = self.piece_at(tokens, length, namespace)
        piece.locks += 1
        return piece

    def protected(self) -> tuple[int, int]:
        """Return the numbers of locked tokens and slots."""
        locked = [p for p in self.pieces if p.rows is not None and self._locked_path(p)]
        slots = sum(p.state is not None and p.locks > 0 for p in self.pieces)
        return sum(p.end - p.start for p in locked), slots

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        """See ``HybridRadixCache.allocate_kv``. Evicts nothing if not enough is evictable."""
        rows = self.pages.allocate(num_tokens)
        if rows is not None:
            return rows
        wanted = -(-num_tokens // self.page_size) * self.page_size
        tokens, slots = self._evictable()
        budget = self.pages.budget
        if budget is None:
            possible = self.pages.num_free + tokens >= wanted
        else:
            evictable = tokens * self.pages.unit_bytes + slots * self.slots.unit_bytes
            possible = wanted * self.pages.unit_bytes <= budget.free_bytes + evictable
        if not possible:
            return None
        while self.pages.num_free < wanted and self.evict_one("kv" if budget is None else None):
            pass
        return self.pages.allocate(num_tokens)

    def allocate_slot(self) -> int | None:
        """See ``HybridRadixCache.allocate_slot``. Evicts nothing if not enough is evictable."""
        slot = self.slots.allocate()
        if slot is not None:
            return slot
        budget = self.slots.budget
        if budget is None or not self.slots.num_unused:
            self.evict_one("checkpoint")
        else:
            tokens, slots = self._evictable()
            evictable = tokens * self.pages.unit_bytes + slots * self.slots.unit_bytes
            if self.slots.unit_bytes <= budget.free_bytes + evictable:
                while self.slots.num_free < 1 and self.evict_one(None):
                    pass
        return self.slots.allocate()

    def evict(self, num_tokens: int, num_slots: int) -> tuple[int, int]:
        """Return the numbers of tokens and slots freed."""
        rows, slots = self.pages.num_unused, self.slots.num_unused
        while self.pages.num_unused - rows < num_tokens and self.evict_one("kv"):
            pass
        while self.slots.num_unused - slots < num_slots and self.evict_one("checkpoint"):
            pass
        return self.pages.num_unused - rows, self.slots.num_unused - slots

    def reset(self) -> None:
        """Evict everything that is not locked, and delete the ghosts."""
        while self.evict_one(None):
            pass
        for ghost in self.ghosts:
            self.pieces.remove(ghost)
        self.ghosts = []

    def drop(self, kind: Kind, piece: Piece) -> None:
        """Evict the checkpoint or the KV of ``piece``, and pieces that become unreachable."""
        if kind == "checkpoint" and self._children(piece):
            self._drop_state(piece)
        else:
            self._drop_leaf(piece)
        while self._ghost_weight() > self.ghost_bytes:
            self.pieces.remove(self.ghosts.pop(0))

    def _ghost_weight(self) -> int:
        return sum((p.end - p.start) * TOKEN_BYTES + GHOST_NODE_BYTES for p in self.ghosts)

    def _drop_state(self, piece: Piece) -> None:
        assert piece.state is not None
        self.slots.free(piece.state.slot)
        piece.state = None
        piece.lost = True

    def _drop_leaf(self, piece: Piece) -> None:
        if piece.state is not None:
            self._drop_state(piece)
        assert piece.rows is not None
        self.pages.free(np.array(piece.rows, np.int32))
        piece.rows = None
        self.ghosts.append(piece)
        for above in self.pieces:
            above_it = above.end == piece.start and piece.prefix[: above.end] == above.prefix
            if above_it and above.namespace == piece.namespace:
                useless = above.state is None and not above.locks and not self._children(above)
                if above.rows is not None and useless:
                    self._drop_leaf(above)
                return
