"""Limit on the number of live sessions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hybridcache.policies.admission.base import AdmissionPolicy, Load, Session, WaitingRequest

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
        self._wakes_at_s: float | None = None

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        self._wakes_at_s, has_place = None, True
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
        self._wakes_at_s = oldest.idle_since_s + KEPT_S
        return False

    def wakes_at_s(self) -> float | None:
        return self._wakes_at_s

    def session_ended(self, session: Session, load: Load) -> None:
        self._live.pop(session, None)

    def report(self) -> Mapping[str, float | str]:
        return {"limit_sessions": self._limit, "admitted_sessions": len(self._live)}
