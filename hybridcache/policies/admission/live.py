"""A fixed number of live sessions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hybridcache.policies.admission.base import AdmissionPolicy, Load, Session, WaitingRequest


class Live(AdmissionPolicy):
    """Serve at most ``limit`` sessions at a time; requests of others wait for one of them to end.

    A live session that is idle keeps its place until it is known to have ended. Source: the fixed
    form of CONCUR's limit on live agents (arXiv 2601.22705).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._live: dict[Session, None] = {}

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        for request in waiting:
            session = request.session
            if session not in self._live:
                if len(self._live) >= self._limit:
                    continue
                self._live[session] = None
            yield request

    def session_ended(self, session: Session, load: Load) -> None:
        self._live.pop(session, None)
