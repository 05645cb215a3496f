"""The decode side: loads prefixes that a prefill engine computes into this engine's cache.

For a waiting request, all tokens up to the last grid position before its end are requested, except
for KV that is in the cache. Each prefix has a thread, which sends the request and receives the
pieces. The engine's thread copies pieces into their rows between two steps, a bounded number of
bytes at a time, and publishes the prefix when it is complete. Any error ends the load, and this
engine computes the prompt.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import torch

from engine.errors import InvalidRequest, RequestError, WireError
from engine.plugins.disaggregation.link import Transfer, link
from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer
from engine.plugins.disaggregation.wire import TransferCounts, TransferError, Wire, join
from engine.requests.request import Request
from engine.text.outputs import Transferred
from hybridcache.api import PrefixMatch
from hybridcache.export.arrival import Arrival
from hybridcache.geometry.units import counted
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import Tokens

logger = logging.getLogger(__name__)
MAX_FETCHES = 8
"""Maximum number of loads in progress, each with a thread and a link."""
MAX_PIECES = 32
"""Maximum number of received pieces of one prefix that are not yet copied. Then the sender
waits."""
MAX_COPIED_BYTES = 32 << 20
"""Maximum number of bytes copied between two steps."""
CLOSE_S = 1.0
"""Time in which the threads of all loads may end, together."""
REST_S = 5.0
"""Time in which a prefill engine is not used after a failure."""


NOTHING = torch.empty(0, dtype=torch.uint8)


class ArrivedPiece(NamedTuple):
    """Some KV of one part, or a state."""

    part: int | None
    """Index of the part, or None for the state."""
    start: int
    end: int
    num_bytes: int
    data: torch.Tensor = NOTHING


class Linked(NamedTuple):
    """A connection to a prefill engine that has accepted this engine."""

    wire: Wire
    transfer: Transfer

    def close(self) -> None:
        """Close the connection."""
        self.wire.close()
        self.transfer.close()


class Peer:
    """One prefill engine, with its unused connections."""

    def __init__(self, address: tuple[str, int], own: Mapping[str, str], timeout_s: float) -> None:
        self.address, self._own, self._timeout_s = address, dict(own), timeout_s
        self._idle: list[Linked] = []
        self._lock = threading.Lock()
        self.rests_until = 0.0
        """Time by ``time.monotonic`` before which it is not used."""

    def take(self, on_wire: Callable[[Wire], None]) -> Linked:
        """Return a connection. ``on_wire`` is called with its wire, so that it can be broken off.
        Raises TransferError without an answer, or if the model differs."""
        with self._lock:
            while self._idle:
                linked = self._idle.pop()
                if linked.wire.is_quiet:
                    on_wire(linked.wire)
                    return linked
                linked.close()
        wire = Wire.connect(self.address, self._timeout_s)
        on_wire(wire)
        try:
            wire.send({"hello": self._own})
            answer, _ = wire.receive()
            if "welcome" not in answer:
                raise TransferError(str(answer.get("refused", "it gives no reason")))
            return Linked(wire, link(wire, 1, self._timeout_s))
        except BaseException:
            wire.close()
            raise

    def give_back(self, linked: Linked) -> None:
        """Return a connection that can be used again."""
        with self._lock:
            self._idle.append(linked)

    def close(self) -> None:
        """Close the unused connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for linked in idle:
            linked.close()


