"""Server of a prefill engine: accepts decode engines and computes their prompts next to its own.

Each connection has a thread. It accepts one prefix at a time, passes it to the engine's thread, and
sends the copied data. Connections are neither encrypted nor authenticated: they are for engines in
one trusted network.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.errors import EngineStopped, RequestError
from engine.plugins.disaggregation.link import Transfer, link
from engine.plugins.disaggregation.outgoing import Outgoing, failure
from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer, difference
from engine.plugins.disaggregation.wire import TransferCounts, TransferError, Wire, join
from engine.requests.request import Request
from engine.requests.spec import RequestSpec
from hybridcache.scheduling.cache_manager import CacheManager

logger = logging.getLogger(__name__)
ALIVE_S = 1.0
"""Interval of the messages that a prefix is still being computed."""
IDLE_S = 0.01
REST_S = 0.5
"""Pause after a failed accept, and time in which a refused connection may send its hello."""
CLOSE_S = 1.0
"""Time in which all connections may end by themselves, and again after they were broken off."""
MAX_CONNECTIONS = 256
"""Maximum number of connections, each with a thread, a socket and a process group. A decode engine
makes up to ``fetch.MAX_FETCHES``."""
STOPPING = "the prefill engine is stopping"


class PrefillServer:
    """Computes prefixes for other engines."""

    def __init__(
        self,
        manager: CacheManager,
        unit: PrefixBuffer,
        address: tuple[str, int],
        own: Mapping[str, str],
        counts: TransferCounts,
        *,
        timeout_s: float,
        prepare: Callable[[RequestSpec], Request],
        enqueue: Callable[[Request], None],
        abort: Callable[[str], object],
        wake: Callable[[], None],
    ) -> None:
        """Start listening. ``own`` is the engine's identity; the callables are methods of the
        engine. Raises OSError if the address is not available."""
        self._manager, self._unit, self._own, self.counts = manager, unit, own, counts
        self._prepare, self._enqueue, self._abort = prepare, enqueue, abort
        self._timeout_s = timeout_s
        self.wake = wake
        """Called by any thread when there is work."""
        self._asked: queue.Queue[Outgoing] = queue.Queue()
        self._active: list[Outgoing] = []
        self._numbers = itertools.count()
        self._news = threading.Event()
        self._advanced_s = time.monotonic()
        self._lock = threading.Lock()
        """Guards the next four fields, which threads of connections change."""
        self._is_accepting = True
        self._is_closed = False
        self._wires: set[Wire] = set()
        self._answering: set[Wire] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server(address)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._listen, name="transfers", daemon=True).start()
        atexit.register(self._hang_up)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._is_accepting:
                    return
                # For example for lack of descriptors, which other connections may close.
                logger.warning("A decode engine could not be accepted (%s).", error)
                time.sleep(REST_S)
                continue
            self._receive_connection(connection)

    def _receive_connection(self, connection: socket.socket) -> None:
        """Serve ``connection`` in a new thread, or refuse it."""
        try:
            wire = Wire(connection, self._timeout_s)
        except OSError:  # It has gone already.
            connection.close()
            return
        thread = threading.Thread(target=self._talk, args=(wire,), name="transfer", daemon=True)
        has_room = False
        with self._lock, contextlib.suppress(RuntimeError):  # no thread can be started
            if self._is_accepting and len(self._wires) < MAX_CONNECTIONS:
                thread.start()
                self._wires.add(wire)
                self._threads = {one for one in self._threads if one.is_alive()} | {thread}
                has_room = True
        if not has_room:
            _turn_away(wire)

    def _talk(self, wire: Wire) -> None:
        """Serve one connection, in a separate thread."""
        transfer: Transfer | None = None
        try:
            hello, _ = wire.receive()
            unlike = difference(self._own, hello.get("hello"))
            if unlike is not None:
                wire.send({"refused": f"it differs in {unlike}"})
                return
            wire.send({"welcome": True})
            transfer = link(wire, 0, self._timeout_s)
            while True:
                said, data = wire.receive(idles=True)
                outgoing = _read_ask(said, data)
                if not self._accept(wire, outgoing):
                    wire.send(failure(EngineStopped(STOPPING)))
                    return
                try:
                    self._answer(outgoing, wire, transfer)
                finally:
                    with self._lock:
                        self._answering.discard(wire)
                    self._news.set()
        except TransferError as error:
            logger.debug("A connection ended: %s.", error)
        except Exception:
            logger.exception("A connection failed.")
        finally:
            with self._lock:
                self._wires.discard(wire)
            self.counts.add(wire_bytes=wire.take_num_bytes())
            wire.close()
            if transfer is not None:
                transfer.close()

    def _accept(self, wire: Wire, outgoing: Outgoing) -> bool:
        """Pass ``outgoing`` to the engine's thread. Returns False if the engine is stopping."""
        with self._lock:
            if not self._is_accepting:
                return False
            self._answering.add(wire)
            self._asked.put(outgoing)
        self.wake()
        return True

    def _answer(self, outgoing: Outgoing, wire: Wire, transfer: Transfer) -> None:
        """Send the messages of one accepted prefix. Raises TransferError if the decode engine has
        gone."""
        try:
            while True:
                try:
                    message = outgoing.messages.get(timeout=ALIVE_S)
                except queue.Empty:
                    if time.monotonic() - self._advanced_s > self._timeout_s:
                        raise TransferError("the engine computes nothing") from None
                    wire.send({"alive": True})
                    continue
                wire.send(message.said)
                if message.copied is not None:
                    transfer.send(message.copied.wait().view(-1))
                    wire.num_bytes += message.num_bytes
                    outgoing.num_taken_bytes += message.num_bytes
                    self._news.set()
                if "done" in message.said or "failed" in message.said:
                    break
        except BaseException:
            outgoing.is_cancelled = True
            self.wake()
            raise
        finally:
            self.counts.add(wire_bytes=wire.take_num_bytes())

    @property
    def has_work(self) -> bool:
        """See ``StepHooks``. While the engine drains, prefixes that are still being sent count."""
        if self._is_closed:
            return False
        is_sending = not self._is_accepting and bool(self._answering)
        return bool(self._active) or not self._asked.empty() or is_sending

    def send_layer(self, rank: int) -> None:
        """Send the KV that mixer ``rank`` has written in the current step."""
        part = self._unit.part_of.get(rank)
        if part is not None:
            for outgoing in self._active:
                outgoing.send_layer(self._unit, part)

    def advance(self) -> None:
        """Accept new prefixes, and send the complete ones. Called between two steps."""
        self._advanced_s = time.monotonic()
        self._news.clear()
        while not self._asked.empty():
            self._take_in(self._asked.get_nowait())
        for outgoing in self._active:
            if outgoing.is_cancelled and not outgoing.has_ended:
                self._give_up(outgoing, "the decode engine has gone")
            elif not self._manager.has_moves:
                outgoing.advance(self._unit, self._manager)
            if outgoing.has_ended:
                self._count(outgoing)
        self._active = [outgoing for outgoing in self._active if not outgoing.has_ended]

    def _take_in(self, outgoing: Outgoing) -> None:
        match = self._manager.cache.match(outgoing.tokens, outgoing.namespace)
        if match.cached_len < outgoing.end:
            try:
                request_id = f"transfer-{next(self._numbers)}"
                outgoing.request = self._prepare(outgoing.spec(request_id))
            except ValueError as error:
                outgoing.fail(RequestError.of(error))
                return
            self._enqueue(outgoing.request)
        self._active.append(outgoing)

    def _give_up(self, outgoing: Outgoing, why: str) -> None:
        outgoing.give_up(why, self._manager.cache, self._abort)

    def _count(self, outgoing: Outgoing) -> None:
        if outgoing.is_whole:
            num_tokens = outgoing.end - outgoing.start
            needed = num_tokens * self._unit.row_bytes + self._unit.state_bytes
            self.counts.add(prefixes=1, tokens=num_tokens, needed_bytes=needed)
        else:
            self.counts.add(failed=1)

    def wait(self) -> None:
        """See ``StepHooks``."""
        if self.has_work:
            self._news.wait(IDLE_S)

    def give_up(self) -> None:
        """See ``StepHooks``. Prefixes end, because the data sent in the failed step is unknown."""
        self._end_all("a step of the prefill engine failed")

    def _end_all(self, why: str) -> None:
        """End every prefix in progress without sending the rest."""
        for outgoing in self._active:
            self._give_up(outgoing, why)
            self._count(outgoing)
        self._active = []

    def stop_accepting(self) -> None:
        """See ``StepHooks``. Prefixes in progress are completed. Other decode engines find the
        connection closed; they compute the prompt or use another prefill engine."""
        with self._lock:
            self._is_accepting = False
            idle = self._wires - self._answering
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for wire in idle:
            wire.break_off()

    def close(self) -> None:
        """See ``StepHooks``. Ends prefixes in progress and all connections."""
        if self._is_closed:
            return
        self._is_closed = True
        self.stop_accepting()
        while not self._asked.empty():
            self._asked.get_nowait().fail(EngineStopped(STOPPING))
        self._end_all(STOPPING)
        self._hang_up()

    def _hang_up(self) -> None:
        """End all connections: groups of torch.distributed must not be alive when the process ends.
        Those with little left to send finish; the others are broken off."""
        atexit.unregister(self._hang_up)
        self.stop_accepting()
        join(self._threads, CLOSE_S)
        with self._lock:
            wires = tuple(self._wires)
        for wire in wires:
            wire.break_off()
        join(self._threads, CLOSE_S)


def _turn_away(wire: Wire) -> None:
    """Refuse a new connection."""
    with contextlib.suppress(TransferError):
        wire.receive(timeout_s=REST_S)  # Unread bytes would destroy the refusal on its way.
        wire.send({"refused": "it has too many connections already, or is stopping"})
    wire.close()


def _read_ask(said: dict[str, Any], data: bytes) -> Outgoing:
    """Parse a request for a prefix. Raises TransferError if it is malformed."""
    match said.get("ask"):
        case {
            "start": int(start),
            "namespace": str() | None as namespace,
            "boundaries": list(boundaries),
        } if all(isinstance(one, int) for one in boundaries) and not len(data) % 4:
            tokens = np.frombuffer(data, np.int32).copy()
            if 0 <= start < len(tokens):
                return Outgoing(tokens, start, namespace, tuple(boundaries))
    raise TransferError("malformed prefix request")
