"""Server of a prefill engine: computes prompts of decode engines next to its own.

A prefix is computed like any request, and sent step by step. One thread exchanges all messages with
decode engines. Connections are neither encrypted nor authenticated: they are for engines in one
trusted network.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from msgspec import structs

from engine.config import ConfigError, EngineConfig
from engine.core import EngineCore, Plugin
from engine.errors import EngineStopped, RequestError, StepFailed
from engine.plugins.disaggregation import DisaggregationConfig, wire
from engine.plugins.disaggregation.wire import PIECE_BYTES, PrefixBuffer, difference, identity
from engine.requests.request import Request
from engine.runner.device import HostCopy
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import Indices, Tokens

logger = logging.getLogger(__name__)
ALIVE_S = 1.0
"""Interval of the messages that a prefix is still being computed."""
IDLE_S = 0.01
CLOSE_S = 1.0
"""Time in which all prefixes may end when the server is closed."""
JOIN_S = 5.0
"""Time for which the thread is waited for beyond that: a device that hangs may hold it up."""
MAX_QUEUED_BYTES = 64 << 20
"""Maximum number of bytes of one prefix that are copied and not confirmed by the decode engine; the
rest waits in the cache."""
STOPPING = "the prefill engine is stopping"


@dataclass(slots=True, eq=False)
class Outgoing:
    """A prefix that is being sent. Its fields belong to the engine's thread, except where noted."""

    server: PrefillServer = field(repr=False)
    peer: bytes
    """Connection to the decode engine."""
    ask: wire.Ask
    tokens: Tokens
    """The prefix and one more token, so that its last position can be resumed from."""
    _sent: int
    """Position up to which rows are queued."""
    request: Request | None = None
    """Request that computes it, or None if all of it was cached."""
    moved_s: float = field(default_factory=time.monotonic)
    """Time at which it began, or bytes were queued or confirmed last."""
    is_cancelled: bool = False
    """Set by the server's thread when the decode engine has gone."""
    has_ended: bool = False
    num_queued_bytes: int = 0
    num_taken_bytes: int = 0
    """Number of queued bytes that the decode engine has confirmed; set by the server's thread."""
    _receipt: Any = None
    """Lock on the prefix once it is complete, else None."""

    @property
    def end(self) -> int:
        return len(self.tokens) - 1

    def fail(self, error: RequestError) -> None:
        """Queue ``error`` as the last message."""
        self.has_ended = True
        self.server.counts.failed += 1
        self.server.post(self, wire.Failed(error.to_wire()))

    def advance(self) -> None:
        """Send the rows that the steps so far have written, and the state once the prefix is
        complete. Called between two steps."""
        request, cache, unit = self.request, self.server.cache, self.server.unit
        if request is not None and request.finish_reason is None:
            if request.lease is not None:
                self._send_rows(request.lease.kv_indices, request.scheduled_len)
            return
        if (self._receipt is None and not self._settle()) or not self.has_room:
            return
        match = cache.match(self.tokens, self.ask.spec.namespace)
        self._send_rows(cache.gather(match.node), self.end)
        if self._sent < self.end:
            return
        if match.checkpoint is not None:
            self._put(wire.State(), unit.read_state(match.checkpoint))
        cache.unlock(self._receipt)
        self._receipt = None
        self.has_ended = True
        self.server.post(self, wire.Done())
        counts, num_tokens = self.server.counts, self.end - self.ask.start
        counts.prefixes += 1
        counts.tokens += num_tokens
        counts.needed_bytes += num_tokens * unit.row_bytes + unit.state_bytes

    def _settle(self) -> bool:
        """Lock the prefix, which is computed. Returns False if it was not kept."""
        request, cache = self.request, self.server.cache
        match = cache.match(self.tokens, self.ask.spec.namespace)
        if match.cached_len < self.end:
            why = "it was aborted" if request is None else request.error or "memory is short"
            self.fail(StepFailed(f"the prefill engine could not keep it: {why}"))
            return False
        self._receipt = cache.lock(match.node)
        return True

    def give_up(self, why: str) -> None:
        """End without sending the rest."""
        if self._receipt is not None:
            self.server.cache.unlock(self._receipt)
            self._receipt = None
        if self.request is not None and self.request.finish_reason is None:
            self.server.engine.abort(self.request.request_id)
        self.fail(StepFailed(why))

    def _send_rows(self, rows: Indices, known: int) -> None:
        unit, until = self.server.unit, min(known, self.end)
        step = max(1, PIECE_BYTES // unit.row_bytes)
        while (start := self._sent) < until and self.has_room:
            self._sent = end = min(start + step, until)
            self._put(wire.Rows(start, end), unit.read_rows(rows[start:end]))

    @property
    def has_room(self) -> bool:
        return self.num_queued_bytes - self.num_taken_bytes < MAX_QUEUED_BYTES

    def _put(self, message: wire.ToDecode, copied: HostCopy) -> None:
        self.num_queued_bytes += copied.num_bytes
        self.moved_s = time.monotonic()
        self.server.post(self, message, copied)


class PrefillServer(Plugin):
    """Computes prefixes for other engines (setting ``role`` prefill)."""

    name = "disaggregation"
    engine: EngineCore
    _manager: CacheManager
    unit: PrefixBuffer

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.settings = config.of(DisaggregationConfig)
        self._timeout_s, self.counts = self.settings.transfer_timeout_s, wire.TransferCounts()
        self._asked: queue.SimpleQueue[Outgoing] = queue.SimpleQueue()
        self._posted: queue.SimpleQueue[tuple[Outgoing, wire.ToDecode, HostCopy | None]]
        self._posted = queue.SimpleQueue()
        self._active: list[Outgoing] = []
        self._numbers = itertools.count()
        self._news = threading.Event()
        self._advanced_s = time.monotonic()
        self._is_accepting = True
        self._closes_s: float | None = None
        """Time by ``time.monotonic`` at which the thread ends, or None before ``disconnect``."""
        self._sessions: dict[bytes, Outgoing] = {}
        """Accepted prefixes without an ``End``, by connection. Changed by the server's thread."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[wire.ToPrefill] = msgspec.msgpack.Decoder(
            wire.ToPrefill
        )

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        """Start listening. Raises ConfigError if the address is not available."""
        self.engine, self._manager, self.cache = engine, manager, manager.cache
        self.unit = PrefixBuffer(engine.runner)
        self._own = identity(engine.runner)
        self._context: zmq.Context[Any] = zmq.Context(wire.IO_THREADS)
        try:
            self.address = self._listen(self.settings.addresses[0])
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"--transfer-at {self.settings.transfer_at}: {why}.") from error
        self._bell, self._ear = socket.socketpair()  # wakes the thread up
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="transfers", daemon=True)
        self._thread.start()

    def _listen(self, address: tuple[str, int]) -> tuple[str, int]:
        """Return (host, port) that the server listens on."""
        host = str(min(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))[4][0])  # IPv4 first
        self._router = wire.open_socket(self._context, zmq.ROUTER, host, self._timeout_s)
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        self._router.set(zmq.MAXMSGSIZE, wire.MAX_ASK_BYTES)
        self._router.sndhwm = 0  # MAX_QUEUED_BYTES is the limit.
        try:
            self._router.bind(wire.endpoint(host, address[1]))
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise OSError(error.errno, error.strerror) from error
        bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        return address[0], int(bound.rpartition(":")[2])

    def _run(self) -> None:
        """Exchange messages until the server is closed; the function of its thread."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        checks_s = 0.0
        try:
            while (now := time.monotonic()) < self._ends_s:
                if now >= checks_s:
                    checks_s = now + ALIVE_S
                    self._check_sessions(now)
                rest_s = min(checks_s, self._ends_s) - now
                if self._ear.fileno() in dict(poller.poll(max(0, round(1e3 * rest_s)))):
                    self._ear.recv(4096)
                self._receive_all()
                self._send_all()
        finally:
            for peer in tuple(self._sessions):
                self._drop(peer)
            self._context.destroy(0)
            self._bell.close()
            self._ear.close()

    @property
    def _ends_s(self) -> float:
        if self._closes_s is None:
            return float("inf")
        return self._closes_s if self._sessions else 0.0

    def _receive_all(self) -> None:
        for _ in range(wire.MAX_UNREAD):  # Then it is the turn of messages to send.
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.counts.wire_bytes += sum(map(len, frames))
            try:
                self._receive(peer, self._decoder.decode(b"".join(frames)))
            except ValueError as error:
                self._fail(peer, StepFailed(f"it does not understand the message ({error})"))

    def _receive(self, peer: bytes, message: wire.ToPrefill) -> None:
        """Handle one message. Raises ValueError if it is malformed."""
        session = self._sessions.get(peer)
        match message:
            case wire.Ask() if session is None:
                self._receive_ask(peer, message)
            case wire.Ask():
                raise ValueError("a second request")
            case wire.Taken() if session is not None:
                if message.num_bytes > session.num_taken_bytes:
                    session.num_taken_bytes = min(message.num_bytes, session.num_queued_bytes)
                    session.moved_s = time.monotonic()
                    self._news.set()
            case wire.End():
                self._drop(peer)

    def _receive_ask(self, peer: bytes, ask: wire.Ask) -> None:
        """Pass a prefix to the engine's thread, or refuse it. Raises ValueError if malformed."""
        unlike = difference(self._own, ask.identity)
        if unlike is not None:
            self._fail(peer, StepFailed(f"it differs in {unlike}"))
            return
        tokens = ask.spec.prompt
        if not isinstance(tokens, np.ndarray) or ask.start >= len(tokens):
            raise ValueError("nothing is requested")
        if not self._is_accepting:
            self._fail(peer, EngineStopped(STOPPING))
            return
        try:
            ask = structs.replace(ask, spec=self.engine.validate(ask.spec))
        except ValueError as error:
            self._fail(peer, RequestError.of(error))
            return
        self._sessions[peer] = Outgoing(self, peer, ask, tokens, ask.start)
        self._asked.put(self._sessions[peer])
        self.wake()

    def _check_sessions(self, now: float) -> None:
        """Tell decode engines that their prefixes are being computed. Those that have gone or take
        nothing are dropped, so that their prefixes are not locked for ever."""
        for peer, session in tuple(self._sessions.items()):
            advanced_s = max(session.moved_s, self._advanced_s)
            if not session.has_ended and now - advanced_s > self._timeout_s:
                self._fail(peer, StepFailed("the engine computes nothing"))
            elif not session.has_room and now - session.moved_s > self._timeout_s:
                self._fail(peer, StepFailed("the decode engine takes nothing"))
            else:
                self._send(peer, wire.Alive())

    def _send_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                outgoing, message, copied = self._posted.get_nowait()
                if self._sessions.get(outgoing.peer) is outgoing:
                    self._send(outgoing.peer, message, copied)

    def _send(self, peer: bytes, message: wire.ToDecode, copied: HostCopy | None = None) -> None:
        """Send a message. ZeroMQ keeps the memory of ``copied``, which nothing else changes."""
        frames: list[Any] = [peer, self._encoder.encode(message)]
        try:
            if copied is not None:
                frames.append(copied.wait()[0].view(torch.uint8).view(-1).numpy())
            self._router.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except (zmq.ZMQError, RuntimeError) as error:  # It has gone, or the device failed.
            logger.debug("A prefix could not be sent: %s.", error)
            self._drop(peer)
        else:
            self.counts.wire_bytes += sum(map(len, frames[1:]))

    def _fail(self, peer: bytes, error: RequestError) -> None:
        """Tell a decode engine that it gets nothing, or nothing more."""
        self._drop(peer)
        self._send(peer, wire.Failed(error.to_wire()))

    def _drop(self, peer: bytes) -> None:
        """Forget the session of a decode engine, if there is one."""
        session = self._sessions.pop(peer, None)
        if session is not None:
            session.is_cancelled = True
            self._news.set()
            self.wake()

    def post(
        self, outgoing: Outgoing, message: wire.ToDecode, copied: HostCopy | None = None
    ) -> None:
        """Queue a message for a decode engine."""
        self._posted.put((outgoing, message, copied))
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # It has rung often already, or the thread has ended.
            self._bell.send(b"\0")

    @property
    def has_work(self) -> bool:
        """See ``StepHooks``. While the engine drains, prefixes that are still being sent count."""
        if self._closes_s is not None:
            return False
        is_sending = not self._is_accepting and bool(self._sessions)
        return bool(self._active) or not self._asked.empty() or is_sending

    def before_step(self) -> None:
        """Accept new prefixes, and send what has been computed."""
        self._advanced_s = time.monotonic()
        self._news.clear()
        while not self._asked.empty():
            self._take_in(self._asked.get_nowait())
        for outgoing in self._active:
            if outgoing.is_cancelled and not outgoing.has_ended:
                outgoing.give_up("the decode engine has gone")
            elif not self._manager.has_moves:
                outgoing.advance()
        self._active = [outgoing for outgoing in self._active if not outgoing.has_ended]

    def _take_in(self, outgoing: Outgoing) -> None:
        spec = outgoing.ask.spec
        if self.cache.match(outgoing.tokens, spec.namespace).cached_len < outgoing.end:
            request_id = f"transfer-{next(self._numbers)}"
            outgoing.request = self.engine.make(structs.replace(spec, request_id=request_id))
            self.engine.enqueue(outgoing.request)
        self._active.append(outgoing)

    def wait(self) -> None:
        if self.has_work:
            self._news.wait(IDLE_S)

    def on_step_failed(self, *, was_lost: bool) -> None:
        """See ``StepHooks``. Prefixes end, because the data sent in the failed step is unknown."""
        self._end_all("a step of the prefill engine failed")

    def _end_all(self, why: str) -> None:
        """End every prefix in progress without sending the rest."""
        for outgoing in self._active:
            outgoing.give_up(why)
        self._active = []

    def disconnect(self, *, at_once: bool) -> None:
        """See ``StepHooks``. Decode engines get an error for new prefixes; they compute the prompt
        or use another prefill engine. ``at_once`` ends prefixes in progress and all connections:
        decode engines that are not late get the error; the others find the connection closed."""
        self._is_accepting = False
        if not at_once or self._closes_s is not None:
            return
        while not self._asked.empty():
            self._asked.get_nowait().fail(EngineStopped(STOPPING))
        self._end_all(STOPPING)
        self._closes_s = time.monotonic() + CLOSE_S
        self._ring()
        self._thread.join(CLOSE_S + JOIN_S)

    def report(self) -> Mapping[str, Any]:
        return {"transfers": asdict(self.counts)}

    def start_screen(self) -> Sequence[tuple[str, str]]:
        return [("role", "prefill, for decode engines at {}:{}".format(*self.address))]
