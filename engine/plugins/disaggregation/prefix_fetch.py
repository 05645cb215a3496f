"""The decode side: prefixes that a prefill engine computes come into this engine's cache.

Of a request that waits, all tokens up to the last grid position below its end are asked for, but
for the KV that is here. A thread of its own follows each prefix: it asks, and receives piece by
piece. The engine's thread copies pieces into their rows between two steps, a bounded number of
bytes at a time, and publishes the prefix when all is there. Whatever goes wrong ends the fetch, and
the request computes here.
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
"""At the same time: a thread and a link each."""
MAX_PIECES = 32
"""Received and not yet copied, of one prefix; the sender waits."""
MAX_COPIED_BYTES = 32 << 20
"""Between two steps."""
CLOSE_S = 1.0
"""For the threads of all fetches to end in, together."""
REST_S = 5.0
"""For which a prefill engine that failed is not asked again."""


NOTHING = torch.empty(0, dtype=torch.uint8)


class ArrivedPiece(NamedTuple):
    """Some KV of one part, or a state."""

    part: int | None
    """None: the state."""
    start: int
    end: int
    num_bytes: int
    data: torch.Tensor = NOTHING


class Linked(NamedTuple):
    """A connection to a prefill engine that knows us."""

    wire: Wire
    transfer: Transfer

    def close(self) -> None:
        """Use it no more."""
        self.wire.close()
        self.transfer.close()


class Peer:
    """One prefill engine, and the connections to it that nobody uses."""

    def __init__(self, address: tuple[str, int], own: Mapping[str, str], timeout_s: float) -> None:
        self.address, self._own, self._timeout_s = address, dict(own), timeout_s
        self._idle: list[Linked] = []
        self._lock = threading.Lock()
        self.rests_until = 0.0
        """By ``time.monotonic``."""

    def take(self, on_wire: Callable[[Wire], None]) -> Linked:
        """Return a connection; ``on_wire`` is called as soon as there is one to break off.
        TransferError if nobody answers, or it is another model."""
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
        """It can be used again."""
        with self._lock:
            self._idle.append(linked)

    def close(self) -> None:
        """Close those that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for linked in idle:
            linked.close()


class PeerFetch:
    """One prefix on its way. The thread that follows it fills ``pieces`` and ends with
    ``outcome``; everything else is the engine's thread's."""

    def __init__(
        self, fetcher: PeerFetcher, peer: Peer, arrival: Arrival, tokens: Tokens, request: Request
    ) -> None:
        self._fetcher, self._unit, self.peer, self.arrival = fetcher, fetcher.unit, peer, arrival
        self.tokens, self.namespace, self.boundaries = tokens, request.namespace, request.boundaries
        self.start, self.end = arrival.start, arrival.end
        self.needs_state = arrival.slot is not None
        self.pieces: queue.Queue[ArrivedPiece] = queue.Queue(MAX_PIECES)
        self.outcome: str | None = None
        """How its thread ended: empty, or what went wrong."""
        self.is_cancelled = False
        self.has_ended = False
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        """The connection that its thread uses; None before and after."""
        self.num_fetched = self.wire_bytes = 0
        self._num_bytes = 0

    @property
    def needed_bytes(self) -> int:
        """Of the KV and the state that are to come."""
        state = self._unit.state_bytes if self.needs_state else 0
        return (self.end - self.start) * self._unit.row_bytes + state

    @property
    def is_whole(self) -> bool:
        """All bytes are copied."""
        return self._num_bytes == self.needed_bytes

    @property
    def transferred(self) -> Transferred:
        """See ``Fetch``."""
        needed_bytes = self.needed_bytes if self.num_fetched else 0
        return Transferred(self.num_fetched, needed_bytes, self.wire_bytes)

    def expect(self, said: object) -> ArrivedPiece:
        """The piece that is said to come next, still without its bytes. TransferError: it is none
        of this prefix."""
        match said:
            case [None, int(), int()] if self.needs_state:
                return ArrivedPiece(None, self.end, self.end, self._unit.state_bytes)
            case [int(part), int(start), int(end)] if (
                0 <= part < len(self._unit.part_bytes) and self.start <= start < end <= self.end
            ):
                return ArrivedPiece(part, start, end, (end - start) * self._unit.part_bytes[part])
        raise TransferError(f"the piece {said!r} is none of what was asked for")

    def write(self, piece: ArrivedPiece) -> None:
        """Copy ``piece`` to where its rows and slot are now."""
        if piece.part is None:
            assert self.arrival.slot is not None
            self._unit.write_state(self.arrival.slot, piece.data)
        else:
            rows = self.arrival.rows[piece.start - self.start : piece.end - self.start]
            data = piece.data.view(len(rows), self._unit.part_bytes[piece.part])
            self._unit.write_rows(piece.part, rows, data)
        self._num_bytes += piece.num_bytes

    def cancel(self) -> None:
        """See ``Fetch``. Its thread ends soon, whatever the other side does."""
        with self._lock:
            self.is_cancelled = True
            if self._wire is not None:
                self._wire.break_off()
        if not self.has_ended:
            self._fetcher.end(self, False)

    def uses(self, wire: Wire) -> None:
        """Called by the thread: ``wire`` is its connection from now on."""
        with self._lock:
            self._wire = wire
            if self.is_cancelled:
                wire.break_off()

    def lets_go(self) -> bool:
        """Called by the thread when it has finished: True if its connection can be used again."""
        with self._lock:
            self._wire = None
            return not self.is_cancelled

    def hand_over(self, piece: ArrivedPiece) -> None:
        """Called by the thread: wait until there is room for ``piece``. TransferError: nobody wants
        it any more."""
        while not self.is_cancelled:
            try:
                return self.pieces.put(piece, timeout=0.1)
            except queue.Full:
                continue
        raise TransferError("the request has gone")


class PeerFetcher:
    """A ``Fetcher`` that asks prefill engines."""

    def __init__(
        self,
        manager: CacheManager,
        unit: PrefixBuffer,
        peers: Sequence[Peer],
        counts: TransferCounts,
        *,
        fetch_above: int,
    ) -> None:
        """Prompts with fewer tokens to compute than ``fetch_above`` are computed here."""
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
        """See ``Fetcher``. Namespaces that are not text are never asked for: they have no wire
        form."""
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
        """The one with least to do, of those that do not rest."""
        now = time.monotonic()
        awake = [peer for peer in self._peers if peer.rests_until <= now]
        busy = [fetch.peer for fetch in self._active]
        return min(awake, key=busy.count, default=None)

    def _follow(self, fetch: PeerFetch) -> None:
        """What the thread of one prefix does."""
        linked, outcome, is_refused = None, "", False
        try:
            linked = fetch.peer.take(fetch.uses)
            _receive(fetch, linked, self._news)
        except TransferError as error:
            outcome = str(error)
        except RequestError as error:
            # A prompt that the other engine cannot serve says nothing of those to come.
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
        """Publish what came, or give its memory back."""
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
    """Return the error that the prefill engine sent. TransferError: it is not one."""
    try:
        return RequestError.from_wire(msgspec.convert(said, WireError))
    except msgspec.ValidationError as error:
        raise TransferError(f"it failed without a readable reason ({error})") from None


def _receive(fetch: PeerFetch, linked: Linked, news: threading.Event) -> None:
    """Ask for the prefix and take its pieces, up to the last. TransferError: it does not come;
    RequestError: the prefill engine says why."""
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
