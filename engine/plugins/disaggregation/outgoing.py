"""The prefill side of one prefix: it is computed like any request, and sent layer by layer."""

from __future__ import annotations

import queue
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from engine.errors import RequestError, StepFailed
from engine.plugins.disaggregation.prefix_buffer import Copied, PrefixBuffer
from engine.requests.request import Request
from engine.requests.spec import RequestSpec, SamplingParams
from hybridcache.api import PrefixCache
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import Indices, Tokens

PIECE_BYTES = 4 << 20
"""Maximum size of one piece."""
MAX_QUEUED_BYTES = 64 << 20
"""Maximum number of bytes of one prefix that are copied and not sent; the rest waits in the
cache."""


def failure(error: RequestError) -> dict[str, Any]:
    """Return the message that a prefix fails because of ``error``."""
    return {"failed": msgspec.to_builtins(error.to_wire())}


@dataclass(frozen=True, slots=True)
class OutgoingMessage:
    """One message for the decode engine, and the bytes that follow it."""

    said: dict[str, Any]
    copied: Copied | None = None
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class Outgoing:
    """A prefix that is being sent. The thread of the connection takes its messages; all else
    belongs to the engine's thread."""

    tokens: Tokens
    """The prefix and one more token, so that its last position can be resumed from."""
    start: int
    """First position with KV to send."""
    namespace: Hashable
    boundaries: tuple[int, ...]
    request: Request | None = None
    """Request that computes it, or None if all of it was cached."""
    messages: queue.Queue[OutgoingMessage] = field(default_factory=queue.Queue)
    is_cancelled: bool = False
    """Set by the connection's thread when the decode engine has gone."""
    has_ended: bool = False
    is_whole: bool = False
    """True if all of it is queued."""
    num_queued_bytes: int = 0
    num_taken_bytes: int = 0
    """Number of queued bytes already sent; updated by the connection's thread."""
    _sent: list[int] = field(default_factory=list)
    """For each part, the position up to which its rows are queued."""
    _receipt: Any = None
    """Lock on the prefix once it is complete, else None."""

    @property
    def end(self) -> int:
        return len(self.tokens) - 1

    def spec(self, request_id: str) -> RequestSpec:
        """Return the request that computes it."""
        return RequestSpec(
            self.tokens,
            SamplingParams(max_tokens=1, temperature=0),
            namespace=self.namespace,
            boundaries=self.boundaries,
            answer_survives=False,
            save_at=(self.end,),
            request_id=request_id,
        )

    def say(self, said: dict[str, Any]) -> None:
        """Queue the last message."""
        self.messages.put(OutgoingMessage(said))
        self.has_ended = True

    def fail(self, error: RequestError) -> None:
        """Queue ``error`` as the last message."""
        self.say(failure(error))

    def send_layer(self, unit: PrefixBuffer, part: int) -> None:
        """Send the rows of ``part`` that the current step has written."""
        request = self.request
        if request is None or request.lease is None or self.has_ended or self._receipt is not None:
            return
        self._send_rows(unit, part, request.lease.kv_indices, request.scheduled_len)

    def advance(self, unit: PrefixBuffer, manager: CacheManager) -> None:
        """Send the rest of the prefix once it is complete, then its state. Called between two
        steps."""
        cache = manager.cache
        if self._receipt is None and not self._settle(unit, cache):
            return
        match = cache.match(self.tokens, self.namespace)
        rows = cache.gather(match.node)
        for part in range(len(unit.part_bytes)):
            self._send_rows(unit, part, rows, self.end)
        if any(sent < self.end for sent in self._sent):
            return
        if match.checkpoint is not None:
            copied = unit.read_state(match.checkpoint)
            self._put([None, self.end, self.end], copied, unit.state_bytes)
        cache.unlock(self._receipt)
        self._receipt = None
        self.is_whole = True
        self.say({"done": {"computed": 0 if self.request is None else self._num_computed}})

    @property
    def _num_computed(self) -> int:
        assert self.request is not None
        return self.request.prompt_len - self.request.cached_len

    def _settle(self, unit: PrefixBuffer, cache: PrefixCache) -> bool:
        """Lock the prefix if it is complete."""
        request = self.request
        self._sent = self._sent or [self.start] * len(unit.part_bytes)
        if request is not None and request.finish_reason is None:
            return False
        match = cache.match(self.tokens, self.namespace)
        if match.cached_len < self.end:
            why = "it was aborted" if request is None else request.error or "memory is short"
            self.fail(StepFailed(f"the prefill engine could not keep it: {why}"))
            return False
        self._receipt = cache.lock(match.node)
        return True

    def give_up(self, why: str, cache: PrefixCache, abort: Callable[[str], object]) -> None:
        """End without sending the rest. ``abort`` ends a request by its id."""
        if self._receipt is not None:
            cache.unlock(self._receipt)
            self._receipt = None
        if self.request is not None and self.request.finish_reason is None:
            abort(self.request.request_id)
        self.fail(StepFailed(why))

    def _send_rows(self, unit: PrefixBuffer, part: int, rows: Indices, known: int) -> None:
        self._sent = self._sent or [self.start] * len(unit.part_bytes)
        until, step = min(known, self.end), max(1, PIECE_BYTES // unit.part_bytes[part])
        while (start := self._sent[part]) < until and self._has_room:
            end = min(start + step, until)
            piece = np.ascontiguousarray(rows[start:end])
            num_bytes = (end - start) * unit.part_bytes[part]
            self._put([part, start, end], unit.read_rows(part, piece), num_bytes)
            self._sent[part] = end

    @property
    def _has_room(self) -> bool:
        return self.num_queued_bytes - self.num_taken_bytes < MAX_QUEUED_BYTES

    def _put(self, piece: list[int | None], copied: Copied, num_bytes: int) -> None:
        self.num_queued_bytes += num_bytes
        self.messages.put(OutgoingMessage({"piece": piece}, copied, num_bytes))
