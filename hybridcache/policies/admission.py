"""Admission policies: which waiting request is admitted first, and which must wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import inf

from hybridcache.scheduling.request import AdmissionPolicy, ServerLoad, WaitingRequest
from hybridcache.scheduling.sessions import Session

# --- Policies without a history -------------------------------------------------------------------


LOOK_AHEAD = 64
"""Waiting requests that are compared; a match takes about 15 us, so these take 1 ms."""
TOKENS_A_PASS = 64
"""Tokens by which a request moves ahead for each later one that was admitted before it. A request
of n tokens is passed at most n / 64 times by requests that arrive after it."""
RANKED_WAIT_S = 120.0
"""Seconds after which the oldest waiting request goes first. Passes alone do not bound the wait of
a long prompt: one of 100,000 tokens is passed 1,562 times."""


class CachedFirst(AdmissionPolicy):
    """Admit the request with the fewest uncached tokens first; each pass counts as 64 fewer. The
    oldest request goes first once it has waited for two minutes.

    Source: shortest job first, by the number of tokens left to compute.
    """

    recognises_sessions = False

    def order(
        self, waiting: Sequence[WaitingRequest], load: ServerLoad
    ) -> Iterable[WaitingRequest]:
        is_late = bool(waiting) and load.now_s - waiting[0].arrival_s >= RANKED_WAIT_S
        late, near, far = waiting[:is_late], waiting[is_late:LOOK_AHEAD], waiting[LOOK_AHEAD:]
        return *late, *sorted(near, key=lambda request: self._rank(request, load)), *far

    def _rank(self, request: WaitingRequest, load: ServerLoad) -> float:
        """Return the sort key of ``request``; requests of one rank are admitted oldest first."""
        uncached = request.num_tokens - load.cached_len(request)
        return uncached - TOKENS_A_PASS * request.num_passes


class LongestMatch(CachedFirst):
    """Admit the request with the most cached tokens first; each pass counts as 64 more. The oldest
    request goes first once it has waited for two minutes.

    Source: SGLang's ``lpm``, with the ageing of its pull requests 31723 and 33210.
    """

    def _rank(self, request: WaitingRequest, load: ServerLoad) -> float:
        return -load.cached_len(request) - TOKENS_A_PASS * request.num_passes


class Oldest(AdmissionPolicy):
    """Admit in the order of arrival.

    Source: folklore; vLLM's and SGLang's ``fcfs``, and the control of every study.
    """

    recognises_sessions = False


KEPT_S = 300.0
"""Seconds after which the place of an idle session is given to another."""


class LiveSessions(AdmissionPolicy):
    """Serve at most ``limit`` (N) sessions at a time; requests of others wait until one ends.

    A live session that is idle keeps its place until it is known to have ended, for ``KEPT_S`` at
    most. Source: the fixed form of CONCUR's limit on live agents (arXiv 2601.22705).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._live: dict[Session, None] = {}

    def order(
        self, waiting: Sequence[WaitingRequest], load: ServerLoad
    ) -> Iterable[WaitingRequest]:
        self.wakes_at_s, has_place = None, True
        self._live = {session: None for session in self._live if not session.has_ended}
        for request in waiting:
            session = request.session
            if session not in self._live:
                has_place = has_place and self._has_place(load.now_s)
                if not has_place:
                    continue
                self._live[session] = None
            yield request

    def _has_place(self, now_s: float) -> bool:
        if len(self._live) < self._limit:
            return True
        idle = [session for session in self._live if not session.num_open]
        if not idle:
            return False
        oldest = min(idle, key=lambda session: session.idle_since_s)
        if oldest.idle_since_s + KEPT_S <= now_s:
            del self._live[oldest]
            return True
        self.wakes_at_s = oldest.idle_since_s + KEPT_S
        return False

    def report(self) -> Mapping[str, float | str]:
        said: dict[str, float | str] = {
            "limit_sessions": self._limit,
            "admitted_sessions": len(self._live),
        }
        if self.wakes_at_s is not None:
            said["reason"] = f"all places are taken; an idle session keeps its own for {KEPT_S:g} s"
        return said


