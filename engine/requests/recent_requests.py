"""Requests that ended recently, for the live page and for traces of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from engine.requests.request import Request
from engine.text.outputs import FinishReason
from hybridcache.api import Losses
from hybridcache.tokens import Tokens

MAX_REQUESTS = 256
MAX_TOKENS = 1 << 21
"""Maximum number of tokens of all kept requests together. Their ids take 8 MiB."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One request that ended. Times are those of the engine's clock, or None if not reached."""

    request_id: str
    arrival: int
    namespace: Hashable
    tokens: Tokens
    """Prompt and answer: a view of the request's tokens."""
    prompt_len: int
    session: int
    """Number of the session of this request."""
    cached_len: int
    losses: Losses | None
    num_preemptions: int
    reason: FinishReason
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float

    @classmethod
    def of(cls, request: Request, now_s: float) -> Ended:
        return cls(
            request.request_id,
            request.arrival,
            request.namespace,
            request.tokens,
            request.prompt_len,
            request.session.number,
            request.cached_len,
            request.losses,
            request.num_preemptions,
            request.finish_reason or "abort",
            request.arrival_s,
            request.scheduled_s,
            request.first_token_s,
            now_s if request.finished_s is None else request.finished_s,
        )


class RecentRequests:
    """Bounded queue of the requests that ended last, with listeners. O(1) per request."""

    def __init__(self) -> None:
        self._ended: deque[Ended] = deque()
        self._num_tokens = 0
        self.num_ended = 0
        self.listeners: list[Callable[[Ended], None]] = []

    def __iter__(self) -> Iterator[Ended]:
        return iter(self._ended)

    def add(self, request: Request, now_s: float) -> None:
        """Append ``request``, which has ended, and notify the listeners."""
        ended = Ended.of(request, now_s)
        self.num_ended += 1
        self._ended.append(ended)
        self._num_tokens += len(ended.tokens)
        while len(self._ended) > MAX_REQUESTS or self._num_tokens > MAX_TOKENS:
            self._num_tokens -= len(self._ended.popleft().tokens)
        for listener in self.listeners:
            listener(ended)