class PeerFetch:
    """Load of one prefix. The thread that follows it fills ``pieces`` and sets ``outcome`` at its
    end; everything else belongs to the engine's thread."""

    def __init__(
        self, fetcher: PeerFetcher, peer: Peer, arrival: Arrival, tokens: Tokens, request: Request
    ) -> None:
        self._fetcher, self._unit, self.peer, self.arrival = fetcher, fetcher.unit, peer, arrival
        self.tokens, self.namespace, self.boundaries = tokens, request.namespace, request.boundaries
        self.start, self.end = arrival.start, arrival.end
        self.needs_state = arrival.slot is not None
        self.pieces: queue.Queue[ArrivedPiece] = queue.Queue(MAX_PIECES)
        self.outcome: str | None = None
        """Result of its thread: "" or the error. None while it runs."""
        self.is_cancelled = False
        self.has_ended = False
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        """Connection that its thread uses, else None."""
        self.num_fetched = self.wire_bytes = 0
        self._num_bytes = 0

    @property
    def needed_bytes(self) -> int:
        """Bytes of the KV and the state to receive."""
        state = self._unit.state_bytes if self.needs_state else 0
        return (self.end - self.start) * self._unit.row_bytes + state

    @property
    def is_whole(self) -> bool:
        """True if all bytes are copied."""
        return self._num_bytes == self.needed_bytes

    @property
    def transferred(self) -> Transferred:
        """See ``Fetch``."""
        needed_bytes = self.needed_bytes if self.num_fetched else 0
        return Transferred(self.num_fetched, needed_bytes, self.wire_bytes)

    def expect(self, said: object) -> ArrivedPiece:
        """Return the announced piece without its bytes. Raises TransferError if it is not part of
        this prefix."""
        match said:
            case [None, int(), int()] if self.needs_state:
                return ArrivedPiece(None, self.end, self.end, self._unit.state_bytes)
            case [int(part), int(start), int(end)] if (
                0 <= part < len(self._unit.part_bytes) and self.start <= start < end <= self.end
            ):
                return ArrivedPiece(part, start, end, (end - start) * self._unit.part_bytes[part])
        raise TransferError(f"the piece {said!r} was not requested")

    def write(self, piece: ArrivedPiece) -> None:
        """Copy ``piece`` to the current place of its rows or slot."""
        if piece.part is None:
            assert self.arrival.slot is not None
            self._unit.write_state(self.arrival.slot, piece.data)
        else:
            rows = self.arrival.rows[piece.start - self.start : piece.end - self.start]
            data = piece.data.view(len(rows), self._unit.part_bytes[piece.part])
            self._unit.write_rows(piece.part, rows, data)
        self._num_bytes += piece.num_bytes

    def cancel(self) -> None:
        """See ``Fetch``. The thread ends soon, independent of the other side."""
        with self._lock:
            self.is_cancelled = True
            if self._wire is not None:
                self._wire.break_off()
        if not self.has_ended:
            self._fetcher.end(self, False)

    def uses(self, wire: Wire) -> None:
        """Record ``wire`` as the connection of the thread, which calls this."""
        with self._lock:
            self._wire = wire
            if self.is_cancelled:
                wire.break_off()

    def lets_go(self) -> bool:
        """Return True if the connection can be used again. Called by the thread when it has
        finished."""
        with self._lock:
            self._wire = None
            return not self.is_cancelled

    def hand_over(self, piece: ArrivedPiece) -> None:
        """Wait until there is room for ``piece``. Called by the thread. Raises TransferError if the
        load was cancelled."""
        while not self.is_cancelled:
            try:
                return self.pieces.put(piece, timeout=0.1)
            except queue.Full:
                continue
        raise TransferError("the request has gone")


