"""Caches and leases that find misuse when it happens: ``CacheConfig(debug=True)``.

A wrong call raises before it changes anything, and a lease or lock that is dropped before its end
warns. ``check`` also finds locks that were dropped.
The measured calls take at most twice their time. Ordinary caches have nothing of this.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import wraps
from inspect import isfunction
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np

from hybridcache.allocators.moves import Indices, Move
from hybridcache.radix.api import InsertResult
from hybridcache.radix.cache import HybridRadixCache, LockHandle
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import PlacementPolicy
from hybridcache.radix.tiers import TieredRadixCache
from hybridcache.radix.tokens import INT32, Tokens, require_int32
from hybridcache.radix.tree import NodeHandle, RadixNode

FREE, HELD, LEASED, CACHED = 0, 1, 2, 3
"""Owners of a row: none, a caller of ``allocate_kv``, a lease, the tree."""
ALL_HELD = bytes((HELD,))
PACKAGE = f"{Path(__file__).parents[1]}/"
OWNERS = "free", "held", "a lease's", "the cache's"


class DebugLease(Lease):
    """``Lease`` that checks the promises of its caller."""

    _is_made = False

    def __init__(
        self, cache: _Checks, placement: PlacementPolicy, request: LeaseRequest, *rest: Any
    ) -> None:
        running = [one for one in cache.live_leases() if not one._has_ended]
        for what in ("table_row", "own_slot"):
            number = getattr(request, what)
            if number is not None and number in [getattr(one._request, what) for one in running]:
                raise ValueError(f"{what} {number} is that of a running lease: end it first")
        super().__init__(cache, placement, request, *rest)
        self._lock.is_leases = True  # type: ignore[attr-defined]
        self._stepped_len: int | None = None
        """End of the last step, as ``take_checkpoint_slots`` and ``roll_back`` say; None if neither
        was called, which callers without checkpoints may leave out."""
        self._step_start: int | None = None
        """Begin of that step."""
        if cache.arena is not None:  # A strong reference would keep it after its last one.
            del cache.arena.holders[self]
            cache.arena.holders[_WeakHolder(self)] = None
        cache.leases.add(weakref.ref(self, cache.leases.discard))
        self._is_made = True

    def __del__(self) -> None:
        if self._is_made and not self._has_ended:
            lost = (
                "was dropped without finish, preempt or abort: its rows, slots and lock stay taken"
            )
            warnings.warn(f"{self!r} {lost}", ResourceWarning, stacklevel=2)

    def take_checkpoint_slots(self, start: int, end: int, max_slots: int | None = None) -> Any:
        at = max(self.published_len, self._stepped_len or 0)
        is_usable = not self._has_ended and start <= end <= self.extended_len
        # A call may be repeated, for example after it took too few slots.
        follows = at <= start <= at + self.num_quiet_tokens(at) or start == self._step_start
        if is_usable and start >= self.published_len and not follows:
            raise ValueError(
                f"this step begins at {start}, but the last one ended at {at}: compute the tokens "
                "in order, or undo a part of a step with roll_back"
            )
        saves = super().take_checkpoint_slots(start, end, max_slots)
        if saves is not None:
            self._step_start, self._stepped_len = start, end
        return saves

    def roll_back(self, computed_len: int, unwritten: bool = False) -> None:
        super().roll_back(computed_len, unwritten)
        self._step_start, self._stepped_len = None, computed_len

    def _end(
        self, tokens: Tokens, computed_len: int, donate: bool, stop_reason: str | None
    ) -> None:
        has_own_state = self.state_slot is not None and self._request.own_slot is None
        if donate and has_own_state and (self._stepped_len or 0) > computed_len:
            raise ValueError(
                f"the last step went to {self._stepped_len}, so state_slot has the state after "
                f"that many tokens and not after {computed_len}: call finish(..., donate=False)"
            )
        super()._end(tokens, computed_len, donate, stop_reason)

    def _require_computed(self, tokens: Tokens, computed_len: int) -> None:
        super()._require_computed(tokens, computed_len)
        if (most := self._stepped_len) is None:
            return
        if most >= self.prompt_len:
            most += self.num_quiet_tokens(most)
        if computed_len > max(most, self.published_len):
            raise ValueError(
                f"tokens up to {computed_len} are said to be computed, but the last step went to "
                f"{self._stepped_len} (take_checkpoint_slots): publish what steps have computed"
            )


class DebugLock(LockHandle):
    """``LockHandle`` that warns if it is dropped before ``unlock``."""

    __slots__ = ("__weakref__", "is_leases", "where")
    cache: _Checks

    def __init__(self, node: RadixNode | None, cache: _Checks) -> None:
        super().__init__(node, cache)
        self.where = _caller()
        """File and line that took it."""
        self.is_leases = cache.in_lease
        """True if it belongs to a lease, which warns itself."""
        cache.handles.add(self)

    def __repr__(self) -> str:
        end = None if self.node is None else self.node.end
        return f"LockHandle(end={end}, taken in {self.where})"

    def __del__(self) -> None:
        if not getattr(self, "is_leases", True) and self.node is not None:
            lost = "was dropped without unlock: its path stays locked"
            warnings.warn(f"{self!r} {lost}", ResourceWarning, stacklevel=2)


def _caller() -> str:
    """Return the file and line of the innermost frame outside of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"


