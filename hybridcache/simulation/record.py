"""What happened to each request of a run, in flat arrays: a million requests take some 80 MB."""

from __future__ import annotations

from array import array

from hybridcache.interface import Losses
from hybridcache.simulation.target import Served
from hybridcache.trace import TraceRequest


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
        """How many requests of the same session came before."""
        self.ttft_s: array[float] | list[float] = array("d")
        self.num_bypassed = 0
        """Requests that could not hold memory at all, and were computed without the cache."""
        self.losses = [0] * len(Losses._fields)
        """Tokens lost by cause, in the order of ``Losses``."""
        self.has_losses = True
        self.control_s = 0.0
        """Spent in the cache's own code."""

    def add(self, request: TraceRequest, served: Served | None, turn: int, control_s: float) -> int:
        """One request has begun; returns its place."""
        unit = self.unit
        length = request.num_tokens(unit)
        cached = 0
        missed = 0
        if served is None:
            self.num_bypassed += 1
            self.losses[5] += length
        else:
            cached = served.cached_len * unit
            missed = max(served.missed_len * unit - cached, 0)
            losses = served.losses
            if losses is None:
                self.has_losses = False
            else:
                known = 0
                for cause in range(1, 6):
                    tokens = losses[cause] * unit
                    self.losses[cause] += tokens
                    known += tokens
                # What is left over was never seen: the prompt's last id may stand for less than a unit.
                self.losses[0] += length - cached - known
        self.arrival_s.append(request.timestamp_s)
        self.prompt_tokens.append(length)
        self.cached_tokens.append(cached)
        self.missed_tokens.append(missed)
        self.turns.append(turn)
        self.ttft_s.append(0.0)
        self.control_s += control_s
        return len(self.turns) - 1
