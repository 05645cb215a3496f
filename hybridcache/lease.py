"""A request's claim on the cache, from its match to its last token.

One request's claims on a prefix cache, from its match to its release: integers only.

The engine's cache manager and the simulator drive this same class, so a policy that was studied is
the policy that is served. The tensors' side (copying a state, writing KV, filling a request table)
is the caller's.

Life of a lease: ``begin`` (match, lock, own state slot), then per piece of work ``extend`` (KV for
it), ``take_checkpoint_slots`` (checkpoint slots for planned positions in it), the computation,
``publish`` (what was computed goes to the tree), and in the end exactly one of ``finish``,
``preempt`` and ``abort``, after which nothing is held.

A record of everything that leases did to one cache, in order, and its replay on another.

The engine can keep one while it serves; replaying it on a fresh cache of the same sizes and
policies takes the very same decisions, hit for hit and eviction for eviction, without a model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from hybridcache.allocators.moves import Move, RowWrite
from hybridcache.api import Losses, PrefixCache, PrefixMatch, losses_of
from hybridcache.policies.protocol import FetchRule, PlacementPolicy, Prefill
from hybridcache.tokens import Indices, Tokens

SPARE_ROWS = 512
"""Room for the rows of a short answer, so that they need no second array."""


class LeaseRows:
    """Rows of one lease: the tree's in [0, ``published_len``), held ones in [``published_len``,
    ``num_rows``)."""

    __slots__ = (
        "_rows",
        "_unread_end",
        "_unread_start",
        "changed",
        "num_rows",
        "published_len",
    )

    def __init__(self, cached_len: int, num_expected: int) -> None:
        """The tree's for ``cached_len`` positions, and room for ``num_expected``."""
        self.num_rows = cached_len
        self.published_len = cached_len
        # Rows in [_unread_start, _unread_end) are the tree's and stand in it alone: a caller that
        # moves no tensors never asks for them. All others are here, up to date.
        self._unread_start, self._unread_end = 0, cached_len
        self._rows: Indices = np.empty(num_expected + SPARE_ROWS, np.int32)
        self.changed: tuple[int, int] | None = None
        """(start, end) of the marked positions; None if there are none."""

    @property
    def unread_len(self) -> int:
        """How far the tree's rows must be known for ``view``; 0: all are. O(1)."""
        return self._unread_end if self._unread_start < self._unread_end else 0

    def read(self, gathered: Indices) -> None:
        """Copy the rows that were not read from ``gathered``, the tree's from the first position
        on. O(``unread_len``)."""
        start, end = self._unread_start, self._unread_end
        self._rows[start:end] = gathered[start:end]
        self._unread_start = end

    def view(self, start: int, end: int) -> Indices:
        """Of positions [start, end): int32, a view; what was not read is undefined. O(1)."""
        return self._rows[start:end]

    def append(self, rows: Indices) -> None:
        """Hold ``rows``, int32[k], for the next k positions. O(k), and amortised what is there."""
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
        """The rows below ``to_len`` are the tree's, and the first ``num_duplicates`` of those that
        were held are others now than were here. O(1)."""
        first = self.published_len
        self.published_len = to_len
        if num_duplicates:
            if self._unread_start == self._unread_end:
                self._unread_start = first
            self._unread_end = first + num_duplicates

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of an emptied slab; return how many of them are held. O(``num_rows``), a
        nanosecond each."""
        first_known = self._unread_end
        moved = move.rename(self._rows[first_known : self.num_rows]) + first_known
        num_held = len(moved) - int(np.searchsorted(moved, self.published_len))
        if self._unread_start:
            moved = np.concatenate((move.rename(self._rows[: self._unread_start]), moved))
        if len(moved):
            self.mark(int(moved[0]), int(moved[-1]) + 1)
        return num_held

    def known_from(self, start: int) -> Indices:
        """Return the rows of positions from ``start`` on, without those not read. O(k)."""
        if self._unread_start == self._unread_end:
            return self._rows[start : self.num_rows]
        before = self._rows[start : self._unread_start]
        return np.concatenate((before, self._rows[max(start, self._unread_end) : self.num_rows]))

    def mark(self, start: int, end: int) -> None:
        """Note that the rows of positions [start, end) are new or have changed. O(1)."""
        if self.changed is not None:
            start, end = min(start, self.changed[0]), max(end, self.changed[1])
        self.changed = start, end

    def clear(self) -> None:
        """Forget them all: the lease has ended. O(1)."""
        self.num_rows = self.published_len = self._unread_start = self._unread_end = 0
        self.changed = None


Saved = tuple[int, int]
"""(position, slot) of a checkpoint that is, or is being, written to a held slot."""


class Saving:
    """Checkpoint plan of one lease.

    A position is planned, gets a slot when it is about to be computed, and keeps it until the
    ``publish`` that covers the position. In decode one slot rolls: it is written again at each
    crossing and published only at the end. The placement learns of each planned checkpoint whether
    it was saved or dropped.
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
        """``step``: checkpoints sit on its multiples."""
        self._cache = cache
        self._placement = placement
        self._step = step
        self._prompt_len = prompt_len
        self._plan: dict[int, str] = {}
        self._pending: dict[Saved, str] = {}
        self._rolling: Saved | None = None
        self._overwritten: Saved | None = None
        """Earlier contents of the rolling slot, for as long as it may still hold them."""
        self._interval: int | None = None

    def ask(self, prefill: Prefill) -> None:
        """Plan what the placement wants of ``prefill``, and of its answer."""
        plan, step = self._plan, self._step
        for position, label in prefill.on_grid(self._placement.plan(prefill)).items():
            plan.setdefault(position, label)
        if prefill.answer_survives:
            interval = self._placement.decode_interval()
            if interval is not None:
                self._interval = -(-interval // step) * step

    @property
    def planned(self) -> tuple[int, ...]:
        """Positions that have no slot yet, ascending."""
        return tuple(sorted(self._plan))

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots held."""
        rolling = (self._rolling[1],) if self._rolling is not None else ()
        return (*(slot for _, slot in self._pending), *rolling)

    def plan(self, position: int, label: str) -> None:
        """Plan a checkpoint, unless one at ``position`` has its slot already."""
        if not self.is_pending(position):
            self._plan.setdefault(position, label)

    def is_pending(self, position: int) -> bool:
        """Return whether a checkpoint at ``position`` has its slot and waits for its
        ``publish``."""
        return any(saved == position for saved, _ in self._pending)

    def wants(self, position: int) -> bool:
        """Return whether a state at ``position``, where the request ends, is one to keep."""
        if position > self._prompt_len:
            return self._interval is not None
        return position in self._plan

    def take(self, start: int, end: int) -> tuple[Saved, ...]:
        """See ``Lease.take_checkpoint_slots``."""
        if start >= self._prompt_len:
            return self._roll(start, end)
        if not self._plan and not self._pending:
            return ()
        self._save(start, end, len(self._plan))
        return tuple(sorted(saved for saved in self._pending if start < saved[0] <= end))

    def reserve(self, start: int, end: int, max_slots: int) -> int:
        """See ``Lease.reserve_checkpoint_slots``."""
        if start >= self._prompt_len:
            rolls = self._rolling is None and bool(self._crossing(start, end))
            if rolls and max_slots:
                self._roll(start, end)
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

    def _roll(self, start: int, end: int) -> tuple[Saved, ...]:
        position = self._crossing(start, end)
        if position is None:
            return ()
        slot = self._rolling[1] if self._rolling else self._cache.allocate_slot()
        if slot is None:
            return ()
        if self._rolling is None or self._rolling[0] != position:
            self._overwritten, self._rolling = self._rolling, (position, slot)
        return ((position, slot),)

    def roll_back(self, computed_len: int) -> None:
        """See ``Lease.roll_back``."""
        if self._rolling is None or self._rolling[0] <= computed_len:
            return
        if self._overwritten is None:
            self._cache.free_slot(self._rolling[1])
        self._rolling = self._overwritten

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
        """Hand over the checkpoints of a prefill whose positions are computed, with their labels.
        ``settle`` is owed for them."""
        done = self._pending
        if not done:
            return done
        later: dict[Saved, str] = {}
        if max(done)[0] > computed_len:
            later = {saved: label for saved, label in done.items() if saved[0] > computed_len}
            done = {saved: label for saved, label in done.items() if saved[0] <= computed_len}
        self._pending = later
        return done

    def end(
        self, published_len: int, donated: Saved | None = None, stop_reason: str = ""
    ) -> dict[Saved, str]:
        """Hand over all checkpoints up to ``published_len`` that have a slot, with the rolling one
        and ``donated``, and drop the others. Callers must call ``settle`` afterwards. The label of
        the answer's end carries ``stop_reason``."""
        answer = f"decode/{stop_reason}" if stop_reason else "decode"
        saved = self._pending
        if self._rolling is not None:
            saved[self._rolling] = answer
        if saved and max(saved)[0] > published_len:
            for unfinished in [one for one in saved if one[0] > published_len]:
                self._cache.free_slot(unfinished[1])
                self._placement.on_dropped(unfinished[0], saved.pop(unfinished))
        if donated is not None:
            position = donated[0]
            in_decode = position > self._prompt_len
            saved[donated] = answer if in_decode else self._plan.pop(position, "preempt")
        self._drop_plan()
        return saved

    def settle(self, saved: dict[Saved, str], rejected_slots: Sequence[int]) -> None:
        """Note the result of publishing ``saved``; free the slots that the cache did not take."""
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


def bring_up(
    cache: PrefixCache,
    match: PrefixMatch,
    receipt: Any,
    tokens: Tokens,
    exchange: FetchRule | None,
) -> tuple[PrefixMatch, Any]:
    """Load the checkpoint of ``match.loadable`` that saves the most time, if one saves any.

    ``receipt`` is a lock on ``match.node``. Returns a match of ``tokens`` after the load and a lock
    on its node; both are the ones given if nothing was loaded. O(len(tokens)).
    """
    if exchange is None or not _fetch_best(cache, match, exchange):
        return match, receipt
    cache.unlock(receipt)
    match = cache.match(tokens, match.namespace)
    return match, cache.lock(match.node)


def _fetch_best(cache: PrefixCache, match: PrefixMatch, exchange: FetchRule) -> bool:
    """Return False if no load saves time, or the device has no room for it."""
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


# Who owns which tokens' KV rows, and when it changes hands (P: page_size, all borders multiples of
# it but computed_len):
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
    """What a lease is asked for."""

    tokens: Tokens
    """All that is known before computing: the prompt, or after a preemption the prompt and what was
    generated."""
    namespace: Hashable = None
    boundaries: tuple[int, ...] = ()
    """Positions known to survive into later prompts, ascending."""
    reuse: bool = True
    """False: read no cache (a caller that wants every position's logits); publishing goes on."""
    exact: bool = False
    """True: nothing past ``tokens`` is ever published, so all that is cached was computed by a
    prefill."""
    stateful: bool = True
    """False: the model has no linear layers; no slot is taken and no checkpoint planned."""
    answer_survives: bool = True
    """False: later prompts are known to leave this one before its end (a chat template that drops
    the reasoning). A state saved in decode would never be used, and would make the boundary's look
    superseded: none is saved."""
    table_row: int | None = None
    """The request's row in the caller's request table. If it is given, ``cache.take_step()`` lists
    every position whose KV row is new or has changed (``RowWrite``)."""
    own_slot: int | None = None
    """Slot of its state where running states lie beside the cache's memory; None: one of the
    cache's is taken, and may be donated."""


class Lease:
    """One request's claims on a cache. Made by ``begin``; not to be used after ``finish``,
    ``preempt`` or ``abort``."""

    __slots__ = (
        "_cache",
        "_is_counted",
        "_node",
        "_placement",
        "_receipt",
        "_request",
        "_rows",
        "_saving",
        "_step",
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
        receipt: Any,
        state_slot: int | None,
    ) -> None:
        """Take over ``receipt`` (a lock on ``match.node``) and ``state_slot``: see ``begin``."""
        self._cache = cache
        self._placement = placement
        self._request = request
        self._node = match.node
        self._receipt = receipt
        self.match = match
        """What was found at ``begin`` and is resumed from."""
        self.prompt_len = len(request.tokens)
        """Tokens that are prefilled: those of the request."""
        self.state_slot = state_slot
        """The request's own slot; None for attention-only models."""
        self._rows = LeaseRows(match.cached_len, self.prompt_len + cache.page_size)
        self._is_counted = False
        self._step = lcm(cache.grid, cache.page_size)
        self._saving = Saving(cache, placement, self._step, self.prompt_len)
        cache.steps.open(self)
        if match.cached_len:
            self._note_changed(0, match.cached_len)
        if match.checkpoint is not None and state_slot is not None:
            cache.steps.restore(self, match.checkpoint, state_slot)

    @classmethod
    def begin(
        cls,
        cache: PrefixCache,
        placement: PlacementPolicy,
        request: LeaseRequest,
        exchange: FetchRule | None = None,
    ) -> Lease | None:
        """Match, lock, take a state slot, and load from lower tiers what saves time. None if no
        slot is available; nothing is held then.

        If the only available slot is that of the checkpoint found, the request resumes from the
        next shallower one, and ``losses.refused`` counts the difference. With ``reuse=False`` it
        counts everything that was found. A loaded checkpoint belongs to the cache like any other.
        Without an ``exchange`` nothing is loaded. O(len(tokens)).
        """
        readable = request.tokens if request.reuse else request.tokens[:1]
        found = cache.match(request.tokens, request.namespace)
        match = found if request.reuse else cache.match(readable, request.namespace)
        receipt = cache.lock(match.node)
        slot = request.own_slot if request.stateful else None
        if request.stateful and slot is None:
            slot = cache.allocate_slot()
            if slot is None and match.cached_len:
                cache.unlock(receipt)
                slot = cache.allocate_slot()
                match = cache.match(readable, request.namespace)
                receipt = cache.lock(match.node)
            if slot is None:
                cache.unlock(receipt)
                return None
        if match is not found:
            # The rest of ``found`` says what the request met before it took memory itself.
            match = found._replace(
                cached_len=match.cached_len,
                checkpoint=match.checkpoint,
                node=match.node,
                resumed=match.resumed,
                loadable=match.loadable if request.reuse else (),
            )
        if match.loadable and request.reuse:
            match, receipt = bring_up(cache, match, receipt, readable, exchange)
        if match is not found or match.loadable:
            loadable_len = match.loadable[-1].position if match.loadable else 0
            match = match._replace(losses=losses_of(found, match.cached_len, loadable_len))
        return cls(cache, placement, request, match, receipt, slot)

    def _count(self) -> None:
        """Count the lease as a use and plan its checkpoints: it has its first memory, so it is
        going to compute."""
        self._is_counted = True
        request, match, placement = self._request, self.match, self._placement
        if request.reuse:
            self._cache.touch(match)
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
        self._saving.ask(prefill)

    @property
    def cached_len(self) -> int:
        """Tokens that need not be computed."""
        return self.match.cached_len

    @property
    def losses(self) -> Losses:
        """Prompt tokens to compute, by cause; sums with ``cached_len`` to the prompt's length."""
        return self.match.losses

    @property
    def node(self) -> Any:
        """Opaque: the node that ends at ``published_len``, on which the lock is; None at 0."""
        return self._node

    @property
    def restore(self) -> tuple[int, int] | None:
        """(checkpoint slot, own slot): the state copy to make before computing; None: the state
        starts from zero."""
        if self.match.checkpoint is None or self.state_slot is None:
            return None
        return self.match.checkpoint, self.state_slot

    @property
    def kv_indices(self) -> Indices:
        """KV row of every position so far, the tree's and those held: int32[``extended_len``], a
        view. O(``published_len``) when the tree's have not been read since they became so, else
        O(1)."""
        if self._rows.unread_len:
            self._cache.steps.rows_added(self, 0)
            self._rows.read(self._cache.gather(self._node))
        return self._rows.view(0, self._rows.num_rows)

    @property
    def extended_len(self) -> int:
        """Positions that have a row: at least what the last ``extend`` was asked for."""
        return self._rows.num_rows

    @property
    def published_len(self) -> int:
        """Tokens whose rows are the tree's, under this lease's lock."""
        return self._rows.published_len

    @property
    def planned(self) -> tuple[int, ...]:
        """Positions at which this prefill should still save a checkpoint, ascending."""
        return self._saving.planned

    @property
    def held_tokens(self) -> int:
        """KV rows held: neither free nor the tree's."""
        return self._rows.num_rows - self._rows.published_len

    @property
    def held_slots(self) -> int:
        return (self._cached_slot is not None) + len(self._saving.slots)

    @property
    def _cached_slot(self) -> int | None:
        """The own slot, where it is one of the cache's."""
        return self.state_slot if self._request.own_slot is None else None

    def plan_checkpoint(self, position: int, label: str) -> None:
        """Plan a checkpoint at ``position``, floored to the grid; one that is planned, has its slot
        or is out of reach already changes nothing. Beside the placement's own: another request is
        known to leave this one's path there."""
        position -= position % self._step
        if self.cached_len < position <= self.prompt_len:
            self._saving.plan(position, label)

    def is_saving_at(self, position: int) -> bool:
        """Whether a checkpoint at ``position`` was handed out by ``take_checkpoint_slots`` and
        waits for its ``publish``."""
        return self._saving.is_pending(position)

    def continuation(self, tokens: Tokens, max_tokens: int) -> Tokens:
        """Up to ``max_tokens`` ids that followed ``tokens``, all of the request's so far, before.
        O(tokens past ``published_len``)."""
        return self._cache.continuation(tokens, max_tokens, self._request.namespace, self._node)

    def extend(self, to_len: int) -> bool:
        """Hold KV rows for every position below ``to_len``, evicting as needed. False: refused,
        nothing changed.

        The first that succeeds counts the lease as a use of the cache (``touch``) and asks the
        placement where to save: a caller that begins, is refused, aborts and tries again later is
        counted once.
        """
        missing = to_len - self._rows.num_rows
        if missing <= 0:
            return True
        page = self._cache.page_size
        new = self._cache.allocate_kv(-(-missing // page) * page)
        if new is None:
            return False
        start = self._rows.num_rows
        self._rows.append(new)
        self._cache.steps.rows_added(self, start)
        self._note_changed(start, start + len(new))
        if not self._is_counted:
            self._count()
        return True

    def take_checkpoint_slots(self, start: int, end: int) -> tuple[Saved, ...]:
        """(position, slot) of the checkpoints that computing [start, end) has to save, positions in
        (start, end]: planned ones in a prefill, the rolling one in decode. A position without an
        available slot is skipped.

        The rolling one is written over what it held: a caller that works a step ahead and then
        finds that the request had ended before it, has neither.
        """
        return self._saving.take(start, end)

    def num_quiet_tokens(self, computed_len: int) -> int:
        """How many tokens after ``computed_len`` decode may compute one by one while ``extend`` and
        ``take_checkpoint_slots`` change nothing. O(1)."""
        rows = self._rows.num_rows - computed_len
        return min(rows, self._saving.num_before_crossing(computed_len))

    def roll_back(self, computed_len: int) -> None:
        """Of what the last step was to compute only the tokens below ``computed_len`` count (the
        others were guesses, and wrong): a rolling checkpoint past it was not written, and its slot
        holds what it held before."""
        self._saving.roll_back(computed_len)

    def reserve_checkpoint_slots(self, start: int, end: int, max_slots: int) -> int:
        """Take up to ``max_slots`` of the slots that ``take_checkpoint_slots`` would take, in its
        order, and keep them for it; returns how many it would still ask for. For a caller that
        wants few slabs of an arena emptied at a time."""
        return self._saving.reserve(start, end, max_slots)

    def publish(self, tokens: Tokens, computed_len: int) -> tuple[int, int] | None:
        """Hand what is computed to the tree, with the checkpoints that are done, and move the lock
        to its end.

        ``tokens`` are all tokens so far, ``computed_len`` of them computed. Returns (start, end) of
        the positions whose row in ``kv_indices`` changed because the tree had them already; None:
        no row changed. O(computed_len).
        """
        cache = self._cache
        computed_len = self._publishable(computed_len)
        first = self.published_len
        if computed_len - computed_len % cache.page_size <= first:
            return None
        node, num_duplicates = self._insert(tokens, computed_len, self._saving.done(computed_len))
        receipt = cache.lock(node)
        cache.unlock(self._receipt)
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
        return RowWrite(self._request.table_row, start, self.kv_indices[start:end].copy())

    def _note_changed(self, start: int, end: int) -> None:
        if self._request.table_row is not None:
            self._rows.mark(start, end)
            self._cache.steps.row_write_due(self)

    def _publishable(self, computed_len: int) -> int:
        return min(computed_len, self.prompt_len) if self._request.exact else computed_len

    def _insert(
        self, tokens: Tokens, computed_len: int, saved: dict[Saved, str]
    ) -> tuple[Any, int]:
        """Returns (the node that ends at the new ``published_len``, rows from the old one on that
        were duplicates)."""
        cache = self._cache
        inserted_len, duplicates, rejected_slots, node = cache.insert(
            tokens[:computed_len],
            self._rows.view(0, computed_len),
            tuple(saved),
            self._request.namespace,
            self._rows.published_len,
            tuple(saved.values()),
            self._node,
        )
        num_duplicates, first = len(duplicates), self._rows.published_len
        self._rows.publish(inserted_len, num_duplicates)
        if num_duplicates:
            cache.free_kv(duplicates)
            self._note_changed(first, first + num_duplicates)
        if saved:
            self._saving.settle(saved, rejected_slots)
        return node, num_duplicates

    def finish(
        self, tokens: Tokens, computed_len: int, donate: bool = True, stop_reason: str = ""
    ) -> None:
        """Publish what is computed and end the lease. With ``donate`` the own slot becomes a
        checkpoint where its state sits on a position that the placement wants: no copy.

        ``stop_reason``: a word for why the answer ended ("tool_use", "end_turn", "length"), or
        "session_end" if no further turn will come; empty if it is not known. Eviction policies that
        learn keep a class for each word.
        """
        donate = donate and self._saving.wants(computed_len)
        self._end(tokens, computed_len, donate, stop_reason)

    def preempt(self, tokens: Tokens, computed_len: int) -> None:
        """Publish what is computed and end the lease, to begin again later: any grid position is
        worth donating."""
        self._end(tokens, computed_len, True)

    def _end(self, tokens: Tokens, computed_len: int, donate: bool, stop_reason: str = "") -> None:
        cache = self._cache
        published_len = self._publishable(computed_len)
        own_slot = self._cached_slot
        donate &= computed_len == published_len and computed_len % self._step == 0
        donate &= computed_len > self.match.cached_len
        donated = None
        if own_slot is not None:
            if donate:
                donated = computed_len, own_slot
            else:
                cache.free_slot(own_slot)
        saved = self._saving.end(published_len, donated, stop_reason)
        first_held = self.published_len
        if saved or published_len > first_held:
            self._insert(tokens, published_len, saved)
            first_held = max(first_held, self.published_len)
        self._close(first_held)

    def abort(self) -> None:
        """Give everything back and end the lease; what was published stays the tree's."""
        self._saving.abort()
        if self._cached_slot is not None:
            self._cache.free_slot(self._cached_slot)
        self._close(self.published_len)

    def _close(self, first_held: int) -> None:
        if first_held < self._rows.num_rows:
            self._cache.free_kv(self._rows.view(first_held, self._rows.num_rows))
        self._cache.steps.close(self)
        self._cache.unlock(self._receipt)
        self._node = self._receipt = self.state_slot = None
        self._rows.clear()


class LeaseEvent(NamedTuple):
    """One verb of one lease, or of the cache itself."""

    verb: str
    """begin, extend, reserve_checkpoint_slots, take_checkpoint_slots, roll_back, plan_checkpoint,
    publish, finish, preempt, abort: the lease's; reset: the cache's."""
    lease: int | None
    """Number of the lease, counted from 0; None: ``begin`` was refused, or the verb is the
    cache's."""
    arguments: tuple[Any, ...]
    result: Any
    """What it gave: begin (cached_len or None), extend (bool), reserve_checkpoint_slots (how many
    are still wanted), take_checkpoint_slots ((position, slot), ...); else None."""


class LeaseLog:
    """Events, appended as they happen. Holds every request's tokens: for tests and studies."""

    def __init__(self) -> None:
        self.events: list[LeaseEvent] = []
        self._numbers: dict[int, int] = {}
        self._num_begun = 0

    def begin(self, lease: Lease | None, request: LeaseRequest) -> None:
        """A lease began, or (None) was refused."""
        if lease is None:
            self.events.append(LeaseEvent("begin", None, (request,), None))
            return
        self._numbers[id(lease)] = self._num_begun
        self._num_begun += 1
        self.record("begin", lease, (request,), lease.cached_len)

    def record(
        self, verb: str, lease: Lease, arguments: tuple[Any, ...] = (), result: Any = None
    ) -> None:
        """``lease`` did ``verb``; see ``LeaseEvent`` for what ``result`` is."""
        self.events.append(LeaseEvent(verb, self._numbers[id(lease)], arguments, result))
        if verb in ("finish", "preempt", "abort"):
            del self._numbers[id(lease)]

    def reset(self) -> None:
        """The cache was reset."""
        self.events.append(LeaseEvent("reset", None, (), None))


def replay(cache: PrefixCache, placement: PlacementPolicy, log: LeaseLog) -> LeaseLog:
    """Do to ``cache`` what was recorded; returns the record of that, which equals ``log`` where
    both decided alike.

    Stops at the first ``begin`` or ``extend`` whose outcome differs, since what follows would have
    been different.
    """
    again = LeaseLog()
    leases: dict[int, Lease] = {}
    for event in log.events:
        if event.verb == "reset":
            cache.reset()
            again.reset()
        elif event.verb == "begin":
            begun = Lease.begin(cache, placement, *event.arguments)
            again.begin(begun, *event.arguments)
            if begun is not None and event.lease is not None:
                leases[event.lease] = begun
        elif event.lease is not None:
            lease = leases[event.lease]
            result = getattr(lease, event.verb)(*event.arguments)
            again.record(
                event.verb, lease, event.arguments, None if event.result is None else result
            )
        if again.events[-1].lease != event.lease or again.events[-1].result != event.result:
            break
    return again