class PeerFetcher:
    """A ``Fetcher`` that loads from prefill engines."""

    def __init__(
        self,
        manager: CacheManager,
        unit: PrefixBuffer,
        peers: Sequence[Peer],
        counts: TransferCounts,
        *,
        fetch_above: int,
    ) -> None:
        """Prefixes with fewer tokens to compute than ``fetch_above`` are computed by this
        engine."""
        self._manager, self.unit, self._peers = manager, unit, peers
        self._fetch_above, self.counts = fetch_above, counts
        self._active: list[PeerFetch] = []
        self._news = threading.Event()
        self._threads: set[threading.Thread] = set()
        atexit.register(self.close)

    @property
    def has_room(self) -> bool:
        return len(self._active) < MAX_FETCHES

    def wants(self, request: Request, match: PrefixMatch) -> bool:
        """See ``Fetcher``. Prefixes in a namespace that is not text are not loaded, because it
        cannot be sent."""
        is_worth_it = self._end(request) - match.cached_len >= self._fetch_above
        is_sayable = isinstance(request.namespace, str | None)
        return is_worth_it and is_sayable and self._choose() is not None

    def begin(self, request: Request, match: PrefixMatch) -> PeerFetch | None:
        """See ``Fetcher``."""
        peer = self._choose()
        if peer is None:
            return None
        end = self._end(request)
        tokens = request.tokens[: end + 1].copy()
        arrival = self._manager.begin_arrival(tokens[:end], request.namespace)
        if arrival is None:
            return None
        fetch = PeerFetch(self, peer, arrival, tokens, request)
        self._active.append(fetch)
        thread = threading.Thread(target=self._follow, args=(fetch,), name="fetch", daemon=True)
        self._threads = {one for one in self._threads if one.is_alive()} | {thread}
        thread.start()
        return fetch

    def _end(self, request: Request) -> int:
        """Return the last grid position below the end of ``request``."""
        grid = self._manager.checkpoint_grid
        return (request.num_tokens - 1) // grid * grid

    def _choose(self) -> Peer | None:
        """Return the available prefill engine with the fewest loads in progress, or None."""
        now = time.monotonic()
        awake = [peer for peer in self._peers if peer.rests_until <= now]
        busy = [fetch.peer for fetch in self._active]
        return min(awake, key=busy.count, default=None)

    def _follow(self, fetch: PeerFetch) -> None:
        """Follow one prefix; the function of its thread."""
        linked, outcome, is_refused = None, "", False
        try:
            linked = fetch.peer.take(fetch.uses)
            _receive(fetch, linked, self._news)
        except TransferError as error:
            outcome = str(error)
        except RequestError as error:
            # If the other engine cannot serve this prompt, later prompts may still work.
            outcome, is_refused = str(error).rstrip("."), isinstance(error, InvalidRequest)
        except Exception as error:
            logger.exception("A transfer failed.")
            outcome = repr(error)
        if linked is not None:
            fetch.wire_bytes = linked.wire.take_num_bytes()
            self.counts.add(wire_bytes=fetch.wire_bytes)
            if fetch.lets_go() and (not outcome or is_refused):
                fetch.peer.give_back(linked)
            else:
                linked.close()
        if outcome and not fetch.is_cancelled:
            if not is_refused:
                fetch.peer.rests_until = time.monotonic() + REST_S
            logger.warning(
                "A prefix of %s did not come from %s:%d, and is computed here: %s.",
                counted(fetch.end, "token"),
                *fetch.peer.address,
                outcome,
            )
        fetch.outcome = outcome
        self._news.set()

    def advance(self) -> None:
        """See ``Fetcher``."""
        self._news.clear()
        left = MAX_COPIED_BYTES
        for fetch in tuple(self._active):
            has_thread_ended = fetch.outcome is not None
            while left > 0 and not fetch.pieces.empty():
                piece = fetch.pieces.get_nowait()
                fetch.write(piece)
                left -= piece.num_bytes
            if has_thread_ended and fetch.pieces.empty():
                self.end(fetch, not fetch.outcome and fetch.is_whole)
        if left <= 0:
            self._news.set()

    def end(self, fetch: PeerFetch, is_whole: bool) -> None:
        """Publish a complete prefix, or release its memory."""
        self._active.remove(fetch)
        self._manager.end_arrival(fetch.arrival, is_whole=is_whole)
        fetch.has_ended = True
        if is_whole:
            fetch.num_fetched = fetch.end - fetch.start
            self.counts.add(prefixes=1, tokens=fetch.num_fetched, needed_bytes=fetch.needed_bytes)
        else:
            self.counts.add(failed=1)

    def wait(self, timeout_s: float) -> None:
        """See ``Fetcher``."""
        self._news.wait(timeout_s)

    def close(self) -> None:
        """See ``Fetcher``. Groups of torch.distributed must not be alive when the process ends."""
        atexit.unregister(self.close)
        for fetch in tuple(self._active):
            fetch.cancel()
        threads, self._threads = self._threads, set()
        join(threads, CLOSE_S)
        for peer in self._peers:
            peer.close()


def _failure(said: object) -> RequestError:
    """Return the error that the prefill engine sent. Raises TransferError if it is malformed."""
    try:
        return RequestError.from_wire(msgspec.convert(said, WireError))
    except msgspec.ValidationError as error:
        raise TransferError(f"it failed without a readable reason ({error})") from None


def _receive(fetch: PeerFetch, linked: Linked, news: threading.Event) -> None:
    """Request the prefix and receive its pieces. Raises TransferError if it does not arrive, and
    RequestError with the reason that the prefill engine gives."""
    wire, transfer = linked
    ask = {
        "start": fetch.start,
        "namespace": fetch.namespace,
        "boundaries": list(fetch.boundaries),
    }
    wire.send({"ask": ask}, fetch.tokens.tobytes())
    while True:
        message, _ = wire.receive()
        if fetch.is_cancelled:
            raise TransferError("the request has gone")
        if "failed" in message:
            raise _failure(message["failed"])
        if "done" in message:
            return
        if "piece" in message:
            piece = fetch.expect(message["piece"])
            data = transfer.receive(piece.num_bytes)
            wire.num_bytes += piece.num_bytes
            fetch.hand_over(piece._replace(data=data))
            news.set()
