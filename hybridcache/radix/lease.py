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

A call that breaks these rules raises ValueError, RuntimeError if a step plan was not taken or not
carried out, or TypeError for a wrong type. Nothing is changed.

Any other exception in the middle of a call, such as a MemoryError or an interrupt, may leave the
lease and its cache half changed. Drop all leases of the cache without a call, and go on with
``cache.rebuilt()``. A placement policy can be kept.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, overload

import numpy as np

from hybridcache.allocators.moves import NOT_CARRIED_OUT, Indices, Move, Transfer
from hybridcache.radix.api import Losses, PrefixMatch, losses_of
from hybridcache.radix.cache import HybridRadixCache, LockHandle
from hybridcache.radix.protocol import (
    NO_BOUNDARIES,
    Item,
    LoadRule,
    Placed,
    PlacementPolicy,
    Prefill,
    PromptBoundaries,
    require_boundaries,
    require_placement,
)
from hybridcache.radix.tokens import (
    EMPTY,
    INT32,
    Tokens,
    immutable,
    require_index,
    require_int32,
    require_seconds,
)
from hybridcache.radix.tree import SESSION_END, NodeHandle

SPARE_ROWS = 512
"""Spare capacity for the rows of a short answer, so that they need no second array."""

STOP_REASONS = frozenset({"tool_use", "end_turn", "stop_sequence", "length", SESSION_END})
"""Reasons why an answer ended, as ``Lease.finish`` takes them."""

Saved = tuple[int, int]
"""(position, slot) of a checkpoint in a held slot, written or about to be written."""


# Owner of the KV row of each token. All borders except computed_len are multiples of page_size.
#
# 0 ............ cached_len ........ published_len ........ computed_len ........ extended_len
#     |  the tree's, since before us     |  ours: held          |  ours: held, not    |
#     |                |  the tree's,    |  (the last partial   |  computed yet       |
#     |                |  published by us|  page at least)      |                     |
#     |<---------- under our lock ------>|<-------- given back at the end ----------->|
#
# `extend` allocates at the right end: free -> held. `publish` hands [published_len, computed_len)
# to the tree: held -> cached, down to whole pages. Where the tree has rows for the same tokens
# already (another request was faster, or their checkpoint had gone), ours are duplicates: we switch
# to the tree's and free ours. Then the lock moves to the node that ends at the new published_len.
#
# `state_slot` is ours from begin to the end: free -> held -> free, or, donated, -> cached. It is
# written in every step; a checkpoint never is, so a lease that resumes starts on a copy. A slot for
# a planned checkpoint is held from `take_checkpoint_slots` until the `publish` that covers its
# position: then cached, or free if the tree would not have it.
#
# In an arena rows get other places when a slab is emptied (`allocators.pools`). No row changes
# hands by that: the lease renames its own, and the next step plan carries the new numbers.


class LeaseRequest(NamedTuple):
    """Input of ``Lease.begin``."""

    tokens: Tokens
    """Tokens known before computing: the prompt, or after a preemption the prompt and the tokens
    generated so far. At least one. ``begin`` copies them."""
    namespace: Hashable = None
    """Requests in different namespaces share nothing: None, a str, bytes, an int or a tuple of
    these."""
    boundaries: PromptBoundaries = NO_BOUNDARIES
    """Positions that later prompts are known to keep, and whether they keep the answer."""
    reuse: bool = True
    """Whether to read cached entries. Set it to False to get the logits of every position; the
    result is published nevertheless. ``cache.stats`` does not count such a request."""
    exact: bool = False
    """Whether to publish nothing past ``tokens``, so that all cached entries were computed by
    prefills."""
    stateful: bool = True
    """Whether the model has linear layers. If not, no slot is taken and no checkpoint planned."""
    table_row: int | None = None
    """Row of this request in the caller's request table, or None. With it, ``cache.take_step()``
    lists every position with a new or changed KV row (``RowWrite``). No two running requests have
    the same one; only ``CacheConfig.debug`` checks it."""
    own_slot: int | None = None
    """State slot of the request, if running states are stored outside of the cache's memory. If
    None, a slot of the cache is taken, and may be donated. An own slot is not donated, and no two
    running requests have the same one.
    ``StepPlan.restores`` then names a slot of the cache first, and this number of your own memory
    second."""
    resumes: bool = False
    """Whether the request continues one that is counted in ``cache.stats`` already: the
    ``is_counted`` of its preempted lease. Its hits and losses are then not added again. Policies
    learn from it as from any other."""
    returns_within_s: float | None = None
    """Promise of the client to send the next turn within this time after the answer, in seconds, or
    None. Until then ``survival`` evicts other entries of the namespace first, those of less value
    than a certain use within that time: the shorter the time, the more. Other policies ignore it.
    A broken promise costs the namespace the entries that were evicted instead."""
    session: str = ""
    """Client's name of the session, unique in its namespace; "" if that is not known. At its end
    (``finish`` with ``session_end``) all checkpoints that only this session used are superseded,
    and evicted first."""


