"""Server of a prefill engine: computes prompts of decode engines next to its own.

A prefix is computed like any request, and sent step by step. Messages are exchanged between two
steps, and while the engine is idle. Connections are neither encrypted nor authenticated: they are
for engines in one trusted network.
"""

from __future__ import annotations

import itertools
import logging
import socket
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import zmq
from msgspec import structs

from engine.config import ConfigError, EngineConfig
from engine.core import EngineCore, Plugin
from engine.errors import EngineStopped, RequestError, StepFailed
from engine.plugins.disaggregation import wire
from engine.plugins.disaggregation.wire import PIECE_BYTES, PrefixBuffer, identity
from engine.requests.request import Request
from engine.runner.device import HostCopy
from engine.schedule.report import CacheReport
from hybridcache.allocators.moves import Indices
from hybridcache.radix.cache import LockHandle
from hybridcache.radix.tokens import Tokens
from hybridcache.scheduling.cache_manager import CacheManager

logger = logging.getLogger(__name__)
ALIVE_S = 1.0
"""Interval of the messages that a prefix is still being computed."""
IDLE_S = 0.01
"""Interval in which an engine without work looks for messages."""
MAX_QUEUED_BYTES = 64 << 20
"""Maximum number of bytes of one prefix that are copied and not confirmed by the decode engine; the
rest waits in the cache."""
STOPPING = "the prefill engine is stopping"