class _WeakHolder(weakref.ref[DebugLease]):
    """Holder of the rows of a lease that does not keep it alive. Equal to the lease."""

    __hash__ = weakref.ref.__hash__

    def __eq__(self, other: object) -> bool:
        return other is self or other is self()

    def rows_moved(self, move: Move) -> int:
        lease = self()
        return 0 if lease is None else lease.rows_moved(move)


class _Checks(HybridRadixCache):
    """Checks of the calling thread, and of the owners of rows and slots."""

    lease_kind, lock_kind = DebugLease, DebugLock

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.owner: int | None = None
        """Thread that may call. Another one may if nothing is held, or if this is None: callers
        that share a lock set it to None before they release that."""
        self.leases: set[weakref.ref[DebugLease]] = set()
        """Leases that were not dropped, ended ones included."""
        self.handles = weakref.WeakSet[DebugLock]()
        """Locks that were not dropped."""
        self.in_lease = False
        """True during the call of a lease, which may do what its callers may not."""
        self._owners = np.zeros(self._pages.capacity, np.int8)
        self._free_rows, vars(self._pages)["free"] = self._pages.free, self._note_freed
        if self.arena is not None:
            self.arena.holders[self] = None

    def live_leases(self) -> list[DebugLease]:
        return [lease for one in tuple(self.leases) if (lease := one()) is not None]

    def _note_freed(self, rows: Indices) -> None:
        self._free_rows(rows)
        self._owners.put(rows, FREE)  # Twice as fast as an assignment.

    def rows_moved(self, move: Move) -> int:
        self._owners[move.dst], self._owners[move.src] = self._owners[move.src], FREE
        return 0

    def change_owner(self, call: str) -> None:
        """Make the calling thread the owner. Raises RuntimeError if another one is it."""
        num_rows = self._pages.num_taken - self.cached_tokens
        is_held = num_rows or self._slots.num_taken - self.num_checkpoints or self._locked_len
        if self.owner is not None and is_held:
            raise RuntimeError(
                f"{call} was called in thread {get_ident()}, but thread {self.owner} uses this "
                "cache, and holds rows, slots or locks: call it in one thread. Callers that share "
                "a lock set cache.owner = None before they release it"
            )
        self.owner = get_ident()

    def rebuilt(self) -> HybridRadixCache:
        for lease in self.live_leases():
            lease._has_ended = True  # Its memory is gone, so that it may be dropped.
        return super().rebuilt()

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        super().check(held_tokens, held_slots)
        held = Counter(one.node for one in self.handles if one.node is not None)
        for node in self._tree.nodes():
            lost = node.locks - held[node]
            assert not lost, f"{lost} locks on {node} were dropped without unlock"

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        if get_ident() != self.owner:
            self.change_owner("allocate_kv")
        rows = super().allocate_kv(num_tokens)
        if rows is not None:
            self._owners.put(rows, LEASED if self.in_lease else HELD)
        return rows

    def free_kv(self, kv_indices: Indices) -> None:
        if get_ident() != self.owner:
            self.change_owner("free_kv")
        self._require_held(kv_indices)
        super().free_kv(kv_indices)

    def free_slot(self, slot: int) -> None:
        if get_ident() != self.owner:
            self.change_owner("free_slot")
        if self.leases and not self.in_lease:
            self._require_not_leased(slot)
        super().free_slot(slot)

    def insert(
        self,
        tokens: Tokens,
        kv_indices: Indices,
        checkpoints: Sequence[tuple[int, int]] = (),
        namespace: Hashable = None,
        owned_from: int = 0,
        labels: Sequence[str] = (),
        after: NodeHandle | None = None,
    ) -> InsertResult:
        require_int32(kv_indices, "KV indices")
        self._require_held(kv_indices[owned_from:])
        if self.leases and not self.in_lease:
            for _, slot in checkpoints:
                self._require_not_leased(slot)
        return super().insert(tokens, kv_indices, checkpoints, namespace, owned_from, labels, after)

    def replace_rows(self, node: NodeHandle, start: int, rows: Indices) -> Indices:
        self._require_held(rows)
        former = super().replace_rows(node, start, rows)
        self._owners.put(rows, CACHED)
        self._owners.put(former, HELD)
        return former

    def _store_rows(self, path: Sequence[RadixNode], rows: Indices, first: int) -> None:
        super()._store_rows(path, rows, first)
        for node in path:
            assert node.kv is not None
            self._owners.put(node.kv.indices, CACHED)

    def _require_held(self, rows: Indices) -> None:
        """Raise ValueError unless callers of ``allocate_kv`` hold ``rows``, each given once."""
        if type(rows) is not np.ndarray or rows.dtype is not INT32 or rows.ndim != 1:
            require_int32(rows, "rows")
        try:
            owners = self._owners.take(rows.view(np.uint32))  # Negative: large.
        except IndexError:
            raise ValueError(f"a row is not of this pool of {len(self._owners)}") from None
        if owners.tobytes() != ALL_HELD * len(rows):
            first = int((owners != HELD).argmax())
            raise ValueError(
                f"row {rows[first]} is {OWNERS[owners[first]]}: give only rows of allocate_kv that "
                "were neither published nor returned"
            )
        if len(set(rows.tolist())) != len(rows):
            raise ValueError("a row is given twice")

    def _require_not_leased(self, slot: int) -> None:
        for one in self.live_leases():
            own = [] if one._request.own_slot is not None else [one.state_slot]
            saved = [*one._pending, *([] if one._rolling is None else [one._rolling])]
            if slot in own or slot in [each for _, each in saved]:
                raise ValueError(f"slot {slot} is held by {one!r}: it returns the slot itself")