# --- The policy that keeps resident sessions in memory --------------------------------------------


CREDIT_S = 5.0
"""Seconds of repeated work that are tolerated: about one cold prompt of 40,000 tokens."""
FLOOR = 0.1
"""Least share of the time in which the debt is repaid."""
NUM_ASKED = 64
"""Admissions over which the load is averaged: a few from each session that fits."""
DUE_S, DUE_FACTOR = 20.0, 2.5
"""Wait after which a request is due. With a smaller factor, later turns of overloaded agents wait
more often; with a larger one, new sessions wait longer."""
LEAST_WORTH = 1.2
"""Least gain in requests from keeping sessions in memory at which others are withheld. Agents that
write code have 1.2 to 5, tau-bench 0.7, long chats 0.5, chats 0.25."""
ACTIVE_PAUSES = 1.5
"""Number of average pauses after which an idle session is considered ended."""
PAUSE_WEIGHT, MAX_PAUSE_S = 0.05, 60.0
"""Weight of the newest pause in the average, and the upper limit of a pause in that average."""
DECREASE, INCREASE, LEAST_LIMIT = 0.9, 0.03, 0.1
"""Changes of the share of the memory that live sessions, or running requests, may fill, and its
least value."""
FORGETTING = 0.999
"""Weight of a step, relative to the next one, in the average time of one token."""


OPEN = "no request is withheld: oldest first"
CROWDED = "running requests displace text that sessions share"
ENTERING = "one session enters at a time"
LOST = "lost text is being repaid"
DUE = "the oldest request has waited long enough"


class _Debt:
    """Seconds of repeated work that are not repaid yet."""

    def __init__(self) -> None:
        self.seconds, self._at_s = -CREDIT_S, 0.0
        self.pace = 1.0
        """Share of the time in which the debt is repaid."""
        self._asked: deque[tuple[float, int]] = deque(maxlen=NUM_ASKED)
        """(time, prompt tokens) of the last admissions."""

    def at(self, now_s: float) -> float:
        return max(-CREDIT_S, self.seconds - self.pace * (now_s - self._at_s))

    def update(self, now_s: float, lost_s: float, num_tokens: int, token_s: float) -> None:
        """Add the lost seconds of an admitted prompt of ``num_tokens``, and adapt the pace."""
        self.seconds, self._at_s = self.at(now_s) + lost_s, now_s
        self._asked.append((now_s, num_tokens))
        span_s = now_s - self._asked[0][0]
        asked_s = sum(count for _, count in self._asked) * token_s
        # Share of the time that the last prompts would take if nothing were cached.
        self.pace = max(FLOOR, 1 - (asked_s / span_s if span_s > 0 else 0.0))


class _Limit:
    """Share of the memory that live sessions, or running requests, may fill."""

    def __init__(self) -> None:
        self.share, self._moves_at_s = 1.0, 0.0

    def update(
        self, now_s: float, cycle_s: float, factor: float, step: float, at_once: bool = False
    ) -> None:
        """Change the share, once per cycle of a pause and an answer or ``at_once``."""
        if at_once or now_s >= self._moves_at_s:
            self.share = min(1.0, max(LEAST_LIMIT, factor * self.share + step))
            self._moves_at_s = now_s + cycle_s


class _Worth:
    """Averages of what sessions take, and the worth of keeping them in memory."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        """Time from a session's answer to its next request."""
        self.answer_s = 0.0
        """Time from admission to the last token."""
        self.prompt_tokens = 0.0
        """Unshared tokens of a prompt."""
        self.held_s = 0.0
        """Share of the memory times seconds of a pause and an answer, without prompts computed
        meanwhile."""

    def update(self, **values: float) -> None:
        """Add a new value to each named average. The first value is the average."""
        for name, value in values.items():
            average = getattr(self, name)
            setattr(self, name, average + PAUSE_WEIGHT * (value - average) if average else value)

    def requests(self, token_s: float) -> float:
        """Return the number of requests that are answered if sessions are kept in memory, relative
        to the number if their prompts are repeated. ``LEAST_WORTH`` if nothing is known.

        With n sessions in memory, one request of each is answered in every cycle of a pause and an
        answer; without, one request in the time of a whole prompt. Prompts that are computed during
        an answer do not count, or the number would stay low where sessions are not kept.
        """
        return self.prompt_tokens * token_s / self.held_s if self.held_s else LEAST_WORTH


