"""Interface of admission policies, and policies without a history."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass


class Session:
    """One conversation or agent run of one tenant, recognised by the tokens of its prompts."""

    def __init__(self, number: int, tenant: Hashable, began_s: float) -> None:
        self.number = number
        """Rank among all sessions, by the arrival of the first request."""
        self.tenant = tenant
        """Namespace of its requests."""
        self.began_s = began_s
        """Time at which the first request arrived."""
        self.has_ended = False
        """True if its client said that no further request follows."""
        self.newest_id = ""
        """Id of the newest request; of several choices, the id of the first one."""
        self.num_requests = 0
        """Prompts so far; several choices of one prompt count once."""
        self.num_admitted = 0
        """Choices of the newest prompt that were admitted."""
        self.num_open = 0
        """Requests that wait or run."""
        self.num_tokens = 0
        """Tokens of the longest text so far: prompt and, once it has ended, answer."""
        self.known_len = 0
        """Tokens of the newest prompt that were sent before: the part that can have been lost."""
        self.shared_len = 0
        """Tokens of the first prompt that were cached for other sessions."""
        self.idle_since_s = began_s
        """Time at which the last request ended, if none is open."""
        self.anchors: list[tuple[int, int]] = []
        """(length, hash) of the prefixes that the next prompt may begin with; see ``Sessions``."""


class WaitingRequest:
    """Part of a ``ScheduledRequest`` that admission policies read."""

    def __init__(self, *, arrival: int, arrival_s: float, num_tokens: int, max_len: int) -> None:
        self.arrival = arrival
        """Rank among all requests: older is smaller."""
        self.arrival_s = arrival_s
        """Time of arrival."""
        self.num_tokens = self.prefill_len = num_tokens
        """Tokens to have before the next one is sampled: the prompt; after a preemption also the
        answer so far. The first ``prefill_len`` are computed by prefills."""
        self.max_len = max_len
        """Most tokens of prompt and answer together."""
        self.computed_len = 0
        """Computed tokens."""
        self.num_preemptions = 0
        self.num_passes = 0
        """Requests that arrived later and were admitted before this one."""
        self.cached_len = 0
        """Reused tokens, set at the first admission."""
        self.lost_len = 0
        """Prompt tokens to compute again because they, or a checkpoint after them, were evicted.
        Set at each admission. Includes tokens of the session's previous prompt even if their
        eviction is no longer recorded in the cache."""
        self.row: int | None = None
        """Row of the request table while it runs, else None."""
        self.session: Session
        """Set when it is queued."""

    @property
    def is_running(self) -> bool:
        """True from its admission until it is answered or preempted."""
        return self.row is not None

    @property
    def is_prefilling(self) -> bool:
        """True while prompt tokens, or tokens lost by a preemption, are not computed."""
        return self.computed_len < self.prefill_len


@dataclass(kw_only=True, eq=False)
class Load:
    """State of the server as a policy sees it. Read-only."""

    now_s: float = 0.0
    """Time of the step."""
    max_running: int
    """Most requests that run at a time."""
    running: Collection[WaitingRequest]
    """Admitted requests that are not answered yet."""
    open_sessions: Collection[Session]
    """Sessions with a waiting or running request."""
    idle_sessions: Collection[Session]
    """Other sessions that are remembered; the one idle for longest first."""
    cached_len: Callable[[WaitingRequest], int]
    """Function of a waiting request: its tokens that are cached now, or could be loaded from a
    tier. No use of the cache. O(1) while the cache has not changed since the last call, else
    O(length)."""
    footprint: Callable[[Session], float]
    """Function of a session: the part of the memory, 0 to 1, that its text and one checkpoint take,
    without text shared with other sessions."""


class AdmissionPolicy:
    """Order in which waiting requests are admitted, and choice of those that must wait.

    The base class admits the oldest first. The scheduler admits the requests given by ``order`` as
    long as there are places, token budget and memory.

    The scheduler keeps these invariants for every policy:

    - Admission never stops running requests.
    - A request that follows a running prefill waits for it.
    - A step in which nothing runs admits the oldest waiting request that ``order`` withholds, once
      ``wakes_at_s`` is None.
    """

    wakes_at_s: float | None = None
    """Time at which ``order`` would withhold less than it last did, if nothing else happens before;
    None if it would not. Set by ``order``."""

    def arrived(self, request: WaitingRequest, load: Load) -> None:
        """Record that ``request`` waits from now on."""

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        """Return the requests that may be admitted now, in this order. ``waiting`` is sorted by
        arrival; requests left out must wait. Called once for each step with waiting requests."""
        return waiting

    def admitted(self, request: WaitingRequest, load: Load) -> None:
        """Record that ``request`` was admitted, for the first time or after a preemption."""

    def computed(self, num_tokens: int, seconds: float, load: Load) -> None:
        """Record that the step ending now took ``seconds`` and computed ``num_tokens`` prompt
        tokens."""

    def left(self, request: WaitingRequest, load: Load) -> None:
        """Record that ``request`` was answered or aborted."""

    def report(self) -> Mapping[str, float | str]:
        """Return figures for ``/metrics`` and the live page, by name."""
        return {}


# --- Policies without a history -------------------------------------------------------------------


LOOK_AHEAD = 64
"""Waiting requests that are compared; a match takes about 15 us, so these take 1 ms."""
TOKENS_A_PASS = 64
"""Tokens by which a request moves ahead for each later one that was admitted before it. A request
of n tokens is passed at most n / 64 times by requests that arrive after it."""
MOST_WAIT_S = 120.0
"""Seconds after which the oldest waiting request goes first. Passes alone do not bound the wait of
a long prompt: one of 100,000 tokens is passed 1,562 times."""


class _Ranked(AdmissionPolicy):
    """Admit the lowest rank first, among the oldest ``LOOK_AHEAD`` requests. The oldest one goes
    before them once it has waited ``MOST_WAIT_S``."""

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        is_late = bool(waiting) and load.now_s - waiting[0].arrival_s >= MOST_WAIT_S
        late = waiting[:1] if is_late else ()
        near, far = waiting[is_late:LOOK_AHEAD], waiting[LOOK_AHEAD:]
        return *late, *sorted(near, key=lambda request: self._rank(request, load)), *far

    @abstractmethod
    def _rank(self, request: WaitingRequest, load: Load) -> float:
        """Return the sort key of ``request``; requests of one rank are admitted oldest first."""


class CachedFirst(_Ranked):
    """Admit the request with the fewest uncached tokens first; each pass counts as 64 fewer. The
    oldest request goes first once it has waited for two minutes.

    Source: shortest job first, by the number of tokens left to compute.
    """

    def _rank(self, request: WaitingRequest, load: Load) -> float:
        uncached = request.num_tokens - load.cached_len(request)
        return uncached - TOKENS_A_PASS * request.num_passes


class LongestMatch(_Ranked):
    """Admit the request with the most cached tokens first; each pass counts as 64 more. The oldest
    request goes first once it has waited for two minutes.

    Source: SGLang's ``lpm``, with the ageing of its pull requests 31723 and 33210.
    """

    def _rank(self, request: WaitingRequest, load: Load) -> float:
        return -load.cached_len(request) - TOKENS_A_PASS * request.num_passes


class Oldest(AdmissionPolicy):
    """Admit in the order of arrival.

    Source: folklore; vLLM's and SGLang's ``fcfs``, and the control of every study.
    """


KEPT_S = 300.0
"""Seconds after which the place of an idle session is given to another."""


class Live(AdmissionPolicy):
    """Serve at most ``limit`` sessions at a time; requests of others wait for one of them to end.

    A live session that is idle keeps its place until it is known to have ended, for ``KEPT_S`` at
    most. Source: the fixed form of CONCUR's limit on live agents (arXiv 2601.22705).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._live: dict[Session, None] = {}

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
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
