"""Admission policies without a history: by arrival, by the cached part of prompts, by sessions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from hybridcache.policies.admission.base import AdmissionPolicy, Load, Session, WaitingRequest

LOOK_AHEAD = 64
"""Waiting requests that are compared; a match takes about 15 us, so these take 1 ms."""
TOKENS_A_PASS = 64
"""Tokens by which a request moves ahead for each later one that was admitted before it. A request
of n tokens is passed at most n / 64 times by requests that arrive after it."""
MOST_WAIT_S = 120.0
"""Seconds after which the oldest waiting request goes first. Passes alone do not bound the wait of
a long prompt: one of 100,000 tokens is passed 1,562 times."""


class _Ranked(AdmissionPolicy):
    """Admits the waiting request of the lowest rank first, among the oldest ``LOOK_AHEAD``. The
    oldest one goes before them once it has waited ``MOST_WAIT_S``."""

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        is_late = bool(waiting) and load.now_s - waiting[0].arrival_s >= MOST_WAIT_S
        late = waiting[:1] if is_late else ()
        near, far = waiting[is_late:LOOK_AHEAD], waiting[LOOK_AHEAD:]
        return *late, *sorted(near, key=lambda request: self._rank(request, load)), *far

    @abstractmethod
    def _rank(self, request: WaitingRequest, load: Load) -> float:
        """Return the sort key of ``request``; requests of one rank are admitted oldest first."""


class CachedFirst(_Ranked):
    """Admit the request with the fewest uncached tokens first; each pass counts as 64 fewer.

    The oldest request goes first once it has waited for two minutes.

    Source: shortest job first, by the number of tokens left to compute.
    """

    def _rank(self, request: WaitingRequest, load: Load) -> float:
        uncached = request.num_tokens - load.cached_len(request)
        return uncached - TOKENS_A_PASS * request.num_passes


class LongestMatch(_Ranked):
    """Admit the request with the most cached tokens first; each pass counts as 64 more.

    The oldest request goes first once it has waited for two minutes.

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
