"""One request's claims on a prefix cache, from its match to its release: integers only.

The engine's cache manager and the simulator drive this same class, so a policy that was studied is
the policy that is served. The tensors' side (copying a state, writing KV, filling a request table)
is the caller's.

Life of a lease: ``begin`` (match, lock, own state slot), then per piece of work ``extend`` (KV for
it), ``take_checkpoint_slots`` (checkpoint slots for planned positions in it), the computation,
``publish`` (what was computed goes to the tree), and in the end exactly one of ``finish``,
``preempt`` and ``abort``, after which nothing is held.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import lcm
from typing import Any, NamedTuple

from hybridcache.fetching import bring_up
from hybridcache.interface import PrefixCache
from hybridcache.lease_rows import LeaseRows
from hybridcache.policies.protocol import FetchRule, PlacementPolicy, Prefill
from hybridcache.results import Losses, PrefixMatch, losses_of
from hybridcache.saving import Saved, Saving
from hybridcache.tokens import Indices, Tokens

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
# Moves. In an arena rows get other places when a slab is emptied (`allocators.moves`): no row
# changes hands by that, the lease is notified (`rows_moved`), and its caller asks where
# (`take_moved`).


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
        if cache.arena is not None:
            cache.arena.holders[self._rows] = None

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
                lower=match.lower if request.reuse else (),
            )
        if match.lower and request.reuse:
            match, receipt = bring_up(cache, match, receipt, readable, exchange)
        if match is not found or match.lower:
            loadable_len = match.lower[-1].position if match.lower else 0
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
            match.kv_len,
            match.branch_len,
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
        self._rows.append(new)
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

    def take_moved(self) -> tuple[int, int] | None:
        """(start, end) of the positions whose row in ``kv_indices`` changed since the last time
        because slabs were emptied; None: no row changed. Given out once. What the caller copied
        from ``kv_indices`` before is out of date there: it reads these positions again, and writes
        them after all that it copied."""
        return self._rows.take_moved()

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
        num_duplicates = len(duplicates)
        self._rows.publish(inserted_len, num_duplicates)
        if num_duplicates:
            cache.free_kv(duplicates)
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
        if self._cache.arena is not None:
            del self._cache.arena.holders[self._rows]
        self._cache.unlock(self._receipt)
        self._node = self._receipt = self.state_slot = None
        self._rows.clear()
