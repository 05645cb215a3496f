"""A request's claim on the cache, from its match to its last token.

A ``Lease`` holds integers only. The engine's cache manager and the simulator use the same class, so
a policy behaves the same in both. The caller owns the tensors: it copies states, writes KV and
fills its request table.

Life of a lease:

1. ``begin`` matches the prompt, locks the cached part and takes a state slot.
2. For each chunk of work: ``extend`` takes KV rows; ``take_checkpoint_slots`` takes slots for the
   checkpoints in the chunk. The caller carries out a step plan (``cache.take_step``) and computes.
   ``publish`` passes a chunk of the prompt to the tree.
3. Exactly one of ``finish``, ``preempt`` and ``abort`` ends the lease. Then it holds nothing.

A call that breaks these rules raises ValueError, RuntimeError if a step plan was not carried out,
or TypeError for a wrong type. Nothing is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from math import lcm
from operator import index
from typing import NamedTuple

import numpy as np

from hybridcache.allocators.moves import NOT_TAKEN, Move, RowWrite
from hybridcache.api import LockHandle, Losses, PrefixCache, PrefixMatch, losses_of
from hybridcache.policies.protocol import FetchRule, PlacementPolicy, Prefill
from hybridcache.radix.tree import NodeHandle
from hybridcache.tokens import INT32, Indices, Tokens, require_int32

SPARE_ROWS = 512
"""Spare capacity for the rows of a short answer, so that they need no second array."""


class LeaseRows:
    """Row table of one lease.

    Rows of positions in [0, ``published_len``) belong to the tree. Those in [``published_len``,
    ``num_rows``) are held.
    """

    __slots__ = (
        "_rows",
        "_unread_end",
        "_unread_start",
        "changed",
        "num_rows",
        "published_len",
    )

    def __init__(self, cached_len: int, num_expected: int) -> None:
        """Start with ``cached_len`` rows of the tree, and capacity for ``num_expected``."""
        self.num_rows = cached_len
        self.published_len = cached_len
        # Rows in [_unread_start, _unread_end) are only in the tree, because a caller without
        # tensors never reads them. All others are here, up to date.
        self._unread_start, self._unread_end = 0, cached_len
        self._rows: Indices = np.empty(num_expected + SPARE_ROWS, np.int32)
        self.changed: tuple[int, int] | None = None
        """(start, end) of the marked positions, or None if there are none."""

    @property
    def unread_len(self) -> int:
        """Length up to which rows of the tree must be read before ``view``, or 0 if all are known.
        O(1)."""
        return self._unread_end if self._unread_start < self._unread_end else 0

    def read(self, gathered: Indices) -> None:
        """Copy the unknown rows from ``gathered``, the rows of the tree from position 0 on.

        O(``unread_len``).
        """
        start, end = self._unread_start, self._unread_end
        self._rows[start:end] = gathered[start:end]
        self._unread_start = end

    def view(self, start: int, end: int) -> Indices:
        """Return the rows of positions [start, end): int32, a view. Rows that were not read are
        undefined.

        O(1).
        """
        return self._rows[start:end]

    def append(self, rows: Indices) -> None:
        """Add held ``rows``, int32[k], for the next k positions. O(k) amortised."""
        end = self.num_rows + len(rows)
        if end > len(self._rows):
            larger = np.empty(max(end, 2 * len(self._rows)), np.int32)
            for known in (
                slice(0, self._unread_start),
                slice(self._unread_end, self.num_rows),
            ):
                larger[known] = self._rows[known]
            self._rows = larger
        self._rows[self.num_rows : end] = rows
        self.num_rows = end

    def publish(self, to_len: int, num_duplicates: int) -> None:
        """Pass the rows below ``to_len`` to the tree.

        The first ``num_duplicates`` of the rows that were held are replaced by rows of the tree.
        O(1).
        """
        first = self.published_len
        self.published_len = to_len
        if num_duplicates:
            if self._unread_start == self._unread_end:
                self._unread_start = first
            self._unread_end = first + num_duplicates

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of an emptied slab, and return how many of them are held.

        O(``num_rows``), about a nanosecond each.
        """
        first_known = self._unread_end
        moved = move.rename(self._rows[first_known : self.num_rows]) + first_known
        num_held = len(moved) - int(np.searchsorted(moved, self.published_len))
        if self._unread_start:
            moved = np.concatenate((move.rename(self._rows[: self._unread_start]), moved))
        if len(moved):
            self.mark(int(moved[0]), int(moved[-1]) + 1)
        return num_held

    def known_from(self, start: int) -> Indices:
        """Return the rows of positions from ``start`` on, without those that were not read.

        O(k).
        """
        if self._unread_start == self._unread_end:
            return self._rows[start : self.num_rows]
        before = self._rows[start : self._unread_start]
        return np.concatenate((before, self._rows[max(start, self._unread_end) : self.num_rows]))

    def mark(self, start: int, end: int) -> None:
        """Record that the rows of positions [start, end) are new or have changed. O(1)."""
        if self.changed is not None:
            start, end = min(start, self.changed[0]), max(end, self.changed[1])
        self.changed = start, end

    def clear(self) -> None:
        """Drop all rows at the end of the lease. O(1)."""
        self.num_rows = self.published_len = self._unread_start = self._unread_end = 0
        self.changed = None


Saved = tuple[int, int]
"""(position, slot) of a checkpoint in a held slot, written or about to be written."""