@dataclass(slots=True, eq=False)
class Outgoing:
    """A prefix that is being sent."""

    server: PrefillServer = field(repr=False)
    peer: bytes
    """Connection to the decode engine."""
    ask: wire.PrefixRequest
    tokens: Tokens
    """The prefix and one more token, so that its last position can be resumed from."""
    request: Request | None
    """Request that computes it, or None if all of it was cached."""
    _sent: int
    """Position up to which rows are queued."""
    moved_s: float = field(default_factory=time.monotonic)
    """Time at which it began, or bytes were queued or confirmed last."""
    has_ended: bool = False
    num_queued_bytes: int = 0
    num_taken_bytes: int = 0
    """Number of queued bytes that the decode engine has confirmed."""
    _receipt: LockHandle | None = None
    """Lock on the prefix once it is complete, else None."""

    @property
    def end(self) -> int:
        return len(self.tokens) - 1

    def advance(self) -> None:
        """Queue the rows that the steps so far have written, and the state once the prefix is
        complete."""
        request, cache, unit = self.request, self.server.engine.cache, self.server.unit
        if request is not None and request.finish_reason is None:
            if request.lease is not None:
                self._send_rows(request.lease.kv_indices, request.scheduled_len)
            return
        match = cache.match(self.tokens, self.ask.spec.namespace)
        if self._receipt is None:
            if match.cached_len < self.end:
                why = "it was aborted" if request is None else request.error or "memory is short"
                error = StepFailed(f"the prefill engine could not keep it: {why}")
                self.server.fail(self.peer, error)
                return
            self._receipt = cache.lock(match.node)
        if not self.has_room:
            return
        self._send_rows(cache.gather(match.node), self.end)
        if self._sent < self.end:
            return
        if match.checkpoint is not None:
            self._put(unit.read_rows(unit.slot_rows(match.checkpoint)))
        counts, num_tokens = self.server.counts, self.end - self.ask.start
        counts.prefixes += 1
        counts.tokens += num_tokens
        counts.needed_bytes += num_tokens * unit.row_bytes + unit.state_bytes
        self.close()

    def close(self) -> None:
        """Release the memory of the prefix, and compute no more of it."""
        if self._receipt is not None:
            receipt, self._receipt = self._receipt, None
            receipt.cache.unlock(receipt)
        if self.request is not None and self.request.finish_reason is None:
            self.server.engine.end_request(self.request)
        self.has_ended = True

    def _send_rows(self, rows: Indices, known: int) -> None:
        unit, until = self.server.unit, min(known, self.end)
        step = max(1, PIECE_BYTES // unit.row_bytes)
        while (start := self._sent) < until and self.has_room:
            self._sent = end = min(start + step, until)
            self._put(unit.read_rows(rows[start:end]))

    @property
    def has_room(self) -> bool:
        return self.num_queued_bytes - self.num_taken_bytes < MAX_QUEUED_BYTES

    def _put(self, copied: HostCopy) -> None:
        self.num_queued_bytes += copied.num_bytes
        self.moved_s = time.monotonic()
        self.server.unsent.append((self.peer, copied))


class PrefillServer(Plugin):
    """Computes prefixes for other engines (setting ``role`` prefill)."""

    engine: EngineCore
    _manager: CacheManager
    unit: PrefixBuffer

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._timeout_s, self.counts = self.config.transfer_timeout_s, wire.TransferCounts()
        self.unsent: deque[tuple[bytes, HostCopy]] = deque()
        """Connection and bytes of ``Data`` that wait for these bytes."""
        self._numbers = itertools.count()
        self._checks_s = 0.0
        """Time of the next ``_check_sessions``."""
        self._is_accepting = True
        self._sessions: dict[bytes, Outgoing] = {}
        """Accepted prefixes by connection, until that is closed."""

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        """Start listening. Raises ConfigError if the address is not available."""
        self.engine, self._manager = engine, manager
        self.unit = PrefixBuffer(engine.runner)
        self._own = identity(engine.runner)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(wire.IO_THREADS)
        name, port = self.config.addresses[0]
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            host = str(min(found)[4][0])  # IPv4 first
            self._router = wire.open_socket(self._context, zmq.ROUTER, host, self._timeout_s)
            self._router.set(zmq.ROUTER_MANDATORY, 1)
            self._router.set(zmq.MAXMSGSIZE, wire.MAX_ASK_BYTES)
            self._router.sndhwm = 0  # MAX_QUEUED_BYTES is the limit.
            self._router.bind(wire.endpoint(host, port))
        except (OSError, zmq.ZMQError) as error:
            self._context.destroy(0)
            why = error.strerror or error
            raise ConfigError(f"--transfer-at {self.config.transfer_at}: {why}.") from error
        # The collection of an engine that was not closed would wait for its open socket for ever.
        weakref.finalize(self, _close, self._router, self._context)
        bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = name, int(bound.rpartition(":")[2])
        engine.transfers.append(self)

    def _exchange(self) -> None:
        """Handle the messages that have arrived, and send those that are due."""
        if self._router.closed:
            return
        now = time.monotonic()
        if now >= self._checks_s:
            self._checks_s = now + ALIVE_S
            self._check_sessions(now)
        for _ in range(wire.MAX_UNREAD):  # Then it is the turn of the next step.
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self.counts.wire_bytes += sum(map(len, frames))
            try:
                self._receive(peer, wire.FOR_PREFILL.decode(b"".join(frames)))
            except RequestError as error:
                self.fail(peer, error)
            except ValueError as error:
                self.fail(peer, StepFailed(f"it does not understand the message ({error})"))
        self._send_ready()

    def _send_ready(self) -> None:
        """Send the queued messages with bytes that have arrived from the device."""
        while self.unsent and self.unsent[0][1].is_done:
            peer, copied = self.unsent.popleft()
            if peer in self._sessions:
                self._send(peer, wire.Data(), copied)

    def _receive(self, peer: bytes, message: wire.ToPrefill) -> None:
        """Handle one message. Raises RequestError if a prefix is refused, and ValueError if the
        message is malformed."""
        session = self._sessions.get(peer)
        if isinstance(message, wire.PrefixRequest):
            if session is not None:
                raise ValueError("a second request")
            self._begin(peer, message)
        elif session is not None and message.num_bytes > session.num_taken_bytes:
            session.num_taken_bytes = min(message.num_bytes, session.num_queued_bytes)
            session.moved_s = time.monotonic()

    def _begin(self, peer: bytes, ask: wire.PrefixRequest) -> None:
        names = [name for name in self._own if self._own[name] != ask.identity.get(name)]
        if names:
            raise StepFailed(f"it differs in {', '.join(names)}: configure both the same")
        tokens = ask.spec.prompt
        if not isinstance(tokens, np.ndarray) or ask.start >= len(tokens):
            raise ValueError("nothing is requested")
        if not self._is_accepting:
            raise EngineStopped(STOPPING)
        spec = self.engine.validate(ask.spec)
        request = None
        if self.engine.cache.match(tokens, spec.namespace).cached_len < len(tokens) - 1:
            request_id = f"transfer-{next(self._numbers)}"
            request = self.engine.make(structs.replace(spec, request_id=request_id))
            self.engine.start_request(request)
        self._sessions[peer] = Outgoing(self, peer, ask, tokens, request, ask.start)

    def _check_sessions(self, now: float) -> None:
        """Tell decode engines that their prefixes are being computed. Those that have gone or take
        nothing are dropped, so that their prefixes are not locked for ever."""
        for peer, session in tuple(self._sessions.items()):
            if not session.has_room and now - session.moved_s > self._timeout_s:
                self.fail(peer, StepFailed("the decode engine takes nothing"))
            else:
                self._send(peer, wire.Alive())

    def _send(self, peer: bytes, message: wire.ToDecode, copied: HostCopy | None = None) -> None:
        """Send a message. ZeroMQ keeps the memory of ``copied``, which nothing else changes."""
        frames: list[Any] = [peer, wire.ENCODER.encode(message)]
        if copied is not None:
            frames.append(copied.wait()[0].view(torch.uint8).view(-1).numpy())
        try:
            self._router.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:  # It has gone.
            logger.debug("A prefix could not be sent: %s.", error)
            self._drop(peer)
        else:
            self.counts.wire_bytes += sum(map(len, frames[1:]))

    def fail(self, peer: bytes, error: RequestError) -> None:
        """Tell a decode engine that it gets nothing, or nothing more."""
        self._drop(peer)
        self._send(peer, wire.Failed(error.to_wire()))

    def _drop(self, peer: bytes) -> None:
        """Forget the session of a decode engine, if there is one."""
        session = self._sessions.pop(peer, None)
        if session is not None:
            self.counts.failed += not session.has_ended
            session.close()

    @property
    def has_work(self) -> bool:
        """See ``Plugin``. While the engine drains, prefixes that are still being sent count."""
        sessions = self._sessions.values()
        is_sending = not self._is_accepting and bool(sessions)
        return is_sending or bool(self.unsent) or not all(each.has_ended for each in sessions)

    def advance(self) -> None:
        """Accept new prefixes, and send what has been computed."""
        self._exchange()
        for session in tuple(self._sessions.values()):
            if not (session.has_ended or self._manager.has_moves):
                session.advance()
        self._send_ready()

    def on_idle(self) -> float:
        self._exchange()
        return IDLE_S

    def wait(self) -> None:
        if self.unsent:
            self.unsent[0][1].wait()
        elif self.has_work:
            self._router.poll(round(1e3 * IDLE_S))

    def step_failed(self, *, was_lost: bool) -> None:
        """See ``Transfers``. Prefixes end, because the data sent in the failed step is unknown."""
        self._end_all(StepFailed("a step of the prefill engine failed"))

    def _end_all(self, error: RequestError) -> None:
        """End every prefix that is not confirmed as a whole, because a message may be lost."""
        for peer, session in tuple(self._sessions.items()):
            if not session.has_ended or session.num_taken_bytes < session.num_queued_bytes:
                try:
                    self.fail(peer, error)
                except MemoryError:  # The engine begins again.
                    raise
                except Exception:  # Another one has left it, or the cache, half changed.
                    logger.exception("The transfer of a prefix could not be ended.")
                finally:
                    self._sessions.pop(peer, None)

    def disconnect(self, *, at_once: bool) -> None:
        """See ``Transfers``. Decode engines get an error for new prefixes, and compute them.
        ``at_once`` ends prefixes in progress and all connections."""
        self._is_accepting = False
        if at_once and not self._router.closed:
            self._exchange()
            self._end_all(EngineStopped(STOPPING))
            self._sessions.clear()
            self.unsent.clear()
            _close(self._router, self._context)

    def completed(self, report: CacheReport) -> CacheReport:
        return replace(report, transfers=asdict(self.counts))

    def start_screen(self) -> Sequence[tuple[str, str]]:
        return [("role", "prefill, for decode engines at {}:{}".format(*self.address))]


def _close(router: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Close all connections, after the last messages were sent."""
    router.close(round(1e3 * wire.LINGER_S))
    context.term()