class DebugCache(_Checks):
    """``HybridRadixCache`` that finds misuse."""


class DebugTieredCache(_Checks, TieredRadixCache):
    """``TieredRadixCache`` that finds misuse."""


def _in_one_thread(kind: type[object], name: str) -> None:
    """Let only the owner thread call the method ``name`` of ``kind``."""
    home = next(base for base in kind.__mro__ if name in vars(base))
    own = vars(home)[name] if home is kind else None
    """None if the method is inherited: then it is looked up at each call, as tests replace it."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if get_ident() != self.owner:
            self.change_owner(name)
        return (own or getattr(home, name))(self, *args, **options)

    def call_lease(self: Any, *args: Any, **options: Any) -> Any:
        cache = self.cache
        if get_ident() != cache.owner:
            cache.change_owner(name)
        was_in_lease, cache.in_lease = cache.in_lease, True
        try:
            return (own or getattr(home, name))(self, *args, **options)
        finally:
            cache.in_lease = was_in_lease

    made = call_lease if issubclass(kind, Lease) else call
    setattr(kind, name, wraps(getattr(kind, name))(made))


UNGUARDED = {
    Lease: {"is_saving_at", "num_quiet_tokens", "rows_moved"},
    HybridRadixCache: {"candidates", "check", "iter_nodes", "publish", "rebuilt", "render", "root"}
    | {"subscribe", "take_back", "unsubscribe", "allocate_kv", "free_kv", "free_slot"},
}
"""Methods that only read, are called by the others, or check their thread themselves."""
for _kind in (DebugLease, DebugCache, DebugTieredCache):
    for _base in UNGUARDED.keys() & set(_kind.__mro__):
        for _name in vars(_base).keys() - UNGUARDED[_base]:
            if isfunction(vars(_base)[_name]) and not _name.startswith("_"):
                _in_one_thread(_kind, _name)
