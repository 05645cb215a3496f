"""A rebuilt peer, simulated."""

from __future__ import annotations

from hybridcache.allocators.moves import DEVICE, HOST
from hybridcache.api import Losses
from hybridcache.geometry.exchange import Exchange
from hybridcache.lab.baselines import BaselineConfig, PeerSession, build_baseline
from hybridcache.lab.trace import TraceRequest


class BaselineTarget:
    """A rebuilt peer. ``exchange``: cost of its copies from host memory; None if it has none."""

    priority_classes: bool | None = None

    def __init__(self, word: str, config: BaselineConfig, exchange: Exchange | None = None) -> None:
        self.baseline = build_baseline(word, config)
        self.exchange = exchange
        self.num_chunks = self.fetched_bytes = 0

    def begin(self, request: TraceRequest) -> PeerRequest | None:
        session = self.baseline.begin(request.tokens, request.namespace)
        if session is None:
            return None
        self.num_chunks += session.num_chunks
        served = PeerRequest(session, request)
        if self.exchange is not None:
            self.fetched_bytes += session.fetched_bytes
            served.copy_s = self.exchange.copy_seconds({HOST: session.fetched_bytes})
        return served

    def counters(self) -> dict[str, int]:
        found = {"prefill_chunks": self.num_chunks}
        # Peers without pages reuse single tokens.
        found["page_tokens"] = getattr(self.baseline, "page_tokens", 1)
        if self.exchange is not None:
            found[f"{DEVICE}_to_{HOST}_bytes"] = self.baseline.spilled_bytes
            found[f"{HOST}_to_{DEVICE}_bytes"] = self.fetched_bytes
        return found


class PeerRequest:
    """One request of a peer, as a ``Served``."""

    __slots__ = ("_request", "_session", "cached_len", "copy_s", "losses", "missed_len")

    def __init__(self, session: PeerSession, request: TraceRequest) -> None:
        self._session, self._request = session, request
        self.cached_len = session.cached_len
        self.losses: Losses | None = None
        self.missed_len: int | None = None
        self.copy_s = 0.0

    def prefilled(self) -> None:
        """Do nothing: peers publish when they finish."""

    def finish(self) -> None:
        self._session.finish(self._request.output)