class SessionGate(AdmissionPolicy):
    """Admit requests of resident sessions first; withhold others while lost work is being repaid.

    A request *enters* if its session is new, or if most of the session's own text was evicted. All
    others continue resident sessions, and so do further choices of an admitted prompt. Seconds
    spent on computing evicted tokens again are a debt. It is repaid at the share of time that the
    load would leave if nothing were cached, and at ``FLOOR`` at least.

    - Debt below ``-CREDIT_S``: requests are admitted oldest first.
    - Debt above it: resident sessions go first. Entering requests follow, one prefill at a time,
      the oldest first. New sessions must fit next to the active ones.
    - Positive debt: a request enters only if no resident session has an open request and it fits,
      or if nothing was computed for a while.

    Bound of the wait. Let ``ahead`` be the seconds in which the prompts that wait when a request
    arrives are computed, without their cached parts. ``DUE_S + DUE_FACTOR * ahead`` after its
    arrival the request is *due*: it precedes all that arrived later. Then only prompts that waited
    at its arrival are computed first, each once, which takes ``ahead``. So its wait is at most
    ``DUE_S + (DUE_FACTOR + 1) * ahead``, and until running requests leave a place and memory.
    ``Oldest`` computes the same prompts first. Tenants, pauses and later requests change nothing.
    With ``most_s`` (N), a request is due after N seconds at most: its wait is then at most that and
    ``ahead``, for which more lost text is repeated.

    The share of the memory that active sessions may fill is found by congestion control. Once per
    cycle of a pause and an answer, it falls by a tenth if a session's text was evicted, and grows
    by a step if not.

    Pauses can be so long, or prompts so short, that repeating whole prompts answers more requests
    than keeping sessions in memory. Requests are then admitted oldest first, without a debt, and
    the limit applies to the running ones, which displace text that sessions share. It falls with
    each admission that finds most of this text evicted while running requests take most of the
    memory, and while the load leaves no time to compute whole prompts. So they keep half of it.

    Source: CONCUR's congestion control on live agents (arXiv 2601.22705). The signal is the time
    lost to eviction, which is the cost of congestion, in place of hit rate and memory use.
    """

    def __init__(self, most_s: float = inf) -> None:
        self.debt, self._limit, self._worth = _Debt(), _Limit(), _Worth()
        self._most_s = most_s
        self._squares, self._products = 0.0, 0.0
        """Sums over steps, discounted: tokens**2, and tokens * seconds."""
        self._token_s = 0.0
        """Seconds that one prompt token takes."""
        self._queued: dict[WaitingRequest, list[int]] = {}
        """By waiting request that ``order`` has seen: its ``_own_len``, and the sum of those of
        older requests admitted since."""
        self._num_orders = 0
        self._lost: dict[WaitingRequest, None] = {}
        """Waiting requests that were found to enter; they are not examined again."""
        self._entered: dict[WaitingRequest, None] = {}
        """Requests that entered and are not answered yet."""
        self._prompts_s = 0.0
        """Seconds spent on prompts so far."""
        self._admitted_at_s: dict[WaitingRequest, tuple[float, float]] = {}
        """Times of admission of unanswered requests, and ``_prompts_s`` then."""
        self._left_s = 0.0
        """Time at which the last request was answered."""
        self._num_withheld = 0
        self._reason = OPEN

    @property
    def _keeps(self) -> bool:
        """True if keeping sessions in memory pays."""
        return self._worth.requests(self._token_s) >= LEAST_WORTH

    def computed(self, num_tokens: int, seconds: float, load: ServerLoad) -> None:
        self._squares = FORGETTING * self._squares + num_tokens * num_tokens
        self._products = FORGETTING * self._products + num_tokens * seconds
        self._token_s = self._products / self._squares if self._squares else 0.0
        self._prompts_s += num_tokens * self._token_s

    def order(
        self, waiting: Sequence[WaitingRequest], load: ServerLoad
    ) -> Iterable[WaitingRequest]:
        debt_s = self.debt.at(load.now_s)
        self.wakes_at_s, self._num_withheld = None, 0
        if debt_s <= -CREDIT_S or not self._keeps:
            is_limited = self._limit.share < 1 and not self._keeps
            if is_limited and _running_share(load) > self._limit.share:
                self._reason, self._num_withheld = CROWDED, len(waiting)
                return ()
            self._reason = OPEN
            return waiting
        due: list[WaitingRequest] = []
        resident: list[WaitingRequest] = []
        entering: list[WaitingRequest] = []
        wakes_at_s, num_ahead, factor_s = inf, 0, DUE_FACTOR * self._token_s
        self._num_orders += 1
        queued, looked_at = self._queued, waiting[self._num_orders % len(waiting)]
        if looked_at in queued:  # One a step: prompts that share a head cost it once.
            queued[looked_at][0] = self._own_len(looked_at, load)
        for request in waiting:
            lengths = queued.get(request)
            if lengths is None:
                lengths = queued[request] = [self._own_len(request, load), 0]
            due_s = DUE_S + factor_s * (num_ahead + lengths[1])
            due_at_s = request.arrival_s + min(self._most_s, due_s)
            num_ahead += lengths[0]
            if due_at_s <= load.now_s:
                due.append(request)
            elif self._enters(request, load):
                entering.append(request)
                wakes_at_s = min(wakes_at_s, due_at_s)
            else:
                resident.append(request)
        self._num_withheld = len(entering)
        if not entering:
            self._reason = DUE if due else OPEN
            return *due, *resident
        self.wakes_at_s, self._reason = wakes_at_s, DUE if due else ENTERING
        if due or any(one.is_running and one.is_prefilling for one in self._entered):
            return *due, *resident
        first, room_at_s = entering[0], self._room_at_s(entering, load)
        if debt_s <= 0 and (room_at_s <= load.now_s or first.session.num_requests > 1):
            return *resident, first
        if not resident and self._entered.keys() >= set(load.running):
            alone_s = max(self._worth.pause_s, first.num_tokens * self._token_s)
            room_at_s = min(room_at_s, self._left_s + alone_s)
            if room_at_s <= load.now_s:
                return (first,)
        self._reason = LOST
        times_s = wakes_at_s, room_at_s, load.now_s + debt_s / self.debt.pace
        self.wakes_at_s = min(time_s for time_s in times_s if time_s > load.now_s)
        return resident

    def _room_at_s(self, entering: Sequence[WaitingRequest], load: ServerLoad) -> float:
        """Return the time at which the first of ``entering`` fits next to recently active resident
        sessions, if no request arrives. O(sessions)."""
        outside = {request.session for request in entering}
        own = load.footprint(entering[0].session)
        taken = sum(load.footprint(one) for one in load.open_sessions if one not in outside)
        if taken and taken + own > self._limit.share:
            return inf
        for session in reversed(tuple(load.idle_sessions)):
            leaves_at_s = session.idle_since_s + ACTIVE_PAUSES * self._worth.pause_s
            if leaves_at_s <= load.now_s:
                break
            taken += load.footprint(session)
            if taken + own > self._limit.share:
                return leaves_at_s
        return load.now_s

    def arrived(self, request: WaitingRequest, load: ServerLoad) -> None:
        session = request.session
        if session.num_requests > 1 and session.num_open <= 1 and not session.num_admitted:
            pause_s = min(MAX_PAUSE_S, max(0.0, request.arrival_s - session.idle_since_s))
            self._worth.update(pause_s=pause_s)

    def _own_len(self, request: WaitingRequest, load: ServerLoad) -> int:
        """Return the number of tokens to compute; 0 for a further choice."""
        return 0 if request.session.num_open > 1 else request.num_tokens - load.cached_len(request)

    def _enters(self, request: WaitingRequest, load: ServerLoad) -> bool:
        """Return whether ``request`` begins a session, or most of its session's text is lost."""
        session = request.session
        if request.num_preemptions or session.num_admitted:
            return False
        if session.num_requests > 1 and request not in self._lost:
            if not _is_most(_lost_len(session, load.cached_len(request)), session):
                return False
            self._lost[request] = None
        return True

    def admitted(self, request: WaitingRequest, load: ServerLoad) -> None:
        self._lost.pop(request, None)
        own_len, _ = self._queued.pop(request, (0, 0))
        for other, lengths in self._queued.items():
            lengths[1] += own_len * (other.arrival > request.arrival)
        session, now_s = request.session, load.now_s
        if request.num_preemptions:
            return
        if session.num_admitted:
            if any(other.session is session for other in self._entered):
                self._entered[request] = None
            return
        is_new = session.num_requests == 1
        lost_len = 0 if is_new else min(_lost_len(session, request.cached_len), request.lost_len)
        lost_s = lost_len * self._token_s if lost_len and self._keeps else 0.0
        self.debt.update(now_s, lost_s, request.num_tokens, self._token_s)
        self._admitted_at_s[request] = now_s, self._prompts_s
        self._worth.update(prompt_tokens=request.num_tokens - session.shared_len)
        is_entry = is_new or _is_most(lost_len, session)
        if is_entry:
            self._entered[request] = None
        cycle_s = self._worth.pause_s + self._worth.answer_s
        missed = min(session.shared_len - request.cached_len, request.lost_len)
        if 2 * missed > session.shared_len and self._is_crowded(load):
            self._limit.update(now_s, cycle_s, DECREASE, 0.0, at_once=True)  # Each loss counts.
        elif is_entry and lost_len and self._keeps:
            self._limit.update(now_s, cycle_s, DECREASE, 0.0)
        elif not is_new or (self._limit.share < 1 and not self._keeps):
            self._limit.update(now_s, cycle_s, 1.0, INCREASE)

    def _is_crowded(self, load: ServerLoad) -> bool:
        """Return whether running requests take most of the memory, keeping sessions does not pay,
        and there is no time to compute whole prompts."""
        no_time = self.debt.pace <= FLOOR and not self._keeps
        return no_time and 2 * _running_share(load) > 1

    def left(self, request: WaitingRequest, load: ServerLoad) -> None:
        self._left_s = load.now_s
        if request in self._admitted_at_s:
            admitted_at_s, prompts_s = self._admitted_at_s.pop(request)
            answer_s = load.now_s - admitted_at_s
            quiet_s = max(0.0, answer_s - (self._prompts_s - prompts_s))
            held_s = load.footprint(request.session) * (quiet_s + self._worth.pause_s)
            self._worth.update(answer_s=answer_s, held_s=held_s)
        for requests in (self._queued, self._lost, self._entered):
            requests.pop(request, None)

    def report(self) -> Mapping[str, float | str]:
        return {
            "debt_s": round(self.debt.seconds, 3),
            "memory_limit": round(self._limit.share, 3),
            "repaid_share": round(self.debt.pace, 3),
            "worth": round(self._worth.requests(self._token_s), 3),
            "withheld_requests": self._num_withheld,
            "reason": self._reason,
        }


def _lost_len(session: Session, cached_len: int) -> int:
    """Return the uncached tokens of the session's previous prompt, without the beginning that it
    shared with others."""
    return max(0, session.known_len - max(cached_len, session.shared_len))


def _is_most(lost_len: int, session: Session) -> bool:
    return 2 * lost_len > session.known_len - session.shared_len


def _running_share(load: ServerLoad) -> float:
    """Return the share of the memory that running requests take, without shared text."""
    return sum(load.footprint(request.session) for request in load.running)