class CheckpointPlan:
    """Checkpoint plan of one lease.

    A planned position gets a slot shortly before it is computed, and keeps it until the ``publish``
    that covers the position. Decode has one rolling slot: it is overwritten at each crossing and
    published only at the end. The placement policy is notified of each planned checkpoint, whether
    saved or dropped.
    """

    __slots__ = (
        "_cache",
        "_interval",
        "_overwritten",
        "_pending",
        "_placement",
        "_plan",
        "_prompt_len",
        "_rolling",
        "_step",
    )

    def __init__(
        self, cache: PrefixCache, placement: PlacementPolicy, step: int, prompt_len: int
    ) -> None:
        """``step``: checkpoints are at its multiples."""
        self._cache = cache
        self._placement = placement
        self._step = step
        self._prompt_len = prompt_len
        self._plan: dict[int, str] = {}
        self._pending: dict[Saved, str] = {}
        self._rolling: Saved | None = None
        self._overwritten: Saved | None = None
        """Earlier contents of the rolling slot, until they are overwritten for certain."""
        self._interval: int | None = None

    def ask(self, prefill: Prefill) -> None:
        """Plan the checkpoints that the placement policy chooses for ``prefill`` and its answer."""
        planned = self._plan
        self._plan = planned | prefill.on_grid(self._placement.plan(prefill)) | planned
        if prefill.answer_survives:
            interval = self._placement.decode_interval()
            if interval is not None:
                self._interval = -(-interval // self._step) * self._step

    @property
    def planned(self) -> tuple[int, ...]:
        """Positions without a slot yet, ascending."""
        return tuple(sorted(self._plan))

    @property
    def slots(self) -> tuple[int, ...]:
        """Held slots."""
        rolling = (self._rolling[1],) if self._rolling is not None else ()
        return (*(slot for _, slot in self._pending), *rolling)

    def plan(self, position: int, label: str) -> None:
        """Plan a checkpoint, unless one at ``position`` already has a slot."""
        if not self.is_pending(position):
            self._plan.setdefault(position, label)

    def is_pending(self, position: int) -> bool:
        """Return whether a checkpoint at ``position`` has its slot and waits for its
        ``publish``."""
        return any(saved == position for saved, _ in self._pending)

    def wants(self, position: int) -> bool:
        """Return whether to keep a state at ``position``, where the request ends."""
        if position > self._prompt_len:
            return self._interval is not None
        return position in self._plan

    def take(self, start: int, end: int, receipt: LockHandle) -> tuple[Saved, ...]:
        """See ``Lease.take_checkpoint_slots``. ``receipt`` is the lock of the lease."""
        if start >= self._prompt_len:
            return self._roll(start, end, receipt)
        if not self._plan and not self._pending:
            return ()
        self._save(start, end, len(self._plan))
        return tuple(sorted([saved for saved in self._pending if start < saved[0] <= end]))

    def reserve(self, start: int, end: int, max_slots: int, receipt: LockHandle) -> int:
        """See ``Lease.reserve_checkpoint_slots``. ``receipt`` is the lock of the lease."""
        if start >= self._prompt_len:
            rolls = self._rolling is None and bool(self._crossing(start, end))
            if rolls and max_slots:
                self._roll(start, end, receipt)
                return 0
            return int(rolls)
        if not self._save(start, end, max_slots):
            return 0
        return sum(start < position <= end for position in self._plan)

    def _save(self, start: int, end: int, max_slots: int) -> bool:
        """Take slots for planned positions in (start, end]. Return False if none is available for
        the next one."""
        plan, num_taken = self._plan, 0
        for position, label in tuple(plan.items()):
            if start < position <= end and num_taken < max_slots:
                slot = self._cache.allocate_slot()
                if slot is None:
                    return False
                del plan[position]
                self._pending[position, slot] = label
                num_taken += 1
        return True

    def _roll(self, start: int, end: int, receipt: LockHandle) -> tuple[Saved, ...]:
        position = self._crossing(start, end)
        if position is None:
            return ()
        slot = self._rolling[1] if self._rolling else self._cache.allocate_slot(receipt)
        if slot is None:
            return ()
        if self._rolling is None or self._rolling[0] != position:
            self._overwritten, self._rolling = self._rolling, (position, slot)
        return ((position, slot),)

    def roll_back(self, computed_len: int, unwritten: bool) -> None:
        """See ``Lease.roll_back``."""
        if self._rolling is None or self._rolling[0] <= computed_len:
            return
        kept = self._overwritten if unwritten else None
        if kept is None:
            self._cache.free_slot(self._rolling[1])
        self._rolling = kept

    def _crossing(self, start: int, end: int) -> int | None:
        """Return the last position in (start, end] at which decode saves a state, or None."""
        interval = self._interval
        if interval is None or end // interval * interval <= start:
            return None
        return end // interval * interval

    def num_before_crossing(self, computed_len: int) -> int:
        """Tokens after ``computed_len`` before decode saves its next state."""
        interval = self._interval
        return 1 << 30 if interval is None else interval - 1 - computed_len % interval

    def done(self, computed_len: int) -> dict[Saved, str]:
        """Remove and return the checkpoints at computed positions, with their labels.

        Callers must call ``settle`` afterwards.
        """
        done = self._pending
        if not done:
            return done
        later: dict[Saved, str] = {}
        if max(done)[0] > computed_len:
            later = {saved: label for saved, label in done.items() if saved[0] > computed_len}
            done = {saved: label for saved, label in done.items() if saved[0] <= computed_len}
        self._pending = later
        return done

    def end(self, published_len: int, donated: Saved | None = None) -> dict[Saved, str]:
        """Remove and return all checkpoints up to ``published_len`` that have a slot, and drop the
        others.

        The result includes the rolling one and ``donated``. Callers must call ``settle``
        afterwards.
        """
        saved = self._pending
        if self._rolling is not None:
            saved[self._rolling] = "decode"
        if saved and max(saved)[0] > published_len:
            for unfinished in [one for one in saved if one[0] > published_len]:
                self._cache.free_slot(unfinished[1])
                self._placement.on_dropped(unfinished[0], saved.pop(unfinished))
        if donated is not None:
            position = donated[0]
            in_decode = position > self._prompt_len
            saved[donated] = "decode" if in_decode else self._plan.pop(position, "preempt")
        self._drop_plan()
        return saved

    def settle(self, saved: dict[Saved, str], rejected_slots: Sequence[int]) -> None:
        """Process the result of publishing ``saved``: free the slots that the cache did not
        take."""
        placement = self._placement
        for (position, slot), label in saved.items():
            if slot in rejected_slots:
                self._cache.free_slot(slot)
                placement.on_dropped(position, label)
            else:
                placement.on_saved(position, label)

    def abort(self) -> None:
        """Free every slot and drop every plan."""
        if self._rolling is not None:
            self._pending[self._rolling] = "decode"
        for (position, slot), label in self._pending.items():
            self._cache.free_slot(slot)
            self._placement.on_dropped(position, label)
        self._drop_plan()

    def _drop_plan(self) -> None:
        for position, label in self._plan.items():
            self._placement.on_dropped(position, label)
        self._plan, self._pending, self._rolling = {}, {}, None


def fetch_best(cache: PrefixCache, match: PrefixMatch, exchange: FetchRule) -> bool:
    """Load the checkpoint of ``match.loadable`` that saves the most time.

    Returns False if none saves any, or the device has no room for it.
    """
    offload = cache.offload
    assert offload is not None
    best, most = None, 0.0
    for one in match.loadable:
        num_bytes = {
            name: rows * offload.row_bytes
            for name, rows in zip(offload.names, one.rows, strict=True)
        }
        saved = exchange.seconds_saved(match.cached_len, one.position, match.num_tokens, num_bytes)
        if saved > most:
            best, most = one, saved
    return best is not None and cache.fetch(best)


# Owner of the KV row of each token. All borders except computed_len are multiples of page_size.
#
# 0 ............ cached_len ........ published_len ........ computed_len ........ len(kv_indices)
#     |  the tree's, since before us     |  ours: held          |  ours: held, not    |
#     |                |  the tree's,    |  (the last partial   |  computed yet       |
#     |                |  published by us|  page at least)      |                     |
#     |<---------- under our lock ------>|<-------- given back at the end ----------->|
#
# begin      locks the node that ends at cached_len: the tree's rows stay the tree's. They are read
#            when first asked for.
# extend     allocates at the right end: free -> held. May evict, never anything under a lock.
# publish    hands [published_len, computed_len) to the tree: held -> cached, down to whole pages.
#            Where the tree has rows for the same tokens already (another request was faster, or
#            their checkpoint had gone), ours are duplicates: we switch to the tree's and free ours:
#            held -> free. Then the lock moves to the node that ends at the new published_len; the
#            new one is taken before the old one is returned.
# finish,    publish one last time, free what is left, unlock.
#   preempt
# abort      frees [published_len, len) and unlocks. What was published before stays the tree's.
#
# Slots. `state_slot` is ours from begin to the end: free -> held -> free, or, donated, -> cached.
# It is written in every step; a checkpoint never is, so a lease that resumes starts on a copy
# (`restore`). A slot for a planned checkpoint is held from `take_checkpoint_slots` until the
# `publish` that covers its position: then cached, or free if the tree would not have it. In decode
# one such slot rolls: written again at each crossing, published only at the end.
#
# Moves. In an arena rows get other places when a slab is emptied (`allocators.moves`). No row
# changes hands by that: the lease renames its own (`rows_moved`), and the next `cache.take_step()`
# carries the moves of the bytes and the positions that changed.


class LeaseRequest(NamedTuple):
    """Input of ``Lease.begin``."""

    tokens: Tokens
    """Tokens known before computing: the prompt, or after a preemption the prompt and the tokens
    generated so far. At least one. ``begin`` copies them."""
    namespace: Hashable = None
    """Requests in different namespaces share nothing: None, a str, bytes, an int or a tuple of
    these."""
    boundaries: tuple[int, ...] = ()
    """Positions that later prompts are known to keep, ascending. Those past the tokens have no
    effect."""
    reuse: bool = True
    """Whether to read cached entries. Set it to False to get the logits of every position; the
    result is published nevertheless."""
    exact: bool = False
    """Whether to publish nothing past ``tokens``, so that all cached entries were computed by
    prefills."""
    stateful: bool = True
    """Whether the model has linear layers. If not, no slot is taken and no checkpoint planned."""
    answer_survives: bool = True
    """Whether later prompts contain the answer. Some chat templates drop the reasoning. Then decode
    saves no state: it would never be used, and would make the checkpoint at the boundary look
    superseded."""
    table_row: int | None = None
    """Row of this request in the caller's request table, or None. With it, ``cache.take_step()``
    lists every position with a new or changed KV row (``RowWrite``)."""
    own_slot: int | None = None
    """State slot of the request, if running states are stored outside of the cache's memory. If
    None, a slot of the cache is taken, and may be donated. An own slot is not donated.
    ``StepPlan.restores`` then names a slot of the cache first, and this number of your own memory
    second."""
    resumes: bool = False
    """Whether the request continues one that is counted in ``cache.stats`` already: the
    ``is_counted`` of its preempted lease. Its hits and losses are then not added again. Policies
    learn from it as from any other."""


def _refuse_bad_begin(
    cache: PrefixCache,
    placement: PlacementPolicy,
    request: LeaseRequest,
    exchange: FetchRule | None,
) -> None:
    """Raise TypeError or ValueError for arguments of ``begin`` that would fail later, in another
    call. O(boundaries)."""
    if not hasattr(cache, "match"):
        kind = type(cache).__name__
        raise TypeError(f"cache must be made by build_prefix_cache (got {kind}).")
    if not isinstance(placement, PlacementPolicy):
        hint = " Build it once, for all requests, with parse_placement."
        raise TypeError(f"placement must be a PlacementPolicy (got {placement!r}).{hint}")
    if not isinstance(request, LeaseRequest):
        raise TypeError(f"request must be a LeaseRequest (got {type(request).__name__}).")
    if exchange is not None and not hasattr(exchange, "seconds_saved"):
        raise TypeError(f"exchange must have a method seconds_saved (got {exchange!r}).")
    for what, number in (("table_row", request.table_row), ("own_slot", request.own_slot)):
        if number is not None and require_index(number, what) < 0:
            raise ValueError(f"{what} must not be negative (got {number}).")
    if request.boundaries or type(request.boundaries) is not tuple:
        _refuse_bad_boundaries(request.boundaries)


def _refuse_bad_boundaries(boundaries: tuple[int, ...]) -> None:
    if not isinstance(boundaries, tuple | list):
        raise TypeError(f"boundaries must be a tuple of positions (got {boundaries!r}).")
    before = 0
    for position in boundaries:
        if require_index(position, "each of boundaries") < before:
            raise ValueError(
                f"boundaries must be positions from 0 on, ascending (got {boundaries!r})"
            )
        before = position


def require_index(number: int, what: str) -> int:
    """Return ``number`` as an int. Raises TypeError if it is not an integer."""
    try:
        return index(number)
    except TypeError:
        raise TypeError(f"{what} must be an integer (got {number!r}).") from None


NO_SLOTS = (
    "this cache has no state slots, so a request with a state can never begin: build it with "
    "num_slots, or pass LeaseRequest(stateful=False) for a model without linear layers"
)
ENDED = "this lease has ended (finish, preempt or abort was called): begin a new one"


class Lease:
    """Claim of one request on a cache.

    Made by ``begin``. After ``finish``, ``preempt`` or ``abort`` it holds nothing: ``kv_indices``
    is empty and ``state_slot`` is None. ``abort`` then does nothing, and every other call that
    takes, plans or publishes raises ValueError. ``match``, ``cached_len``, ``losses`` and
    ``is_counted`` keep their values. The results of ``is_saving_at``, ``continuation`` and
    ``num_quiet_tokens`` then mean nothing.

    >>> from hybridcache import CacheConfig, build_prefix_cache, parse_placement
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=4, grid=8))
    >>> placement, prompt = parse_placement("backoff"), np.arange(20, dtype=np.int32)
    >>> for _ in range(2):
    ...     lease = Lease.begin(cache, placement, LeaseRequest(prompt))
    ...     _ = lease.extend(20)
    ...     saves = lease.take_checkpoint_slots(lease.cached_len, 20)
    ...     cache.take_step().done()  # carry it out, then compute
    ...     print(lease.cached_len, saves, lease.losses.never_seen)
    ...     lease.finish(prompt, 20)
    0 ((16, 1),) 20
    16 () 0
    >>> cache.check(held_tokens=0, held_slots=0)
    """

    __slots__ = (
        "_cache",
        "_has_ended",
        "_is_counted",
        "_node",
        "_placement",
        "_plan",
        "_receipt",
        "_request",
        "_rows",
        "_step",
        "_unready_from",
        "_unready_since",
        "match",
        "prompt_len",
        "state_slot",
    )

    def __init__(
        self,
        cache: PrefixCache,
        placement: PlacementPolicy,
        request: LeaseRequest,
        match: PrefixMatch,
        receipt: LockHandle,
        state_slot: int | None,
    ) -> None:
        """Take ownership of ``receipt`` (a lock on ``match.node``) and of ``state_slot``; see
        ``begin``."""
        self._cache = cache
        self._placement = placement
        self._request = request
        self._node = match.node
        self._receipt = receipt
        self.match = match
        """Match from which the request resumes, with its final losses."""
        self.prompt_len = len(request.tokens)
        """Number of tokens of the request, which are prefilled."""
        self.state_slot = state_slot
        """State slot of the request, to be written in every step: the state after the computed
        tokens. None for attention-only models, and after the end."""
        self._rows = LeaseRows(match.cached_len, self.prompt_len + cache.page_size)
        self._is_counted = self._has_ended = False
        self._step = lcm(cache.grid, cache.page_size)
        self._plan = CheckpointPlan(cache, placement, self._step, self.prompt_len)
        steps = cache.steps
        steps.open(self)
        # Rows and slots from _unready_from on are valid once plan _unready_since is carried out.
        self._unready_from, self._unready_since = match.cached_len, steps.num_taken
        if match.cached_len:
            self._note_changed(0, match.cached_len)
        if match.checkpoint is not None and state_slot is not None:
            steps.restore(self, match.checkpoint, state_slot)

    @classmethod
    def begin(
        cls,
        cache: PrefixCache,
        placement: PlacementPolicy,
        request: LeaseRequest,
        exchange: FetchRule | None = None,
    ) -> Lease | None:
        """Match the tokens, lock the result, take a state slot, and load from tiers if that saves
        time.

        Returns None, with nothing held, if no slot is available: keep the request in the queue. If
        ``total_bytes`` are less than one state, every request is refused in this way. If the only
        available slot is that of the matching checkpoint, the request resumes from the next
        shallower one, and ``losses.refused`` counts the difference. With ``reuse=False`` it counts
        the whole match.

        ``placement`` is one object for all requests of a cache, because it can learn.
        ``parse_placement`` makes one. ``exchange`` decides which offloaded prefixes to load.
        Without it nothing is loaded. A loaded checkpoint belongs to the cache like any other.
        O(len(tokens)).

        Raises:
            ValueError: the tokens are empty or not int32[n]; the namespace is malformed; the
                boundaries are negative or not ascending; ``table_row`` or ``own_slot`` is negative;
                or the request has a state and the cache has no slots.
            TypeError: an argument or a field of ``request`` has another type.
            PolicyError: an own eviction policy has failed. Nothing is held.
            RuntimeError: leases of another thread are running.
        """
        _refuse_bad_begin(cache, placement, request, exchange)
        cache.steps.refuse_other_thread()
        if isinstance(request.tokens, np.ndarray):
            # The caller may change its array before the tokens are published.
            request = request._replace(tokens=request.tokens.copy())
        readable = request.tokens if request.reuse else request.tokens[:1]
        found = cache.match(request.tokens, request.namespace)
        if not found.num_tokens:
            raise ValueError("a request needs at least one token (got no tokens)")
        match = found if request.reuse else cache.match(readable, request.namespace)
        receipt = cache.lock(match.node)
        slot = request.own_slot if request.stateful else None
        try:
            if request.stateful and slot is None:
                slot = cache.allocate_slot()
                if slot is None and match.cached_len:
                    cache.unlock(receipt)
                    slot = cache.allocate_slot()
                    match = cache.match(readable, request.namespace)
                    receipt = cache.lock(match.node)
                if slot is None:
                    if not cache.has_slots:
                        raise ValueError(NO_SLOTS)
                    cache.unlock(receipt)
                    return None
            if match is not found:
                # The other fields of ``found`` describe the cache before the request took memory.
                match = found._replace(
                    cached_len=match.cached_len,
                    checkpoint=match.checkpoint,
                    node=match.node,
                    resumed=match.resumed,
                    loadable=match.loadable if request.reuse else (),
                )
            if match.loadable and exchange is not None and fetch_best(cache, match, exchange):
                match, before = cache.match(readable, request.namespace), receipt
                receipt = cache.lock(match.node)
                cache.unlock(before)
        except BaseException:  # of a policy or of the exchange
            cache.unlock(receipt)
            if slot is not None and slot != request.own_slot:
                cache.free_slot(slot)
            raise
        if match is not found or match.loadable:
            loadable_len = match.loadable[-1].position if match.loadable else 0
            match = match._replace(losses=losses_of(found, match.cached_len, loadable_len))
        return cls(cache, placement, request, match, receipt, slot)

    def __del__(self) -> None:
        if getattr(self, "_has_ended", True):
            return
        self._receipt.node = None  # One warning is enough.
        self._cache.steps.num_open -= 1
        warnings.warn(
            f"{self!r} was dropped: call finish, preempt or abort, or its rows, slot and lock stay "
            "taken",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )

    def __repr__(self) -> str:
        if self._has_ended:
            return "Lease(ended)"
        return (
            f"Lease(prompt_len={self.prompt_len}, cached_len={self.cached_len}, "
            f"published_len={self.published_len}, extended_len={self.extended_len}, "
            f"state_slot={self.state_slot})"
        )

    def _count(self) -> None:
        """Count the lease as a use and plan its checkpoints, when it gets its first memory."""
        self._is_counted = True
        request, match, placement = self._request, self.match, self._placement
        if request.reuse:
            self._cache.touch(match, request.resumes)
        if not request.stateful:
            return
        if request.reuse:
            if match.resumed is not None:
                placement.on_hit(match.resumed)
            if match.missed is not None:
                placement.on_ghost_hit(match.missed, match.missed_tokens)
        prefill = Prefill(
            self.prompt_len,
            match.cached_len,
            match.kv_match_len,
            match.seen_len,
            request.boundaries,
            self._step,
            match.resumed,
            match.missed,
            match.forks,
            request.answer_survives and not request.exact,
            self._cache.free_slots,
            self._cache.num_checkpoints,
        )
        placement.on_prefill(prefill)
        self._plan.ask(prefill)

    @property
    def cached_len(self) -> int:
        """Number of tokens that need not be computed."""
        return self.match.cached_len

    @property
    def is_counted(self) -> bool:
        """Whether ``cache.stats`` contains this request: it has had rows, or ``resumes``."""
        return self._is_counted or self._request.resumes

    @property
    def losses(self) -> Losses:
        """Prompt tokens to compute, by cause. With ``cached_len`` they sum to the prompt length."""
        return self.match.losses

    @property
    def node(self) -> NodeHandle | None:
        """Node that ends at ``published_len``, which the lease has locked. None at 0."""
        return self._node

    @property
    def restore(self) -> tuple[int, int] | None:
        """(checkpoint slot, own slot) of the state copy to make before computing, or None if the
        state starts from zero."""
        if self.match.checkpoint is None or self.state_slot is None:
            return None
        return self.match.checkpoint, self.state_slot

    @property
    def kv_indices(self) -> Indices:
        """KV rows of all positions so far: int32[``extended_len``], a read-only view.

        Read it again in every step, after ``take_step``: rows of an arena move, and ``publish``
        replaces duplicates. O(1), but O(``published_len``) if rows of the tree were not read yet.
        """
        rows = self._all_rows()
        rows.setflags(write=False)
        return rows

    def _all_rows(self) -> Indices:
        if self._rows.unread_len:
            self._cache.steps.rows_added(self, 0)
            self._rows.read(self._cache.gather(self._node))
        return self._rows.view(0, self._rows.num_rows)

    @property
    def extended_len(self) -> int:
        """Number of positions that have a row: at least the ``to_len`` of the last ``extend``."""
        return self._rows.num_rows

    @property
    def published_len(self) -> int:
        """Number of tokens with rows that belong to the tree, under the lock of this lease."""
        return self._rows.published_len

    @property
    def planned(self) -> tuple[int, ...]:
        """Positions at which this prefill should still save a checkpoint, ascending.

        Empty before the first successful ``extend``, except for those of ``plan_checkpoint``.
        """
        return self._plan.planned

    @property
    def held_tokens(self) -> int:
        """Number of held KV rows."""
        return self._rows.num_rows - self._rows.published_len

    @property
    def held_slots(self) -> int:
        """Number of held state slots: the own one, and those of unpublished checkpoints."""
        return (self._cached_slot is not None) + len(self._plan.slots)

    @property
    def _cached_slot(self) -> int | None:
        """Own slot if it belongs to the cache, else None."""
        return self.state_slot if self._request.own_slot is None else None

    def plan_checkpoint(self, position: int, label: str) -> None:
        """Plan a checkpoint at ``position``, floored to the grid, in addition to those of the
        placement.

        For a position at which another request continues differently. Does nothing if
        the checkpoint is already planned, has a slot or is out of range.

        Raises:
            ValueError: the lease has ended.
            TypeError: ``position`` is not an integer.
        """
        if self._has_ended:
            raise ValueError(ENDED)
        position = require_index(position, "position")
        position -= position % self._step
        if self.cached_len < position <= self.prompt_len:
            self._plan.plan(position, label)

    def is_saving_at(self, position: int) -> bool:
        """Return whether ``take_checkpoint_slots`` returned ``position`` and no ``publish`` covered
        it yet."""
        return self._plan.is_pending(position)

    def continuation(self, tokens: Tokens, max_tokens: int) -> Tokens:
        """Return up to ``max_tokens`` ids that followed ``tokens``, all tokens of the request so
        far.

        O(tokens past ``published_len``).
        """
        return self._cache.continuation(tokens, max_tokens, self._request.namespace, self._node)

    def extend(self, to_len: int) -> bool:
        """Take KV rows for every position below ``to_len``, evicting as needed.

        Returns False, with nothing changed, if that many rows are not available: preempt another
        request. The first success counts the lease as a use of the cache (``touch``) and plans its
        checkpoints. So a request that is refused, aborted and begun again is counted once. O(new
        rows), plus O(log n) per evicted item.

        Raises:
            ValueError: ``to_len`` is negative, or the lease has ended.
            TypeError: ``to_len`` is not an integer.
            PolicyError: an own placement policy, made with ``parse_placement``, has failed. The
                rows are taken.
        """
        if type(to_len) is not int:
            to_len = require_index(to_len, "to_len")
        cache, start = self._cache, self._rows.num_rows
        if to_len <= start:
            if to_len < 0:
                raise ValueError(f"to_len must not be negative (got {to_len}).")
            return True
        if self._has_ended:
            raise ValueError(ENDED)
        page = cache.page_size
        new = cache.allocate_kv(-((start - to_len) // page) * page)
        if new is None:
            return False
        self._rows.append(new)
        steps = cache.steps
        steps.rows_added(self, start)
        if self._unready_since != steps.num_taken:
            self._unready_since, self._unready_from = steps.num_taken, start
        self._note_changed(start, start + len(new))
        if not self._is_counted:
            self._count()
        return True

    def take_checkpoint_slots(self, start: int, end: int) -> tuple[Saved, ...]:
        """Return (position, slot) of each checkpoint to save while computing [start, end).

        Save into ``slot`` the state after exactly ``position`` tokens, before ``publish``.
        Positions are in (start, end]: planned ones in a prefill, the rolling one in decode. A
        position without an available slot is skipped. The rolling checkpoint overwrites its
        predecessor. A caller that works one step ahead, and finds that the request ended before it,
        has neither.

        Raises:
            ValueError: the lease has ended, or has no rows for ``end`` tokens (``extend``), or
                ``start`` is more than ``end``.
        """
        if end > self._rows.num_rows:
            raise self._misuse(end)
        if start > end:
            raise ValueError(f"start must not be more than end (got {start} and {end})")
        saves = self._plan.take(start, end, self._receipt)
        if saves:
            num_taken = self._cache.steps.num_taken
            if self._unready_since != num_taken or start < self._unready_from:
                self._unready_since, self._unready_from = num_taken, start
        return saves

    def num_quiet_tokens(self, computed_len: int) -> int:
        """Return the number of decode steps for which the row and slot calls have no effect.

        During that many tokens after ``computed_len``, ``extend`` and ``take_checkpoint_slots``
        need not be called. It says nothing about ``publish``, which decode does not need. O(1).
        """
        rows = self._rows.num_rows - computed_len
        return min(rows, self._plan.num_before_crossing(computed_len))

    def roll_back(self, computed_len: int, unwritten: bool = False) -> None:
        """Undo the last step past ``computed_len``, because its drafts were rejected.

        Call it before ``publish``, and leave the state after ``computed_len`` tokens in
        ``state_slot``. The rolling checkpoint of a rejected position is dropped together with its
        predecessor, because the step may have overwritten it. With ``unwritten`` the predecessor is
        kept. Pass it only if your engine writes checkpoint slots after acceptance, for positions up
        to ``computed_len``. O(1).

        Raises:
            ValueError: the lease has ended, or tokens past ``computed_len`` are published.
        """
        if self._has_ended or computed_len < self._rows.published_len:
            raise self._misuse(computed_len)
        self._plan.roll_back(computed_len, unwritten)

    def reserve_checkpoint_slots(self, start: int, end: int, max_slots: int) -> int:
        """Take up to ``max_slots`` of the slots that ``take_checkpoint_slots`` would take, and keep
        them.

        Returns how many slots are still missing. For callers that limit the number of slabs emptied
        per step.

        Raises:
            ValueError: as for ``take_checkpoint_slots``.
        """
        if end > self._rows.num_rows:
            raise self._misuse(end)
        return self._plan.reserve(start, end, max_slots, self._receipt)

    def publish(self, tokens: Tokens, computed_len: int) -> tuple[int, int] | None:
        """Pass the computed tokens and finished checkpoints to the tree, and move the lock to the
        new end.

        ``tokens`` are all tokens so far, of which ``computed_len`` are computed. Their KV and
        checkpoints must be written now, because other requests may read them from the next step on.
        Returns (start, end) of the positions with changed rows in ``kv_indices``, because the tree
        already had rows for them, or None if no row changed. O(computed_len - published_len).

        Call it after each piece of the prefill. In decode leave it out: ``finish`` and ``preempt``
        publish the answer as one node, and each call would add a node.

        Raises:
            ValueError: the lease has ended; ``tokens`` are not int32[n], or their new part differs
                from the tokens of the request; ``computed_len`` is less than ``published_len``, or
                more than there are tokens or rows.
            RuntimeError: the tokens were computed before the step plan of their rows and slots was
                carried out (``cache.take_step``).
            TypeError: ``computed_len`` is not an integer.
        """
        self._refuse_uncomputed(tokens, computed_len)
        cache = self._cache
        if self._request.exact:
            computed_len = min(computed_len, self.prompt_len)
        first = self._rows.published_len
        if computed_len - computed_len % cache.page_size <= first:
            return None
        node, num_duplicates = self._insert(tokens, computed_len, self._plan.done(computed_len))
        receipt, before = cache.lock(node), self._receipt
        receipt.superseded, before.superseded = before.superseded, None
        cache.unlock(before)
        self._node, self._receipt = node, receipt
        return (first, first + num_duplicates) if num_duplicates else None

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of an emptied slab (``RunningLease``); called by the cache."""
        num_held = self._rows.rows_moved(move)
        if self._request.table_row is not None:
            self._cache.steps.row_write_due(self)
        return num_held

    def rows_from(self, start: int) -> Indices:
        """Return the known rows of positions from ``start`` on (``RunningLease``)."""
        return self._rows.known_from(start)

    def row_write_taken(self) -> None:
        """Note that a plan contains ``row_write()`` (``RunningLease``)."""
        self._rows.changed = None

    def row_write(self) -> RowWrite | None:
        """Return the positions that are new or have changed (``RunningLease``), or None if there
        are none or the request has no ``table_row``."""
        if self._rows.changed is None or self._request.table_row is None:
            return None
        start, end = self._rows.changed
        return RowWrite(self._request.table_row, start, self._all_rows()[start:end].copy())

    def _note_changed(self, start: int, end: int) -> None:
        if self._request.table_row is not None:
            self._rows.mark(start, end)
            self._cache.steps.row_write_due(self)

    def _refuse_uncomputed(self, tokens: Tokens, computed_len: int) -> None:
        """Raise ValueError unless ``computed_len`` of ``tokens`` can be published, and RuntimeError
        if they were computed before their step plan was carried out.

        O(prompt tokens to publish), a comparison of bytes.
        """
        if type(computed_len) is not int:
            require_index(computed_len, "computed_len")
        rows = self._rows
        if self._has_ended or not rows.published_len <= computed_len <= rows.num_rows:
            raise self._misuse(computed_len)
        if getattr(tokens, "dtype", None) is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        if computed_len > len(tokens):
            raise ValueError(
                f"computed_len is {computed_len}, but there are only {len(tokens)} tokens: pass "
                "all tokens so far"
            )
        if computed_len > self._unready_from:
            steps = self._cache.steps
            if steps.num_done <= self._unready_since and steps.is_due:
                raise RuntimeError(NOT_TAKEN.format(computed_len))
        first = rows.published_len
        asked = self._request.tokens
        if first < self.prompt_len:
            new = slice(first, min(computed_len, self.prompt_len))
            if tokens[new].tobytes() != asked[new].tobytes():
                raise ValueError(
                    f"tokens {new.start} to {new.stop} are not those of the LeaseRequest, as they "
                    "were at begin: pass its tokens, followed by those generated so far"
                )

    def _misuse(self, length: int) -> ValueError:
        """Return the error of a call for ``length`` tokens on a lease that cannot have them."""
        if self._has_ended:
            return ValueError(ENDED)
        rows = self._rows
        if length > rows.num_rows:
            return ValueError(
                f"this lease has KV rows for {rows.num_rows} tokens (got {length}): call extend "
                "first"
            )
        return ValueError(
            f"{rows.published_len} tokens are published and stay so (got {length}): roll back "
            "before publish"
        )

    def _insert(
        self, tokens: Tokens, computed_len: int, saved: dict[Saved, str]
    ) -> tuple[NodeHandle | None, int]:
        """Insert and return (node that ends at the new ``published_len``, number of duplicate
        rows)."""
        cache, rows = self._cache, self._rows
        first = rows.published_len
        inserted_len, duplicates, rejected_slots, node = cache.insert(
            tokens[:computed_len],
            rows.view(0, computed_len),
            tuple(saved),
            self._request.namespace,
            first,
            tuple(saved.values()),
            self._node,
        )
        num_duplicates = len(duplicates)
        rows.publish(inserted_len, num_duplicates)
        if num_duplicates:
            cache.free_kv(duplicates)
            self._note_changed(first, first + num_duplicates)
        if saved:
            self._plan.settle(saved, rejected_slots)
        return node, num_duplicates

    def finish(
        self, tokens: Tokens, computed_len: int, donate: bool = True, stop_reason: str = ""
    ) -> None:
        """Publish the computed tokens and end the lease.

        With ``donate`` the own slot becomes a checkpoint, without a copy, if the placement chose
        this position. Pass False if the own slot does not contain the state after ``computed_len``
        tokens, for example because a step computed ahead.

        ``stop_reason`` says why the answer ended ("tool_use", "end_turn", "stop_sequence",
        "length"). It is "session_end" if no further turn will come, and empty if it is not known.
        Learning eviction policies distinguish these reasons by the label of the conversation's tip
        (``HybridRadixCache.label_tip``).

        Raises:
            ValueError, RuntimeError: as for ``publish``. The lease goes on.
        """
        self._refuse_uncomputed(tokens, computed_len)
        donate = donate and self._plan.wants(computed_len)
        self._end(tokens, computed_len, donate, stop_reason)

    def preempt(self, tokens: Tokens, computed_len: int) -> None:
        """Publish the computed tokens and end the lease, to begin again later.

        The own slot becomes a checkpoint at any grid position, so it must contain the state after
        ``computed_len`` tokens. If a step computes ahead, call ``finish(..., donate=False)``
        instead. Begin again with ``LeaseRequest(tokens, resumes=lease.is_counted)``.

        Raises:
            ValueError, RuntimeError: as for ``publish``. The lease goes on.
        """
        self._refuse_uncomputed(tokens, computed_len)
        self._end(tokens, computed_len, True)

    def _end(self, tokens: Tokens, computed_len: int, donate: bool, stop_reason: str = "") -> None:
        cache = self._cache
        published_len = computed_len
        if self._request.exact:
            published_len = min(computed_len, self.prompt_len)
        own_slot = self._cached_slot
        donate &= computed_len == published_len and computed_len % self._step == 0
        donate &= computed_len > self.match.cached_len
        donated = None
        if own_slot is not None:
            if donate:
                donated = computed_len, own_slot
            else:
                cache.free_slot(own_slot)
        saved = self._plan.end(published_len, donated)
        first_held, tip = self._rows.published_len, self._node
        if saved or published_len > first_held:
            tip, _ = self._insert(tokens, published_len, saved)
            first_held = max(first_held, self._rows.published_len)
        if stop_reason:
            cache.label_tip(tip, stop_reason)
        self._close(first_held)

    def abort(self) -> None:
        """Free everything held and end the lease. Published tokens stay in the tree.

        Does nothing if the lease has ended.
        """
        if self._has_ended:
            return
        self._plan.abort()
        if self._cached_slot is not None:
            self._cache.free_slot(self._cached_slot)
        self._close(self._rows.published_len)

    def _close(self, first_held: int) -> None:
        if first_held < self._rows.num_rows:
            self._cache.free_kv(self._rows.view(first_held, self._rows.num_rows))
        self._cache.steps.close(self)
        self._cache.unlock(self._receipt)
        self._node = self.state_slot = None
        self._has_ended = True
        self._rows.clear()
