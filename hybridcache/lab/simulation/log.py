"""Log of a run's requests, in flat arrays: a million requests take about 80 MB."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from operator import add

from hybridcache.api import Losses
from hybridcache.lab.simulation.target import Served
from hybridcache.lab.trace import TraceRequest


class RequestLog:
    """One entry a request, in the order in which they were begun. Tokens and seconds."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.arrival_s = array("d")
        self.prompt_tokens = array("q")
        self.cached_tokens = array("q")
        self.missed_tokens = array("q")
        """Further tokens that a checkpoint which was evicted would have saved."""
        self.turns = array("i")
        """Number of earlier requests of the same session."""
        self.sessions = array("i")
        """Number of the request's session, in the order of their first requests."""
        self.session_names: list[Hashable] = []
        self._of_session: dict[Hashable, list[int]] = {}
        """Number of each session, and of its requests so far."""
        self.copy_s = array("d")
        """Seconds of copies from lower tiers."""
        self.ttft_s = array("d")
        self.num_bypassed = 0
        """Requests that could not hold memory at all, and were computed without the cache."""
        self._lost_ids = [0] * len(Losses._fields)
        """By cause, in the order of ``Losses``."""
        self._bypassed_tokens = 0
        self.has_losses = True
        self.has_missed = True
        """False if the target does not report the tokens that evicted checkpoints would have
        saved."""
        self.control_s = 0.0
        """Spent in the cache's own code."""

    def add(self, request: TraceRequest, served: Served | None, control_s: float) -> int:
        """Record that a request has begun, and return its place."""
        unit = self.unit
        length = request.num_tokens(unit)
        cached = missed = 0
        self.copy_s.append(0.0 if served is None else served.copy_s)
        if served is None:
            self.num_bypassed += 1
            self._bypassed_tokens += length
        else:
            cached = served.cached_len * unit
            missed_len = served.missed_len
            if missed_len is None:
                self.has_missed = False
            elif missed_len > served.cached_len:
                missed = missed_len * unit - cached
            losses = served.losses
            if losses is None:
                self.has_losses = False
            else:
                self._lost_ids = list(map(add, self._lost_ids, losses))
        self.arrival_s.append(request.timestamp_s)
        self.prompt_tokens.append(length)
        self.cached_tokens.append(cached)
        self.missed_tokens.append(missed)
        known = self._of_session.get(request.session)
        if known is None:
            known = self._of_session[request.session] = [len(self.session_names), 0]
            self.session_names.append(request.session)
        self.sessions.append(known[0])
        self.turns.append(known[1])
        known[1] += 1
        self.control_s += control_s
        return len(self.turns) - 1

    @property
    def losses(self) -> list[int]:
        """Tokens lost by cause, in the order of ``Losses``. Tokens without another cause count as
        never seen: a prompt's last id may stand for less than a unit. O(requests)."""
        lost = Losses(*(num_ids * self.unit for num_ids in self._lost_ids))
        known = lost._replace(never_seen=0, refused=lost.refused + self._bypassed_tokens)
        never_seen = sum(self.prompt_tokens) - sum(self.cached_tokens) - sum(known)
        return list(known._replace(never_seen=never_seen))