NO_STATES = (
    "a request with a state needs room for one: build a hybrid cache with num_slots or more "
    "total_bytes. A model without linear layers needs a cache with prefix_cache='radix', and "
    "stateful=False"
)
NEEDS_STATES = (
    "a request without states reuses nothing in a hybrid cache: build the cache with "
    "prefix_cache='radix', or pass stateful=True"
)
NOT_READY = (
    "tokens up to {} were computed before a step plan restored the state that they follow, or "
    "moved the entries in their rows or slots, so these are lost: abort all leases, unlock all "
    "nodes and call cache.reset(). Call cache.take_step().carry_out(memory) after all begin, "
    "extend and take_checkpoint_slots of a step, before computing, or .done() without tensors"
)
ENDED = "this lease has ended (finish, preempt or abort was called): begin a new one"


class Lease:
    """Claim of one request on a cache.

    Made by ``begin``. After ``finish``, ``preempt`` or ``abort`` it holds nothing: ``kv_indices``
    is empty and ``state_slot`` is None. ``abort`` then does nothing, and every other call that
    takes, plans or publishes raises ValueError. ``match``, ``cached_len``, ``losses`` and
    ``is_counted`` keep their values. A ``with`` block aborts a lease that has not ended.

    The placement policy is notified of each planned checkpoint, whether saved or dropped.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, Lease, LeaseRequest
    >>> from hybridcache import build_prefix_cache, parse_placement
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

    def __init__(
        self,
        cache: HybridRadixCache,
        placement: PlacementPolicy,
        request: LeaseRequest,
        tokens: Tokens,
        match: PrefixMatch,
        lock: LockHandle,
        state_slot: int | None,
    ) -> None:
        """Take ownership of ``lock``, which is on ``match.node``, and of ``state_slot``; see
        ``begin``. ``tokens`` are those of ``request``, in memory that cannot change."""
        cached_len = match.cached_len
        self.cache = cache
        """Cache in which the request has its claims."""
        self._placement = placement
        self._request = request
        self._tokens = tokens
        self._lock = lock
        self._step = cache.checkpoint_grid
        self._has_ended = False
        self.match = match
        """Match from which the request resumes, with its final losses."""
        self.prompt_len = len(request.tokens)
        """Number of tokens of the request, which are prefilled."""
        self.cached_len = cached_len
        """Number of tokens that need not be computed."""
        self.is_counted = request.resumes
        """Whether ``cache.stats`` contains this request: it has had rows and may ``reuse`` entries,
        or it ``resumes``."""
        self.state_slot = state_slot
        """State slot of the request, to be written in every step: the state after the computed
        tokens. None for attention-only models, and after the end."""
        self.extended_len = cached_len
        """Number of positions that have a row: at least the ``to_len`` of the last ``extend``."""
        self.published_len = cached_len
        """Number of tokens with rows that belong to the tree, under the lock of this lease."""
        self._rows: Indices = np.empty(self.prompt_len + cache.page_size + SPARE_ROWS, INT32)
        self._unread_len = cached_len
        """Number of first positions whose rows are read from the tree when they are needed."""
        # Slabs of the arena in which the rows below _indexed_len are, and possibly more.
        self._slabs: set[int] = set()
        self._indexed_len = 0
        self._awaited: list[Transfer] | None = None
        """Transfers that were due when rows or slots were taken for tokens from ``_awaited_from``
        on. They are in no plan yet while this is the list of the step queue."""
        self._awaited_from = 0
        self._planned: dict[int, Placed] = {}
        """Planned checkpoints without a slot yet, by position, of descending priority."""
        self._pending: dict[Saved, Placed] = {}
        """Checkpoints with a slot, until they are published."""
        self._interval: int | None = None
        """Distance of the checkpoints of decode, or None if there are none."""
        self._rolling: Saved | None = None
        """The one checkpoint of decode. It is overwritten at each crossing."""
        self._overwritten: Saved | None = None
        """Earlier contents of the rolling slot, until they are overwritten for certain."""
        if cache.arena is not None:
            cache.arena.holders[self] = None
        if cached_len:
            self._note_changed(0, cached_len)
        if match.resumed is not None and state_slot is not None:
            cache.steps.restores[self] = match.resumed.slot, state_slot

    @classmethod
    def begin(
        cls,
        cache: HybridRadixCache,
        placement: PlacementPolicy,
        request: LeaseRequest,
        exchange: LoadRule | None = None,
    ) -> Lease | None:
        """Match the tokens, lock the result, take a state slot, and load from tiers if that saves
        time.

        Returns None, with nothing held, if no slot is available: keep the request in the queue. If
        the only available slot is that of the matching checkpoint, the request resumes from the
        next shallower one, and ``losses.refused`` counts the difference. With ``reuse=False`` it
        counts the whole match.

        ``placement`` is one object for all requests of a cache, because it can learn.
        ``parse_placement`` makes one. ``exchange`` decides which offloaded prefixes to load.
        Without it nothing is loaded. A loaded checkpoint belongs to the cache like any other.
        O(len(tokens)).

        Raises:
            ValueError: the tokens are empty or not int32[n]; the namespace is malformed; the
                request has a state and the cache has no memory for one; or it has none and the
                cache is a hybrid one.
            TypeError: ``placement`` is not one of ``parse_placement``, or a field of the request or
                the result of ``exchange`` has another type.
            PolicyError: an own eviction policy has failed. Nothing is held.
        """
        # ``isinstance`` takes much longer for an abstract class.
        if PlacementPolicy not in type(placement).__mro__ or not placement.is_guarded:
            require_placement(placement)
        tokens, namespace, slot = request.tokens, request.namespace, request.own_slot
        if not request.stateful:
            slot = None
            if cache.needs_states:
                raise ValueError(NEEDS_STATES)
        elif not cache.item_bytes.state:
            raise ValueError(NO_STATES)
        if type(tokens) is not np.ndarray or tokens.dtype is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        if not len(tokens):
            raise ValueError("a request needs at least one token (got no tokens)")
        if request.boundaries is not NO_BOUNDARIES:
            require_boundaries(request.boundaries)
        if (promised_s := request.returns_within_s) is not None:
            require_seconds(promised_s, "returns_within_s")
        if type(request.session) is not str:
            raise TypeError(f"session must be a text (got {request.session!r}).")
        for what, number in (("table_row", request.table_row), ("own_slot", slot)):
            if number is not None and type(number) is not int:
                require_index(number, what, 0)
        # The caller may change its array before the tokens are published.
        tokens = immutable(tokens)
        match = found = cache.match(tokens, namespace)
        if not request.reuse:
            match = found._replace(cached_len=0, node=None, resumed=None, loadable=())
        # Nothing is held yet, so the exchange of a user may raise.
        best = None if exchange is None else match.best_load(exchange)
        lock = cache.lock(match.node)
        try:
            if request.stateful and slot is None:
                slot = cache.allocate_slot()
                if slot is None and match.cached_len:
                    # The only slot may be that of the checkpoint just locked.
                    cache.unlock(lock)
                    slot = cache.allocate_slot()
                    again = cache.match(tokens, namespace)
                    match = found._replace(
                        cached_len=again.cached_len,
                        node=again.node,
                        resumed=again.resumed,
                        loadable=again.loadable,
                    )
                    lock = cache.lock(match.node)
                if slot is None:
                    if not cache.num_slots:
                        raise ValueError(NO_STATES)
                    cache.unlock(lock)
                    return None
            if best is not None and cache.load(best):
                match, before = cache.match(tokens, namespace), lock
                lock = cache.lock(match.node)
                cache.unlock(before)
            step = None if cache.offload is None else cache.checkpoint_grid
            if match is not found or step is not None:
                loadable_len = match.loadable[-1].position if match.loadable else 0
                losses = losses_of(found, match.cached_len, loadable_len, step)
                match = match._replace(losses=losses)
            kind: type[Lease] = cache.lease_kind or cls
            lease = kind(cache, placement, request, tokens, match, lock, slot)
        except BaseException:
            cache.unlock(lock)
            if slot is not None and request.own_slot is None:
                cache.free_slot(slot)
            raise
        return lease

    def __enter__(self) -> Lease:
        """Return the lease, to be aborted at the end of the block unless it has ended before."""
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def __repr__(self) -> str:
        if self._has_ended:
            return "Lease(ended)"
        return (
            f"Lease(prompt_len={self.prompt_len}, cached_len={self.cached_len}, "
            f"published_len={self.published_len}, extended_len={self.extended_len}, "
            f"state_slot={self.state_slot})"
        )

    # --- Reading ----------------------------------------------------------------------------------

    @property
    def losses(self) -> Losses:
        """Prompt tokens to compute, by cause. With ``cached_len`` they sum to the prompt length."""
        return self.match.losses

    @property
    def node(self) -> NodeHandle | None:
        """Node that ends at ``published_len``, which the lease has locked. None at 0."""
        return self._lock.node

    @property
    def kv_indices(self) -> Indices:
        """KV rows of all positions so far: int32[``extended_len``], a read-only view.

        Read it again in every step, after ``take_step``: rows of an arena move, and ``publish``
        replaces duplicates. O(1), but O(``published_len``) if rows of the tree were not read yet.
        """
        if self._unread_len:
            self._read_rows()
        rows = self._rows[: self.extended_len]
        rows.flags.writeable = False
        return rows

    def _read_rows(self) -> None:
        """Copy the rows of the tree that were not read yet. O(``published_len``)."""
        unread_len, self._unread_len, self._indexed_len = self._unread_len, 0, 0
        self._rows[:unread_len] = self.cache.gather(self._lock.node)[:unread_len]

    @property
    def planned(self) -> tuple[int, ...]:
        """Positions at which this prefill should still save a checkpoint, ascending.

        Empty before the first successful ``extend``, except for those of ``plan_checkpoint``.
        """
        return tuple(sorted(self._planned))

    @property
    def held_tokens(self) -> int:
        """Number of held KV rows."""
        return self.extended_len - self.published_len

    @property
    def held_slots(self) -> int:
        """Number of held state slots: the own one, and those of unpublished checkpoints."""
        has_slot = self.state_slot is not None and self._request.own_slot is None
        return has_slot + len(self._pending) + (self._rolling is not None)

    def is_saving_at(self, position: int) -> bool:
        """Return whether ``take_checkpoint_slots`` returned ``position`` and no ``publish`` covered
        it yet."""
        return any(position == saved for saved, _ in self._pending)

    def num_quiet_tokens(self, computed_len: int) -> int:
        """Return the number of decode steps for which the row and slot calls have no effect.

        During that many tokens after ``computed_len``, ``extend`` and ``take_checkpoint_slots``
        need not be called. O(1).
        """
        num_rows, interval = max(self.extended_len - computed_len, 0), self._interval
        rest = num_rows if interval is None else interval - 1 - computed_len % interval
        return min(num_rows, rest)

    # --- Rows -------------------------------------------------------------------------------------

    def extend(self, to_len: int) -> bool:
        """Take KV rows for every position below ``to_len``, evicting as needed.

        Returns False, with nothing changed, if that many rows are not available: preempt another
        request. The first success counts the lease as a use of the cache (``touch``) and plans its
        checkpoints. So a request that is refused, aborted and begun again is counted once. O(new
        rows), plus O(log n) per evicted item. Raises PolicyError if an own placement policy has
        failed; the rows are then taken.
        """
        if self._has_ended:
            raise ValueError(ENDED)
        if type(to_len) is not int:
            require_index(to_len, "to_len")
        cache, start = self.cache, self.extended_len
        if to_len <= start:
            return True
        new = cache.allocate_kv(to_len - start)
        if new is None:
            return False
        end = start + len(new)
        if end > len(self._rows):
            larger = np.empty(max(end, 2 * len(self._rows)), np.int32)
            larger[:start] = self._rows[:start]
            self._rows = larger
        self._rows[start:end] = new
        self.extended_len = end
        if cache.steps.transfers:
            self._await_transfers(start)
        self._note_changed(start, end)
        if start == self.cached_len:
            self._count()
        return True

    def _await_transfers(self, start: int) -> None:
        """Note that tokens from ``start`` on need the transfers that are due now."""
        due = self.cache.steps.transfers
        self._awaited_from = min(start, self._awaited_from) if due is self._awaited else start
        self._awaited = due

    def _note_changed(self, start: int, end: int) -> None:
        """Put the rows of positions [start, end) into the next step plan, if the request has a row
        of the request table."""
        writes, table_row = self.cache.steps.row_writes, self._request.table_row
        if table_row is not None:
            _, first, last = writes.get(self, (table_row, start, end))
            writes[self] = table_row, min(start, first), max(end, last)

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of an emptied slab (``RowHolder``), and return how many of them are held.
        O(rows added since the last move), and O(``extended_len``) if rows are in that slab."""
        slab_rows, start = len(move.new_rows), self._unread_len
        added = self._rows[max(start, self._indexed_len) : self.extended_len]
        self._slabs.update(np.bincount(added // slab_rows).nonzero()[0].tolist())
        self._indexed_len = self.extended_len
        if move.slab not in self._slabs:
            return 0
        self._slabs.discard(move.slab)
        self._slabs.update(np.bincount(move.dst // slab_rows).nonzero()[0].tolist())
        moved = move.rename(self._rows[start : self.extended_len]) + start
        if len(moved):
            self._note_changed(int(moved[0]), int(moved[-1]) + 1)
        return len(moved) - int(moved.searchsorted(self.published_len))

    def _count(self) -> None:
        """Count the lease as a use and plan its checkpoints, when it gets its first memory."""
        request, match, placement, cache = self._request, self.match, self._placement, self.cache
        evicted: tuple[Item, ...] = ()
        if request.reuse:
            self.is_counted = True
            cache.touch(match, request.resumes)
        if not request.stateful:
            return
        if request.reuse:
            if match.resumed is not None:
                placement.on_hit(match.resumed)
            if match.missed is not None:
                placement.on_ghost_hit(match.missed, match.missed_tokens)
                lost = cache.evicted(match)
                evicted = tuple(one for one in lost if one.position > match.cached_len)
        prefill = Prefill(
            prompt_len=self.prompt_len,
            cached_len=match.cached_len,
            kv_match_len=match.kv_match_len,
            seen_len=match.seen_len,
            boundaries=request.boundaries.positions,
            grid=self._step,
            resumed=match.resumed,
            evicted=evicted,
            forks=match.forks,
            answer_survives=request.boundaries.answer_survives and not request.exact,
            free_slots=cache.free_slots,
            num_checkpoints=cache.num_checkpoints,
            shares_memory=cache.shares_memory,
        )
        placement.on_prefill(prefill)
        for placed in prefill.on_grid(placement.plan(prefill)):
            self._planned.setdefault(placed.position, placed)
        if prefill.answer_survives:
            interval = placement.decode_interval()
            if interval is not None:
                self._interval = -(-interval // self._step) * self._step

    # --- Checkpoints ------------------------------------------------------------------------------
    #
    # A planned position gets a slot shortly before it is computed, and keeps it until the `publish`
    # that covers the position. Decode has one rolling slot: it is overwritten at each crossing and
    # published only at the end.

    def plan_checkpoint(self, position: int, label: str) -> None:
        """Plan a checkpoint at ``position``, floored to the grid, in addition to those of the
        placement.

        For a position at which another request continues differently. Does nothing if
        the checkpoint is already planned, has a slot or is out of range.
        """
        if self._has_ended:
            raise ValueError(ENDED)
        require_index(position, "position")
        position -= position % self._step
        if self.cached_len < position <= self.prompt_len and not self.is_saving_at(position):
            self._planned.setdefault(position, Placed(position, label))

    @overload
    def take_checkpoint_slots(
        self, start: int, end: int, max_slots: None = None
    ) -> tuple[Saved, ...]: ...

    @overload
    def take_checkpoint_slots(
        self, start: int, end: int, max_slots: int | None
    ) -> tuple[Saved, ...] | None: ...

    def take_checkpoint_slots(
        self, start: int, end: int, max_slots: int | None = None
    ) -> tuple[Saved, ...] | None:
        """Return (position, slot) of each checkpoint to save while computing [start, end).

        Save into ``slot`` the state after exactly ``position`` tokens, before ``publish``.
        Positions are in (start, end]: planned ones in a prefill, the rolling one in decode. A
        position without an available slot is skipped. The rolling checkpoint overwrites its
        predecessor. A caller that works one step ahead, and finds that the request ended before it,
        has neither.

        ``max_slots`` limits the new slots, for callers that limit the number of slabs emptied per
        step. Returns None if more are needed, which is never so without a limit. Those taken are
        kept: call again in the next step.
        """
        if type(start) is not int or type(end) is not int:
            require_index(start, "start")
            require_index(end, "end")
        if self._has_ended or not self.published_len <= start <= end <= self.extended_len:
            raise self._misuse(start, end)
        if start >= self.prompt_len:
            return self._roll(start, end, max_slots)
        num_taken = 0
        for position, placed in tuple(self._planned.items()):
            if start < position <= end:
                if max_slots is not None and num_taken >= max_slots:
                    return None
                slot = self.cache.allocate_slot()
                if slot is None:
                    break
                del self._planned[position]
                self._pending[position, slot] = placed
                num_taken += 1
                if self.cache.steps.transfers:
                    self._await_transfers(start)
        return tuple(sorted([saved for saved in self._pending if start < saved[0] <= end]))

    def _roll(self, start: int, end: int, max_slots: int | None) -> tuple[Saved, ...] | None:
        """Move the rolling checkpoint to the last position in (start, end] at which decode saves a
        state, if there is one."""
        interval = self._interval
        if interval is None or (position := end // interval * interval) <= start:
            return ()
        if (rolling := self._rolling) is not None:
            slot = rolling[1]
        elif max_slots is not None and max_slots <= 0:
            return None
        elif (new := self.cache.allocate_slot(self._lock)) is None:
            return ()
        else:
            slot = new
            if self.cache.steps.transfers:
                self._await_transfers(start)
        if rolling is None or rolling[0] != position:
            self._overwritten, self._rolling = rolling, (position, slot)
        return ((position, slot),)

    def roll_back(self, computed_len: int, unwritten: bool = False) -> None:
        """Undo the last step past ``computed_len``, because its drafts were rejected.

        Call it before ``publish``, and leave the state after ``computed_len`` tokens in
        ``state_slot``. The rolling checkpoint of a rejected position is dropped together with its
        predecessor, because the step may have overwritten it. With ``unwritten`` the predecessor is
        kept. Pass it only if your engine writes checkpoint slots after acceptance, for positions up
        to ``computed_len``. O(1).
        """
        require_index(computed_len, "computed_len")
        if self._has_ended or not self.published_len <= computed_len <= self.extended_len:
            raise self._misuse(computed_len)
        rolling = self._rolling
        if rolling is not None and rolling[0] > computed_len:
            self._rolling = self._overwritten if unwritten else None
            if self._rolling is None:
                self.cache.free_slot(rolling[1])

    # --- Publishing -------------------------------------------------------------------------------

    def publish(self, tokens: Tokens, computed_len: int) -> None:
        """Pass the computed tokens and finished checkpoints to the tree, and move the lock to the
        new end.

        ``tokens`` are all tokens so far, of which ``computed_len`` are computed. Those before
        ``published_len`` are not read again. KV and checkpoints up to ``computed_len`` must be
        written now, because other requests may read them from the next step on. ``kv_indices``
        changes where the tree already had rows. O(computed_len - published_len), or O(computed_len)
        if rows changed.

        Call it after each piece of the prefill. In decode leave it out: ``finish`` and ``preempt``
        publish the answer as one node, and each call would add a node.

        Raises:
            ValueError: the lease has ended; ``tokens`` are not int32[n], or their new part differs
                from the tokens of the request; ``computed_len`` is less than ``published_len``, or
                more than there are tokens or rows.
            RuntimeError: the last step plan was taken but not carried out; or no step plan was
                taken that restores the state from which the request resumes, or moves the entries
                in its new rows and slots.
        """
        self._require_computed(tokens, computed_len)
        if self._request.exact:
            computed_len = min(computed_len, self.prompt_len)
        if computed_len - computed_len % self.cache.page_size > self.published_len:
            self._insert(tokens, computed_len)

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
        (``HybridRadixCache.label_tip``). At the end of a session that tip is superseded, and so is
        all that only this session used. Raises the
        errors of ``publish``, and ValueError for another ``stop_reason``. The lease then goes on.
        """
        self._require_computed(tokens, computed_len)
        if stop_reason and stop_reason not in STOP_REASONS:
            known = ", ".join(sorted(STOP_REASONS))
            raise ValueError(f"stop_reason must be one of {known}, or empty (got {stop_reason!r}).")
        is_answer = computed_len > self.prompt_len
        donate &= self._interval is not None if is_answer else computed_len in self._planned
        self._end(tokens, computed_len, donate, stop_reason)

    def preempt(self, tokens: Tokens, computed_len: int) -> None:
        """Publish the computed tokens and end the lease, to begin again later.

        The own slot becomes a checkpoint at any grid position, so it must contain the state after
        ``computed_len`` tokens. If a step computes ahead, call ``finish(..., donate=False)``
        instead. Begin again with ``LeaseRequest(tokens, resumes=lease.is_counted)``. Raises the
        errors of ``publish``; the lease then goes on.
        """
        self._require_computed(tokens, computed_len)
        self._end(tokens, computed_len, True, None)

    def abort(self) -> None:
        """Free everything held and end the lease, unless it has ended. Published tokens stay in the
        tree."""
        if not self._has_ended:
            self._end(EMPTY, 0, False, None)

    def _end(
        self, tokens: Tokens, computed_len: int, donate: bool, stop_reason: str | None
    ) -> None:
        """Publish the computed tokens and their checkpoints, and return everything else that is
        held. With ``donate`` the own slot is one of these checkpoints, if it can be.
        ``stop_reason`` is None if the answer was not finished."""
        cache, placement, own_slot = self.cache, self._placement, self.state_slot
        published_len = computed_len
        if self._request.exact:
            published_len = min(computed_len, self.prompt_len)
        if self._request.own_slot is not None:
            own_slot = None  # It is not the cache's, and stays with the caller.
        pending, planned = self._pending, self._planned
        if self._rolling is not None:
            pending[self._rolling] = Placed(self._rolling[0], "decode")
        is_possible = donate and self.cached_len < computed_len == published_len
        if is_possible and own_slot is not None and computed_len % self._step == 0:
            is_prompt = computed_len <= self.prompt_len
            kept = Placed(computed_len, "preempt" if is_prompt else "decode")
            pending[computed_len, own_slot] = planned.pop(computed_len, kept)
            own_slot = self.state_slot = None
        self._planned, self._rolling = {}, None
        for saved in [saved for saved in pending if saved[0] > published_len]:
            cache.free_slot(saved[1])
            placement.on_dropped(pending.pop(saved))
        for placed in planned.values():
            placement.on_dropped(placed)
        tip: NodeHandle | None = self._lock.node
        if pending or published_len > self.published_len:
            tip = self._insert(tokens, published_len, is_last=True)
        if stop_reason is not None:
            request = self._request
            cache.label_tip(tip, stop_reason, request.returns_within_s, request.session)
        held = self._rows[self.published_len : self.extended_len]
        self.state_slot, self._has_ended, self._pending = None, True, {}
        self._rows, self._tokens = EMPTY, EMPTY  # Planners keep ended leases.
        self.extended_len = self.published_len = self._unread_len = 0
        cache.steps.restores.pop(self, None)
        cache.steps.row_writes.pop(self, None)
        if cache.arena is not None:
            del cache.arena.holders[self]
        cache.unlock(self._lock)
        if len(held):
            cache.take_back(held)
        if own_slot is not None:  # Last: it raises if the caller has freed the slot.
            cache.free_slot(own_slot)

    def _insert(
        self, tokens: Tokens, computed_len: int, is_last: bool = False
    ) -> NodeHandle | None:
        """Publish up to ``computed_len`` with the pending checkpoints there, move the lock to the
        new end unless this ``is_last``, and notify the placement policy.

        Returns the node that ends at the new ``published_len``. Duplicate rows, and the slots that
        the tree has not taken, are freed.
        """
        cache, first, before, saved = self.cache, self.published_len, self._lock, self._pending
        later = {one: placed for one, placed in saved.items() if one[0] > computed_len}
        saved = {one: placed for one, placed in saved.items() if one not in later}
        ids, rows = tokens[first:computed_len].tobytes(), self._rows[:computed_len]
        self.published_len, duplicates, rejected_slots, node = cache.publish(
            ids, rows, saved.items(), self._request.namespace, first, before.node
        )
        self._pending = later
        if len(duplicates):
            cache.take_back(duplicates)
        if not is_last:
            self._lock = lock = cache.lock(node)
            if before.superseded is not None:
                lock.superseded, before.superseded = before.superseded, None
            cache.unlock(before)
            if len(duplicates):
                self._unread_len = end = first + len(duplicates)
                self._note_changed(first, end)
                if self._request.table_row is not None:
                    self._read_rows()  # Now: later moves are noted for rows that were read.
        for (_, slot), placed in saved.items():
            if slot in rejected_slots:
                cache.free_slot(slot)
                self._placement.on_dropped(placed)
            else:
                self._placement.on_saved(placed)
        return node

    def _require_computed(self, tokens: Tokens, computed_len: int) -> None:
        """Raise ValueError unless that many ``tokens`` can be published, and RuntimeError if the
        last plan was not carried out, or the work that its tokens need is in none.

        O(prompt tokens to publish), a comparison of bytes.
        """
        first = self.published_len
        if type(computed_len) is not int:
            require_index(computed_len, "computed_len")
        if self._has_ended or not first <= computed_len <= self.extended_len:
            raise self._misuse(computed_len)
        if type(tokens) is not np.ndarray or tokens.dtype is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        if computed_len > len(tokens):
            raise ValueError(
                f"computed_len is {computed_len}, but there are only {len(tokens)} tokens: pass "
                "all tokens so far"
            )
        steps = self.cache.steps
        if computed_len > first:
            if steps.open_plan is not None and not steps.open_plan.is_done:
                raise RuntimeError(NOT_CARRIED_OUT)
            is_awaited = self._awaited is steps.transfers and computed_len > self._awaited_from
            if is_awaited or self in steps.restores:
                raise RuntimeError(NOT_READY.format(computed_len))
        end = min(self.prompt_len, computed_len)
        if first < end and tokens is not self._tokens:
            new = np.ascontiguousarray(tokens[first:end])
            prompt = self._tokens.base
            assert isinstance(prompt, bytes)
            if not prompt.startswith(new.data, first * new.itemsize):
                raise ValueError(
                    f"tokens {first} to {end} are not those of the LeaseRequest, as they were at "
                    "begin: pass its tokens, followed by those generated so far"
                )

    def _misuse(self, *lengths: int) -> ValueError:
        """Return the error of a call for ``lengths`` that this lease cannot have."""
        if self._has_ended:
            return ValueError(ENDED)
        return ValueError(
            f"{self.published_len} tokens are published, and {self.extended_len} have KV rows (got "
            f"{' and '.join(map(str, lengths))}): call extend first, and roll back before publish"
        )
