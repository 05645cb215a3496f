"""Scheduling rules of one engine: the requests and token ranges of the next step.

Every step serves the running requests from the oldest to the youngest: one token for each decode,
and a chunk for each prefill from the rest of the token budget (64 at least). Then it admits waiting
requests. Chunks end on the absolute tile grid or at the end of the prompt, so a prompt is always
computed in the same tiles. The last quarter of the budget is reserved for prefills that fit in it
whole; its unused part goes to the others in the same step. A short request is admitted before an
earlier long one only if a place to run is left for each request that it passes.

Time. With ``step_s``, the budget of a step is the fewest tiles that take so long at the speed of
the last step, or half as long while a request decodes or several have prompts to compute. The first
step has one tile. Such a budget is too small for a reserve, so every second step serves prefills of
at most a quarter of the whole budget first.

Memory. If a request finds no memory, the youngest running request younger than itself is preempted.
Without a younger one, the request sits the step out. The oldest request can always continue,
because no request is admitted that would not fit alone. Therefore every request finishes. After a
refusal, no request is admitted until one has left: memory freed by preemption is reserved for
running requests.

One slab of an arena is emptied per step, and one more if a request begins with a load from a tier.
Requests that need another slab for their states sit the step out, and the others continue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf
from operator import attrgetter
from typing import Generic, TypeVar, cast

from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.lease import Lease
from hybridcache.radix.protocol import Prefill
from hybridcache.radix.tokens import common_prefix_len, require_index
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.loading import Loader
from hybridcache.scheduling.request import (
    AdmissionPolicy,
    ScheduledRequest,
    ServerLoad,
    WaitingRequest,
)
from hybridcache.scheduling.sessions import Sessions

TILE = 64
"""Tokens per tile of every kernel, unless the grid is finer. Prefill chunks end at absolute
multiples of it."""

MAX_SCORED = 1024
"""Most prompt positions per step for which logits are computed. The logits of a whole step would
take gigabytes of device memory."""

SHORT_SHARE = 4
"""Divisor of the share of a step's prefill tokens that is reserved for prefills that fit in it
whole."""
TILES = 2
"""Most tiles begun in a step, as a multiple of the tiles that its tokens fill. A few tokens cost
nearly half as much as a whole tile, so a hundred short chunks would make a step several times
longer."""

SHARED = 2
"""Divisor of the time of a step while other requests decode or wait."""

DECODE_PIECE = 32
"""Tokens of KV allocated at once while decoding, so that most steps allocate nothing."""

_age = attrgetter("arrival")

R = TypeVar("R", bound=ScheduledRequest)


@dataclass(slots=True)
class PrefillBudget:
    """Remaining budget for prefills in one step."""

    tokens: int
    num_for_short: int
    """The last ``num_for_short`` tokens are reserved for prefills that fit in whole."""
    tiles: int
    """Tiles that may still be begun, however few tokens they contain."""
    scored: int = MAX_SCORED
    """Positions for which logits may still be computed."""
    short_len: int = 0
    """Longest rest of a prefill that may use the reserve in part, and go on in later steps."""

    def most(self, rest: int, scores: bool) -> int:
        """Return the number of the ``rest`` remaining tokens that a prefill may compute."""
        if self.tokens <= 0 or self.tiles <= 0:
            return 0
        scored = self.scored if scores else self.tokens
        if rest <= max(self.short_len, min(self.num_for_short, self.tokens, scored)):
            return min(rest, self.tokens, scored)
        return min(rest, max(0, self.tokens - self.num_for_short), scored)


@dataclass(frozen=True, slots=True)
class AdmissionReport:
    """State of the queue and of the policy that orders it."""

    live_sessions: int
    """Sessions with an open request, or idle for a short time (``Sessions.num_live``)."""
    waiting_sessions: int
    oldest_wait_s: float
    """Age of the oldest waiting request."""
    figures: Mapping[str, float | str]
    """Figures of the policy (``AdmissionPolicy.report``)."""


class StepPlanner(Generic[R]):
    """Waiting and running requests, and the rules between them.

    An engine of your own can use it. Two requests with the same prompt:

    >>> from types import SimpleNamespace
    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache, parse_placement
    >>> from hybridcache.radix.protocol import PromptBoundaries
    >>> from hybridcache.policies.registry import make_admission
    >>> from hybridcache.scheduling.cache_manager import CacheManager
    >>> from hybridcache.scheduling.request import ScheduledRequest
    >>> from hybridcache.scheduling.planner import StepPlanner
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=4000, num_slots=40))
    >>> manager = CacheManager(cache, parse_placement("adaptive"), num_rows=8, stateful=True)
    >>> planner = StepPlanner(
    ...     manager, max_running=8, token_budget=256, admission=make_admission("sessions"),
    ...     clock=lambda: 0.0,
    ... )
    >>> prompt, reused = np.arange(300, dtype=np.int32), []
    >>> for number in range(2):
    ...     spec = SimpleNamespace(
    ...         request_id=str(number), namespace=None, boundaries=PromptBoundaries(),
    ...         ends_session=False, returns_within_s=None, session="", choice_of=None, save_at=(),
    ...     )
    ...     planner.add(ScheduledRequest(spec, prompt, arrival=number, arrival_s=0.0, max_len=303))
    >>> while planner.has_work():
    ...     ends = planner.choose()  # with memory for the tokens up to each end
    ...     saves = {one: planner.take_checkpoint_slots(one, end) for one, end in ends.items()}
    ...     manager.take_step().done()  # or carry_out(memory); its table_row is one.row
    ...     for one, end in ends.items():
    ...         if saves[one] is None:  # no free slab in this step
    ...             continue
    ...         # here: compute [one.scheduled_len, end) with one.lease
    ...         planner.advance(one, end)  # publishes prompts
    ...         if end == one.num_tokens:
    ...             one.append(7)  # the sampled token
    ...             if one.num_tokens == one.max_len:
    ...                 planner.leave(one)
    ...                 reused.append(one.cached_len)
    >>> reused
    [0, 256]

    With drafts, claim ``planner.extend(one, end + num_drafts)`` before the step. After it, append
    the accepted tokens, call ``advance(one, good_len)``, ``one.lease.roll_back(good_len)``, and
    append the newest token.

    The last token is never computed: ``leave`` as soon as ``num_tokens == max_len``, because
    ``choose`` does not return the request again. ``remove(request)`` aborts one. If ``choose``
    returns nothing, call it again when a request arrives or leaves, or at ``wakes_at_s``.
    """

    def __init__(
        self,
        manager: CacheManager,
        *,
        max_running: int,
        token_budget: int,
        admission: AdmissionPolicy,
        shares: bool = True,
        loader: Loader[R] | None = None,
        clock: Callable[[], float],
        step_s: float = inf,
    ) -> None:
        """
        Args:
            manager: leases of the running requests.
            max_running: most running requests.
            token_budget: most tokens of a step; ``TILE`` (64) are for prompts at least.
            admission: order of the waiting requests.
            shares: True if published entries are kept, so that waiting for another request's prefix
                can pay.
            loader: loads of prefixes for waiting requests, or None.
            clock: function that returns seconds.
            step_s: seconds that a step with prompts should take; one tile may take longer.

        Raises:
            TypeError, ValueError: a number is no integer of 1 or more, or ``max_running`` is more
                than the manager's rows.
        """
        for what, number in (("max_running", max_running), ("token_budget", token_budget)):
            require_index(number, what, 1)
        if max_running > manager.num_rows:
            most = f"at most {manager.num_rows}, the num_rows of the manager"
            raise ValueError(f"max_running must be {most} (got {max_running}).")
        self.manager = manager
        """Leases and rows of the running requests."""
        self._longest = manager.memory.max_request_len
        self.max_running = max_running
        self._token_budget, self._step_s = token_budget, step_s
        self._tile_s = inf
        """Seconds per tile of the last step with prompts."""
        self._is_turn_of_short = False
        self._shares = shares
        self.loader = loader
        self.clock = clock
        """Function that returns seconds."""
        self._begin_empty(admission)

    def _begin_empty(self, admission: AdmissionPolicy) -> None:
        """Begin without requests and sessions."""
        self.admission = admission
        """Order of the waiting requests."""
        self.sessions = Sessions(recognises=admission.recognises_sessions)
        """Sessions of waiting and running requests, and idle ones."""
        self._sharing = Sharing(self.manager, self._shares)
        self.waiting: list[R] = []
        """Waiting requests, the oldest first."""
        self.running: list[R] = []
        """Running requests, the oldest first."""
        self._matches: dict[WaitingRequest, tuple[int, int]] = {}
        """(version of the cache, cached length at that version) by waiting request."""
        self._load = ServerLoad(
            max_running=self.max_running,
            running=self.running,
            open_sessions=self.sessions.open,
            idle_sessions=self.sessions.idle,
            cached_len=self._cached_len,
            footprint=lambda one: self.manager.memory.share(one.num_tokens - one.shared_len, 1),
        )
        self._is_full = False
        self.num_in_flight = 0
        """Planned steps that are not committed."""
        self.must_wait = False
        """True if a request needs memory that only the commit of a planned step can free."""
        self._withholds_all = False
        self._num_prefilling = 0
        """Prompt tokens of the last step."""
        self._step_began_s = 0.0

    def has_work(self) -> bool:
        """Return whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: R) -> None:
        """Add ``request`` to the waiting requests, unless the policy raises.

        Raises ValueError if a waiting or running request has the same ``arrival``, or if the
        request can be longer than ``manager.memory.max_request_len``, so that it would never end.
        """
        for requests in (self.waiting, self.running):
            place = bisect_left(requests, request.arrival, key=_age)
            if place < len(requests) and requests[place].arrival == request.arrival:
                raise ValueError(
                    f"arrival {request.arrival} is that of a waiting or running request: add each "
                    "request once, with an arrival of its own"
                )
        if request.max_len > self._longest:
            raise ValueError(
                f"request {request.request_id} has max_len {request.max_len}, more than fits in "
                f"the memory, {self._longest}: refuse it, or give it a shorter answer"
            )
        self._load.now_s = self.clock()
        request.session = self.sessions.arrived(
            request.request_id,
            request.tokens[: request.prompt_len],
            self._load.now_s,
            tenant=request.namespace,
            boundaries=request.spec.boundaries.positions,
            choice_of=request.spec.choice_of,
        )
        try:
            self.admission.arrived(request, self._load)
        except BaseException:  # a user's policy can raise anything
            self.sessions.left(request.session, request.num_tokens, self._load.now_s)
            raise
        insort(self.waiting, request, key=_age)

    def restart(self, requests: Iterable[R], admission: AdmissionPolicy) -> None:
        """Begin again with an empty cache, and with ``requests`` as if they arrived now.

        For an engine after an exception in the middle of a call, which may have left anything half
        changed. ``requests`` are those that have no answer yet; ``admission`` is a new policy.
        O(rows + their tokens).
        """
        self.manager.restart()
        self._begin_empty(admission)
        for request in sorted(requests, key=_age):
            request.lose_claims()
            self.add(request)

    def remove(self, request: R) -> None:
        """Drop ``request``, waiting or running; its rows, pages and slots are free afterwards. Does
        nothing if it has left, or was never added."""
        if request in self.running:
            self.manager.release(request, aborts=True)
            self.running.remove(request)
            self._is_full = False
        elif request not in self.waiting:
            return
        else:
            self.waiting.remove(request)
            self._matches.pop(request, None)
            self._sharing.forget(request)
            if self.loader is not None:
                self.loader.forget(request)
        self._has_left(request)

    def choose(self) -> dict[R, int]:
        """Choose the requests of the next step and claim memory for them. Returns the end position
        of each: its ``scheduled_len`` after the step."""
        self.must_wait = False
        self._load.now_s = self.clock()
        self._account()
        num_decodes = sum(one.scheduled_len >= one.prefill_len for one in self.running)
        tokens = max(self._token_budget - num_decodes, TILE)
        is_alone = len(self.running) - num_decodes + len(self.waiting) <= 1
        num_for_short = 0 if is_alone else min(tokens // SHORT_SHARE, tokens - TILE)
        short_len = 0
        step_s = self._step_s if is_alone and not num_decodes else self._step_s / SHARED
        if step_s < tokens / TILE * self._tile_s:
            tokens = min(tokens, max(1, ceil(step_s / self._tile_s)) * TILE)
            self._is_turn_of_short = turn = not self._is_turn_of_short and num_for_short > 0
            short_len, num_for_short = turn * num_for_short, turn * tokens
        budget = PrefillBudget(tokens, num_for_short, TILES * tokens // TILE, short_len=short_len)
        ends: dict[R, int] = {}
        for request in tuple(self.running):
            if (lease := request.lease) is None:
                continue
            end = self._end(request, request.scheduled_len, budget)
            if end > request.scheduled_len and (
                end <= lease.extended_len or self._claim(request, end)
            ):
                self._take(ends, request, end, budget)
        passed = self._admit(self._candidates(), ends, budget) if self.waiting else []
        if budget.num_for_short and budget.tokens:
            budget.num_for_short = 0
            for request in self.running:  # The rest goes to their prefills, oldest first.
                start = ends.get(request, request.scheduled_len)
                if start < request.prefill_len:
                    end = self._end(request, start, budget)
                    if end > start and self.extend(request, end):
                        self._take(ends, request, end, budget)
            self._admit(passed, ends, budget)
        if self.waiting and not self.running and self.wakes_at_s is None:
            self._admit(self.waiting[:1], ends, budget)
        self._num_prefilling = sum(
            end - request.scheduled_len
            for request, end in ends.items()
            if request.scheduled_len < request.prefill_len
        )
        self._step_began_s = self._load.now_s
        return ends

    def _account(self) -> None:
        """Report the duration of the last step's prefills, which ends now, to the policy."""
        if self._num_prefilling:
            seconds = self._load.now_s - self._step_began_s
            self._tile_s = seconds / ceil(self._num_prefilling / TILE)
            self.admission.computed(self._num_prefilling, seconds, self._load)
            self._num_prefilling = 0

    def extend(self, request: R, to_len: int) -> bool:
        """Allocate KV rows for every position below ``to_len``. Returns False, and changes nothing,
        if there is no memory."""
        lease, _ = request.claims
        before = lease.extended_len
        if to_len <= before:
            return True
        ahead = max(to_len, min(before + DECODE_PIECE, request.max_len))
        to_len = ahead if not request.is_prefilling and lease.extend(ahead) else to_len
        return lease.extended_len >= to_len or lease.extend(to_len)

    def take_checkpoint_slots(self, request: R, end: int) -> tuple[tuple[int, int], ...] | None:
        """Return (position, slot) of the checkpoints to save while computing from ``scheduled_len``
        to ``end``. Returns None if more slabs must be emptied than one step allows. In that case,
        call again in the next step; slots already taken are kept."""
        lease, _ = request.claims
        while True:
            num_slots = self.manager.num_slots_at_hand
            saves = lease.take_checkpoint_slots(request.scheduled_len, end, num_slots)
            if saves is not None or not num_slots:
                return saves

    def advance(self, request: R, end: int, publishes: bool = True) -> None:
        """Record that ``request`` has computed its tokens below ``end``; publish those of a
        prefill. An engine that works one step ahead sets ``scheduled_len`` when it plans a step.
        Raises ValueError if ``end`` is below the computed tokens or above those with rows."""
        lease, _ = request.claims
        if not request.computed_len <= end <= lease.extended_len:
            raise ValueError(
                f"end must be from {request.computed_len} to {lease.extended_len}, the tokens that "
                f"are computed and those with rows (got {end})."
            )
        if publishes and request.computed_len < request.prefill_len:
            lease.publish(request.tokens, end)
        request.computed_len = end
        request.scheduled_len = max(request.scheduled_len, end)

    def leave(self, request: R, publishes: bool = True) -> None:
        """Finish running ``request`` after its last token: publish everything and free its
        claims."""
        if publishes:  # The state is not final if a step planned earlier still advances it.
            lease, _ = request.claims
            is_final = request.scheduled_len == request.computed_len
            lease.finish(request.tokens, request.computed_len, is_final, request.stop_reason)
        self.manager.release(request, aborts=not publishes)
        self.running.remove(request)
        self._is_full = False
        self._has_left(request)

    @property
    def wakes_at_s(self) -> float | None:
        """Time at which the policy withholds less; None if it names none that is still to come."""
        time_s = self.admission.wakes_at_s
        return time_s if time_s is not None and self._load.now_s < time_s < inf else None

    @property
    def withholds_all(self) -> bool:
        """True if nothing runs and the policy withheld all waiting requests from the last step."""
        return self._withholds_all and bool(self.waiting) and not self.running

    @property
    def is_stuck(self) -> bool:
        """True if no waiting request can be admitted before one leaves, one arrives, or the
        policy's ``wakes_at_s``: there is none, no place to run, no memory, or the last step
        withheld all."""
        is_full = self._is_full or len(self.running) == self.max_running
        return not self.waiting or is_full or self._withholds_all

    def admission_report(self) -> AdmissionReport:
        """Return the state of queue and policy. O(waiting + live sessions)."""
        now_s = self.clock()
        return AdmissionReport(
            live_sessions=self.sessions.num_live(now_s),
            waiting_sessions=len({request.session for request in self.waiting}),
            oldest_wait_s=max((now_s - request.arrival_s for request in self.waiting), default=0.0),
            figures=dict(self.admission.report()),
        )

    def _has_left(self, request: R) -> None:
        self._withholds_all = False
        self._load.now_s = self.clock()
        if not self.has_work():
            self._account()
        self.sessions.left(request.session, request.num_tokens, self._load.now_s)
        self.admission.left(request, self._load)
        if request.spec.ends_session and not request.session.num_open:
            self.sessions.end(request.session.newest_id)

    def _cached_len(self, request: WaitingRequest) -> int:
        version = self.manager.cache.stats.num_changes
        known = self._matches.get(request)
        if known is None or known[0] != version:
            match = self._match(cast("R", request))
            loadable_len = match.loadable[-1].position if match.loadable else 0
            known = self._matches[request] = version, max(match.cached_len, loadable_len)
        return known[1]

    def _match(self, request: R) -> PrefixMatch:
        """Return the current match of waiting ``request`` in the cache. O(its length)."""
        return self.manager.cache.match(request.tokens, request.namespace)

    def _end(self, request: R, start: int, budget: PrefillBudget) -> int:
        """Return the end position of ``request``, which has its tokens up to ``start``, in this
        step."""
        if request.scheduled_len >= request.prefill_len:
            return min(request.scheduled_len + 1, request.max_len - 1)
        end = start + budget.most(request.prefill_len - start, request.wants_scores)
        return end if end == request.prefill_len else max(start, end // TILE * TILE)

    def _take(self, ends: dict[R, int], request: R, end: int, budget: PrefillBudget) -> None:
        """Schedule ``request`` up to ``end``. Its memory must be claimed."""
        if request.scheduled_len < request.prefill_len:
            num_tokens = end - ends.get(request, request.scheduled_len)
            budget.tokens -= num_tokens
            budget.tiles -= -(-num_tokens // TILE)
            budget.scored -= num_tokens * request.wants_scores
        ends[request] = end

    def _claim(self, request: R, end: int) -> bool:
        """Allocate KV rows up to ``end``, if necessary by preempting younger requests. Returns
        False if ``request`` must sit this step out."""
        while not self.extend(request, end):
            if self.num_in_flight:
                self.must_wait = True
                return False
            youngest = self.running[-1]
            if youngest is request:
                self._is_full = True
                return False
            lease, _ = youngest.claims
            lease.preempt(youngest.tokens, youngest.computed_len)
            youngest.num_preemptions += 1
            self.requeue(youngest)
            self._is_full = True
        return True

    def requeue(self, request: R, *, aborts: bool = False) -> None:
        """Move running ``request`` back to the waiting requests. It has no claims afterwards; see
        ``CacheManager.release``."""
        self.manager.release(request, aborts=aborts)
        request.computed_len = request.scheduled_len = 0
        self.running.remove(request)
        insort(self.waiting, request, key=_age)

    def _candidates(self) -> Iterator[R]:
        """Yield waiting requests in the policy's order: at most ``2 * max_running`` that are ready
        to run, and ``8 * max_running`` in all. Requests held for a load count for neither, so they
        never hide the requests behind them."""
        waiting = self.admission.order(tuple(self.waiting), self._load)
        candidates = cast("tuple[R, ...]", tuple(islice(waiting, len(self.waiting))))
        self._withholds_all = not candidates
        num_looked_at, num_unled, loader = 0, 0, self.loader
        for request in candidates:
            is_held = loader is not None and loader.is_holding(request)
            yield request
            num_looked_at += not is_held
            is_held = loader is not None and loader.is_holding(request)
            num_unled += not (is_held or self._sharing.follows(request))
            if num_unled == 2 * self.max_running or num_looked_at == 8 * self.max_running:
                return

    def _admit(self, candidates: Iterable[R], ends: dict[R, int], budget: PrefillBudget) -> list[R]:
        """Admit waiting requests in the given order, except those that follow a running prefill.
        Returns those that were passed over because the budget was too small. Followers are detected
        even if none can be admitted, so that their leader saves its state in time."""
        self._is_full &= bool(self.running)
        passed: list[R] = []
        for request in candidates:
            goal = self._sharing.goal(request)
            num_taken = len(self.running) + len(passed)
            has_turn = budget.tokens > 0 < budget.tiles and num_taken < self.max_running
            may_begin = has_turn or self.loader is not None
            if self._is_full or not may_begin or self.manager.num_slots_at_hand == 0:
                continue
            if goal and self._match(request).cached_len < goal:
                continue
            if self.loader is not None and self.loader.holds(request):
                continue
            if not has_turn:
                continue
            if not self._fits(request, budget):
                passed.append(request)
            elif self._start(request, budget):
                end = self._end(request, request.scheduled_len, budget)
                self._take(ends, request, end, budget)
        return passed

    def _fits(self, request: R, budget: PrefillBudget) -> bool:
        """Return whether waiting ``request`` could compute anything. O(its length) if only a short
        one could, else O(1)."""
        rest = request.num_tokens
        if budget.most(max(rest, TILE), request.wants_scores) >= TILE:
            return True
        if rest > budget.tokens and not request.wants_scores:
            rest -= self._match(request).cached_len
        return budget.most(rest, request.wants_scores) >= min(rest, TILE)

    def _start(self, request: R, budget: PrefillBudget) -> bool:
        """Move ``request`` from waiting to running. Returns False if there is no memory for its
        first chunk, or if less than expected was reusable and the rest exceeds the budget."""
        place = self.waiting.index(request)
        if not self.manager.begin(request):
            self._is_full = True
            return False
        end = self._end(request, request.scheduled_len, budget)
        fits = end > request.scheduled_len
        if not fits or not self.extend(request, end):
            self.manager.release(request, aborts=True)
            self._is_full = fits
            return False
        for older in self.waiting[:place]:
            older.num_passes += 1
        del self.waiting[place]
        self._matches.pop(request, None)
        insort(self.running, request, key=_age)
        self._sharing.let_in(request)
        lease, _ = request.claims
        session, is_first, losses = request.session, request.scheduled_s is None, lease.match.losses
        forgotten = session.known_len - (lease.prompt_len - losses.never_seen)
        forgotten *= self._shares  # Else nothing is kept, so nothing is evicted.
        request.lost_len = losses.kv_evicted + losses.checkpoint_evicted + max(0, forgotten)
        if is_first:
            request.scheduled_s, request.losses = self._load.now_s, losses
            request.cached_len = lease.cached_len
            if session.num_requests == 1 and not session.num_admitted:
                session.shared_len = min(lease.match.kv_match_len, request.prompt_len)
        self.admission.admitted(request, self._load)
        session.num_admitted += is_first
        return True

    def check(self) -> None:
        """Raise AssertionError unless exactly the running requests have a lease, and both lists are
        in order of age. Call only between two steps. O(requests)."""
        for requests, have_leases in ((self.waiting, False), (self.running, True)):
            ages = [_age(request) for request in requests]
            assert ages == sorted(set(ages)), "requests out of order"
            for one in requests:
                fault = f"request {one.request_id} waits with a lease, or runs without one"
                assert (one.lease is not None) == have_leases, fault
        assert len(self.running) <= self.max_running, f"{len(self.running)} requests run"
        assert self.num_in_flight in (0, 1), f"{self.num_in_flight} steps are in flight"
        held = set() if self.loader is None else self.loader.requests
        fault = "a request that does not wait follows a leader, or is held for a load"
        assert self._sharing.followers | held <= set(self.waiting), fault


# --- Prefix sharing -------------------------------------------------------------------------------


class Sharing:
    """Prefix sharing between requests that arrive together.

    A waiting request *follows* a running prefill, its leader, as long as the leader has still to
    pass a position from which the follower could resume, and makes the leader save its state there.
    Older work goes first, and a preempted or finished leader has no followers, so no request waits
    for one that makes no progress.
    """

    def __init__(self, manager: CacheManager, shares: bool) -> None:
        """Without ``shares``, no request leads another."""
        self._manager, self._shares = manager, shares
        self._leaders: list[ScheduledRequest] = []
        self._points: dict[ScheduledRequest, dict[Lease, list[int]]] = {}
        """By waiting request and lease of a leader that it was compared with: the positions from
        which the request could resume if the leader saved its state there, ascending."""

    @property
    def followers(self) -> Set[ScheduledRequest]:
        return self._points.keys()

    def follows(self, request: ScheduledRequest) -> bool:
        """Return whether waiting ``request`` shares a prefix with a request admitted before.
        O(leaders)."""
        return any(self._points.get(request, {}).values())

    def forget(self, request: ScheduledRequest) -> None:
        """Remove ``request``, which no longer waits."""
        self._points.pop(request, None)

    def let_in(self, request: ScheduledRequest) -> None:
        """Register ``request`` as running: it follows no leader, and others may follow it."""
        self._points.pop(request, None)
        self._leaders = [one for one in self._leaders if one.is_prefilling and one is not request]
        self._leaders += [request] if self._shares else []

    def goal(self, request: ScheduledRequest) -> int:
        """Return the deepest position from which a leader will make ``request`` resumable, or 0,
        and plan a checkpoint there. O(leaders), and O(its length) for each that is new."""
        if request.wants_scores:
            return 0
        goal, stateful, known = 0, self._manager.stateful, self._points.setdefault(request, {})
        for leader in self._leaders:
            lease = leader.lease
            if lease is None or not leader.is_prefilling or leader.namespace != request.namespace:
                continue
            if lease not in known:
                known[lease] = self._shared_points(request, leader)
            ahead = [  # Planned, or computed and not published yet.
                point
                for point in known[lease]
                if point > leader.scheduled_len
                or (point > leader.computed_len and (not stateful or lease.is_saving_at(point)))
            ]
            if ahead and ahead[-1] > leader.scheduled_len:
                lease.plan_checkpoint(ahead[-1], "branch")
            goal = max([goal, *ahead])
        return goal

    def _shared_points(self, request: ScheduledRequest, leader: ScheduledRequest) -> list[int]:
        """Return the positions described at ``_points``. O(shared prefix)."""
        grid, theirs, at = self._manager.cache.checkpoint_grid, leader.tokens, leader.computed_len
        # If the next token that the leader computes differs, no later part is shared.
        if at >= request.num_tokens or theirs[at] != request.tokens[at]:
            return []
        shared = common_prefix_len(request.tokens, theirs[: leader.prefill_len])
        usable = min(shared, request.num_tokens - 1) // grid * grid
        if usable <= at:
            return []
        points = [shared - shared % grid]
        if self._manager.stateful:
            # Where the request would save its state if only this KV were cached.
            known = request.spec.boundaries.positions
            prefill = Prefill(request.num_tokens, 0, shared, shared, known, grid)
            planned = prefill.on_grid(self._manager.placement.plan(prefill))
            points = [placed.position for placed in planned]
        return sorted(point for point in points if point <= usable)
