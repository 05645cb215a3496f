"""The scheduling rules of one engine: which requests compute how many tokens in the next step.

Every step serves the running requests from the oldest to the youngest: one token for each that
decodes, and from what these leave of the token budget (64 at least) a chunk for each that prefills;
then it admits waiting ones. Chunks end on the absolute tile grid or at the end of the prompt, so
that a prompt is computed in the very same tiles however it is cut.

The last quarter of that budget is for prefills that fit in it whole, so that a short one does not
wait for a long one before it; what they leave of it goes to the others in the same step. A short
one is admitted before an earlier long one only if a place to run is left for each that it passes.

Memory. A request that finds none preempts the youngest running request that is younger than itself;
one with nobody younger sits the step out. The oldest can always go on, because no request is
admitted that would not fit alone, so every request finishes. After a refusal nobody is admitted
until a request has left: what preemption freed is for those who run. One slab of an arena is
emptied per step, and one more if a request begins with a fetch from a lower tier: requests whose
states need another slab sit the step out, and the others go on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from hybridcache.scheduling.budget import TILE, Budget
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.request import ScheduledRequest
from hybridcache.scheduling.sharing import Sharing

R = TypeVar("R", bound=ScheduledRequest)
Q = TypeVar("Q", bound=ScheduledRequest)


class Holding(Protocol[Q]):
    """Waiting requests that are held until their prefix is loaded."""

    @property
    def requests(self) -> set[Q]:
        """Waiting requests that are held or have a load in progress."""
        ...

    def is_holding(self, request: Q) -> bool:
        """Return whether ``holds`` would be True again, without looking at tokens. O(1)."""
        ...

    def holds(self, request: Q) -> bool:
        """Return whether waiting ``request`` must wait for a load; may begin it."""
        ...

    def forget(self, request: Q) -> None:
        """``request`` no longer waits."""
        ...


class StepPlanner(Generic[R]):
    """Waiting and running requests, and the rules between them."""

    def __init__(
        self,
        manager: CacheManager,
        *,
        max_running: int,
        token_budget: int,
        shares: bool = True,
        fetching: Holding[R] | None = None,
        clock: Callable[[], float],
    ) -> None:
        """``shares``: the cache keeps what is published, so that it can pay to wait for another
        request's prefix. ``fetching`` loads prefixes of waiting requests from elsewhere."""
        self._manager = manager
        self._max_running = max_running
        self._token_budget = token_budget
        self._sharing = Sharing(manager) if shares else None
        self._holding = fetching
        self._clock = clock
        self._waiting: list[R] = []
        self._running: list[R] = []
        self._is_full = False
        self._num_in_flight = 0
        """Planned steps that are not committed."""
        self._must_wait = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: R) -> None:
        """Let ``request`` wait for its turn."""
        insort(self._waiting, request, key=_age)

    def remove(self, request: R) -> None:
        """Drop ``request``, waiting or running; its rows, pages and slots are free afterwards."""
        if request.lease is not None:
            self._manager.abort(request)
            self._running.remove(request)
            self._is_full = False
        else:
            self._waiting.remove(request)
            if self._sharing is not None:
                self._sharing.forget(request)
            if self._holding is not None:
                self._holding.forget(request)

    def choose(self) -> dict[R, int]:
        """Choose which requests compute in the next step, and claim the memory for it. Returns
        where each stops: its ``scheduled_len`` after the step."""
        self._must_wait = False
        budget = self._budget()
        ends: dict[R, int] = {}
        for request in tuple(self._running):
            if request.lease is None or request.must_see_its_token or request.awaits_draw:
                continue
            end = self._end(request, request.scheduled_len, budget)
            if end > request.scheduled_len and self._claim(request, end):
                self._take(ends, request, end, budget)
        passed = self._admit(self._candidates(), ends, budget)
        if budget.num_for_short and budget.tokens:
            budget.num_for_short = 0
            self._grow(ends, budget)
            self._admit(passed, ends, budget)
        return ends

    def advance(self, request: R, end: int) -> None:
        """``request`` has computed its tokens below ``end``: publish those of a prefill."""
        is_decode = request.computed_len >= request.prefill_len
        request.computed_len = end
        if not is_decode:
            self._manager.publish(request)

    def leave(self, request: R) -> None:
        """Running ``request`` has its last token: publish all, and free its claims."""
        self._manager.finish(request)
        self._running.remove(request)
        self._is_full = False

    def _decoding(self) -> list[R]:
        return [r for r in self._running if r.scheduled_len >= r.prefill_len and not r.awaits_draw]

    def _budget(self) -> Budget:
        num_decodes = len(self._decoding())
        tokens = max(self._token_budget - num_decodes, TILE)
        is_alone = len(self._running) - num_decodes + len(self._waiting) <= 1
        return Budget.of(tokens, is_shared=not is_alone)

    def _end(self, request: R, start: int, budget: Budget) -> int:
        """How far ``request``, which has its tokens up to ``start``, may compute in this step."""
        if request.scheduled_len >= request.prefill_len:
            return min(request.scheduled_len + 1, request.max_len - 1)
        end = start + budget.most(request.prefill_len - start, request.wants_scores)
        return end if end == request.prefill_len else max(start, end // TILE * TILE)

    def _take(self, ends: dict[R, int], request: R, end: int, budget: Budget) -> None:
        """``request``, whose memory is claimed, computes up to ``end``."""
        if request.scheduled_len < request.prefill_len:
            start = ends.get(request, request.scheduled_len)
            budget.spend(end - start, request.wants_scores)
        ends[request] = end

    def _grow(self, ends: dict[R, int], budget: Budget) -> None:
        """Give running prefills, the oldest first, what is left, where there is memory for it."""
        for request in self._running:
            start = ends.get(request, request.scheduled_len)
            if start < request.prefill_len:
                end = self._end(request, start, budget)
                if end > start and self._manager.extend(request, end):
                    self._take(ends, request, end, budget)

    def _claim(self, request: R, end: int) -> bool:
        """KV rows up to ``end``, at the cost of younger requests. False: ``request`` sits this step
        out."""
        while not self._manager.extend(request, end):
            if self._num_in_flight:
                self._must_wait = True
                return False
            youngest = self._running[-1]
            if youngest is request:
                self._is_full = True
                return False
            self._preempt(youngest)
        return True

    def _preempt(self, request: R) -> None:
        self._manager.preempt(request)
        self._requeue(request)
        self._is_full = True

    def _requeue(self, request: R) -> None:
        """Running ``request`` has lost its claims, and waits again."""
        self._running.remove(request)
        insort(self._waiting, request, key=_age)

    def _candidates(self) -> Iterator[R]:
        """Yield the oldest waiting requests, as many as one step has time for.

        At most ``2 * max_running`` that wait for nothing but their turn, and ``8 * max_running`` in
        all. Requests that are held for a load cost O(1) each and count for neither limit, so that
        no number of them hides the requests behind them.
        """
        num_looked_at = num_unled = 0
        for request in tuple(self._waiting):
            is_held = self._holding is not None and self._holding.is_holding(request)
            yield request
            num_looked_at += not is_held
            num_unled += not self._is_led(request)
            if num_unled == 2 * self._max_running or num_looked_at == 8 * self._max_running:
                return

    def _is_led(self, request: R) -> bool:
        """Return whether waiting ``request`` is known to wait for another request or a load."""
        if self._holding is not None and self._holding.is_holding(request):
            return True
        return self._sharing is not None and self._sharing.follows(request)

    def _admit(self, candidates: Iterable[R], ends: dict[R, int], budget: Budget) -> list[R]:
        """Let waiting requests in, in the order given, but for those that follow a prefill ahead of
        them. Returns those passed over for want of budget.

        Followers are looked for even where nobody can be let in, so that their leader saves its
        state in time.
        """
        self._is_full &= bool(self._running)
        passed: list[R] = []
        for request in candidates:
            goal = self._sharing.goal(request) if self._sharing is not None else 0
            num_taken = len(self._running) + len(passed)
            has_turn = not budget.is_spent and num_taken < self._max_running
            may_begin = has_turn or self._holding is not None
            if self._is_full or not may_begin or self._manager.must_wait_for_slab:
                continue
            if goal and self._manager.cached_len(request) < goal:
                continue
            if self._holding is not None and self._holding.holds(request):
                continue
            if not has_turn:
                continue
            if not self._fits(request, budget):
                passed.append(request)
            elif self._start(request, budget):
                end = self._end(request, request.scheduled_len, budget)
                self._take(ends, request, end, budget)
        return passed

    def _fits(self, request: R, budget: Budget) -> bool:
        """Whether waiting ``request`` could compute something. O(its length) where only a short one
        could."""
        if budget.room(request.wants_scores) >= TILE:
            return True
        rest = request.num_tokens
        if rest > budget.tokens and not request.wants_scores:
            rest -= self._manager.cached_len(request)
        return budget.most(rest, request.wants_scores) == rest

    def _start(self, request: R, budget: Budget) -> bool:
        """Move ``request`` from waiting to running. False: it waits on, for memory for its first
        chunk, or because less than it found could be resumed from and the rest fits no more."""
        if not self._manager.begin(request):
            self._is_full = True
            return False
        end = self._end(request, request.scheduled_len, budget)
        fits = end > request.scheduled_len
        if not fits or not self._manager.extend(request, end):
            self._manager.abort(request)
            self._is_full = fits
            return False
        self._waiting.remove(request)
        insort(self._running, request, key=_age)
        if self._sharing is not None:
            self._sharing.let_in(request)
        if request.scheduled_s is None:
            lease, _ = request.claims
            request.scheduled_s = self._clock()
            request.cached_len, request.losses = lease.cached_len, lease.losses
        return True

    def check(self) -> None:
        """AssertionError unless those who run, and they alone, have a lease, and both lists are in
        order of age. Between two steps only. O(requests)."""
        for requests, have_leases in ((self._waiting, False), (self._running, True)):
            ages = [_age(request) for request in requests]
            assert ages == sorted(set(ages)), "requests out of order"
            assert all((request.lease is not None) == have_leases for request in requests)
        assert len(self._running) <= self._max_running
        assert self._num_in_flight in (0, 1)
        assert self._sharing is None or self._sharing.followers <= set(self._waiting)
        assert self._holding is None or self._holding.requests <= set(self._waiting)


def _age(request: ScheduledRequest) -> int:
    return request.arrival
