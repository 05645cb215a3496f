"""Session-level control: resident sessions first, others at the pace that the cache can bear."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import exp

from hybridcache.policies.admission.base import (
    AdmissionPolicy,
    AdmittedRequest,
    Load,
    Session,
    WaitingRequest,
)

CREDIT_S = 5.0
"""Seconds of repeated work that nothing is done about: about one cold prompt of 40,000 tokens. A
server that loses less than it repays never withholds a request. Also the debt up to which a server
that computes for no resident session lets another one enter at once."""
FLOOR = 0.1
"""Least share of the time in which the debt is repaid: at a steady overload, a tenth of the time is
spent on repeating work."""
NUM_ASKED = 64
"""Admissions over which the load is averaged: a few from each session that fits."""
MAX_TURNS = 128
"""Admissions of resident sessions after which one request that waits to enter goes first. A session
sends about 10 to 30 requests, so the limit is reached only where it prevents starvation."""
BUSY_FROM, BUSY_TO = 0.5, 0.8
"""Shares of the time spent on prompts: up to the first, lost work does not count; from the second
on, it counts in full. A server with time to spare repeats work without harm to anyone."""
MEMORY_S = 20.0
"""Time over which that share is averaged: a few answers."""
ACTIVE_PAUSES = 4.0
"""A session that is idle for more than so many average pauses is taken to have ended."""
PAUSE_WEIGHT, MAX_PAUSE_S = 0.05, 60.0
"""Weight of the newest pause in their average, and what a longer one counts as."""
FORGETTING = 0.999
"""Weight of an old step in the time of one token, against the next newer one."""


OPEN = "little was lost: oldest first"
ENTERING = "one session enters at a time"
LOST = "lost text is being repaid"
TURN = "the oldest session has waited long enough"


class SessionGate(AdmissionPolicy):
    """Admit requests of resident sessions first; withhold others while lost work is being repaid.

    A request *enters* if its session is new, or if most of the session's own text was evicted. All
    others continue resident sessions. Seconds spent on computing evicted tokens again are a debt.
    It is repaid at the share of time that the load would leave if nothing were cached, and at
    ``FLOOR`` at least. While the debt is below ``-CREDIT_S``, requests are admitted oldest first.
    Above, resident sessions go first, and entering requests one prefill at a time, the oldest
    session first. While the debt is positive, they enter only if no resident session has an open
    request and there is room beside the active ones, or the debt is below ``CREDIT_S``, or nothing
    was computed for as long as the prompt would take.

    Where the sessions fit, nothing is lost and nothing is withheld. Where they do not, the number
    of live sessions settles where a tenth of the time is lost. No client field is needed. Waiting
    is bounded: an entering request waits for older ones alone and, for each of them,
    ``MAX_TURNS`` admissions.

    Source: CONCUR's congestion control on live agents (arXiv 2601.22705). The signal is the time
    lost to eviction, which is what congestion costs, in place of hit rate and memory use.
    """

    def __init__(
        self,
        credit_s: float = CREDIT_S,
        floor: float = FLOOR,
        busy_from: float = BUSY_FROM,
        busy_to: float = BUSY_TO,
    ) -> None:
        self._credit_s, self._floor = credit_s, floor
        self._busy_from, self._busy_to = busy_from, busy_to
        self._debt_s, self._debt_at_s = -credit_s, 0.0
        self._pace = 1.0
        """Share of the time in which the debt is repaid since ``_debt_at_s``."""
        self._asked: deque[tuple[float, int]] = deque(maxlen=NUM_ASKED)
        """(time, prompt tokens) of the last admissions."""
        self._squares, self._products = 0.0, 0.0
        """Sums over steps, discounted: tokens**2, and tokens * seconds."""
        self._busy, self._busy_at_s = 0.0, 0.0
        self._lost: dict[WaitingRequest, None] = {}
        """Waiting requests that were found to enter; they are not looked at again."""
        self._entered: dict[WaitingRequest, AdmittedRequest] = {}
        """Requests that entered and are not answered yet."""
        self._pause_s = 0.0
        """Average time from a session's answer to its next request."""
        self._left_s = 0.0
        """Time at which the last request was answered."""
        self._num_turns = 0
        """Admissions of resident sessions since the last entry, while requests waited to enter."""
        self._wakes_at_s: float | None = None
        self._num_withheld = 0
        self._last_lost_tokens = 0
        self._reason = OPEN

    def computed(self, num_tokens: int, seconds: float, load: Load) -> None:
        self._squares = FORGETTING * self._squares + num_tokens * num_tokens
        self._products = FORGETTING * self._products + num_tokens * seconds
        share = self._busy_share(load.now_s - seconds)
        self._busy = 1 - (1 - share) * exp(-seconds / MEMORY_S)
        self._busy_at_s = load.now_s

    def _busy_share(self, now_s: float) -> float:
        """Return the share of the last ``MEMORY_S`` seconds in which prompts were computed."""
        return self._busy * exp(-max(0.0, now_s - self._busy_at_s) / MEMORY_S)

    @property
    def _token_s(self) -> float:
        """Seconds that one prompt token takes."""
        return self._products / self._squares if self._squares else 0.0

    def _debt(self, now_s: float) -> float:
        """Return the seconds of repeated work that are not repaid at ``now_s``."""
        return max(-self._credit_s, self._debt_s - self._pace * (now_s - self._debt_at_s))

    def _demand(self, now_s: float) -> float:
        """Share of the time that the last prompts would take if nothing were cached."""
        span_s = now_s - self._asked[0][0]
        num_tokens = sum(count for _, count in self._asked)
        return num_tokens * self._token_s / span_s if span_s > 0 else 0.0

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        debt_s = self._debt(load.now_s)
        self._wakes_at_s, self._num_withheld = None, 0
        if debt_s <= -self._credit_s:
            self._num_turns = 0
            self._reason = OPEN
            return waiting
        resident: list[WaitingRequest] = []
        entering: list[WaitingRequest] = []
        for request in waiting:
            (entering if self._enters(request, load) else resident).append(request)
        if not entering:
            return waiting
        self._num_withheld = len(entering)
        running = [request for request in self._entered.values() if request.is_running]
        if any(request.is_prefilling for request in running):
            self._reason = ENTERING
            return resident
        first = min(entering, key=lambda request: (request.session.number, request.arrival))
        if self._num_turns >= MAX_TURNS:
            self._reason = TURN
            return first, *resident
        if debt_s <= 0:
            self._reason = ENTERING
            return *resident, first
        self._reason = LOST
        self._wakes_at_s = load.now_s + debt_s / self._pace
        if not resident and len(running) == load.num_running:
            prompt_s = first.num_tokens * self._token_s
            fits = debt_s <= self._credit_s or self._has_room(first, entering, load)
            idle_until_s = 0.0 if fits else self._left_s + prompt_s
            if idle_until_s <= load.now_s:
                self._reason = ENTERING
                return (first,)
            self._wakes_at_s = min(self._wakes_at_s, idle_until_s)
        return resident

    def _has_room(
        self, first: WaitingRequest, entering: Sequence[WaitingRequest], load: Load
    ) -> bool:
        """Return whether ``first`` fits beside the sessions that are resident and were active
        lately. O(sessions)."""
        outside = {request.session for request in entering}
        room = 1 - load.footprint(first.session)
        for session in load.open_sessions:
            if session not in outside:
                room -= load.footprint(session)
        since_s = load.now_s - ACTIVE_PAUSES * self._pause_s
        for session in reversed(tuple(load.idle_sessions)):
            if room < 0 or session.idle_since_s < since_s:
                break
            room -= load.footprint(session)
        return room >= 0

    def arrived(self, request: WaitingRequest, load: Load) -> None:
        session = request.session
        if session.num_requests > 1:
            pause_s = min(MAX_PAUSE_S, max(0.0, request.arrival_s - session.idle_since_s))
            self._pause_s += PAUSE_WEIGHT * (pause_s - self._pause_s)

    def _enters(self, request: WaitingRequest, load: Load) -> bool:
        """Return whether ``request`` begins a session, or most of its session's text is lost."""
        session = request.session
        if request.num_preemptions:
            return False
        if session.num_requests == 1 or request in self._lost:
            return True
        if _is_most(_lost_len(session, load.cached_len(request)), session):
            self._lost[request] = None
            return True
        return False

    def admitted(self, request: AdmittedRequest, load: Load) -> None:
        self._lost.pop(request, None)
        if request.num_preemptions:
            return
        session, now_s = request.session, load.now_s
        is_new = session.num_requests == 1
        lost_len = 0 if is_new else _lost_len(session, request.cached_len)
        debt_s = self._debt(now_s)
        weight = (self._busy_share(now_s) - self._busy_from) / (self._busy_to - self._busy_from)
        if lost_len and weight > 0:
            debt_s += min(1.0, weight) * lost_len * self._token_s
            self._last_lost_tokens = lost_len
        self._asked.append((now_s, request.num_tokens))
        self._debt_s, self._debt_at_s = debt_s, now_s
        self._pace = max(self._floor, 1 - self._demand(now_s))
        if is_new or _is_most(lost_len, session):
            self._entered[request] = request
            self._num_turns = 0
        elif self._num_withheld:
            self._num_turns += 1

    def left(self, request: WaitingRequest, load: Load) -> None:
        self._left_s = load.now_s
        self._lost.pop(request, None)
        self._entered.pop(request, None)

    def wakes_at_s(self) -> float | None:
        return self._wakes_at_s

    def report(self) -> Mapping[str, float | str]:
        return {
            "debt_s": round(self._debt_s, 3),
            "debt_limit_s": 0.0,
            "repaid_share": round(self._pace, 3),
            "prompt_share": round(self._busy, 3),
            "last_lost_tokens": self._last_lost_tokens,
            "withheld_requests": self._num_withheld,
            "reason": self._reason,
        }


def _lost_len(session: Session, cached_len: int) -> int:
    """Return how many tokens of the session's previous prompt are not cached, without those that
    it shared with others at its beginning."""
    return max(0, session.known_len - max(cached_len, session.shared_len))


def _is_most(lost_len: int, session: Session) -> bool:
    return 2 * lost_len > session.known_len - session.shared_len
