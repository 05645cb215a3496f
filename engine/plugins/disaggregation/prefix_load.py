"""The decode side: loads prefixes that a prefill engine computes into this engine's cache.

For a waiting request, all tokens up to the last grid position before its end are requested, except
for KV that is in the cache. ZeroMQ receives them in the background. Between two steps they are
copied into their rows, a bounded number of bytes at a time, and a complete prefix is published. Any
error ends the load, and this engine computes the prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import zmq

from engine.config import EngineConfig
from engine.core import Plugin
from engine.errors import InvalidRequest, RequestError
from engine.plugins.disaggregation import wire
from engine.plugins.disaggregation.wire import PIECE_BYTES, PrefixBuffer, identity
from engine.requests.request import Request, RequestSpec, SamplingParams
from engine.runner.model_runner import ModelRunner
from engine.schedule.report import CacheReport
from engine.text.answers import Transferred
from hybridcache.allocators.moves import Indices, Move
from hybridcache.geometry.units import counted
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.cache import HybridRadixCache, LockHandle
from hybridcache.radix.tokens import EMPTY, Tokens
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.loading import IDLE_S, Loader, PrefixLoad

logger = logging.getLogger(__name__)
MAX_COPIED_BYTES = 32 << 20
"""Maximum number of bytes copied between two steps."""
REST_S = 5.0
"""Time in which a prefill engine is not used after a failure."""
LABEL = "arrived"
"""Label of a copied checkpoint, in place of the placement rule's label."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class ReceivedPrefix:
    """Rows for the tokens of a prefix without KV in the cache, and a slot for the state at its end,
    which are copied from another engine.

    ``publish`` moves both into the cache as if they had been computed here, ``abort`` frees them;
    the cached part of the prefix is locked until then. Its arrival does not count as a use of the
    prefix; resuming from it does. Create with ``begin``.
    """

    _cache: HybridRadixCache
    _tokens: Tokens
    _namespace: Hashable
    _receipt: LockHandle
    """Lock on the path up to ``start``."""
    start: int
    """First position without KV in the cache."""
    slot: int | None = None
    """Slot for the state at the end, or None for an attention-only model."""
    rows: Indices = field(default_factory=lambda: EMPTY)
    """KV row of each position in [start, end): int32. An arena can move them."""

    def __post_init__(self) -> None:
        if self._cache.arena is not None:
            self._cache.arena.holders[self] = None

    @classmethod
    def begin(
        cls, cache: HybridRadixCache, tokens: Tokens, namespace: Hashable = None, *, stateful: bool
    ) -> ReceivedPrefix | None:
        """Reserve rows, and with ``stateful`` a slot, for the missing part of ``tokens``: int32[n],
        in whole pages. Returns None, and holds nothing, if there is not enough memory. O(n), plus
        evictions."""
        known = min(cache.match(tokens, namespace).kv_match_len, len(tokens))
        known -= known % cache.page_size
        arrival = cls(cache, tokens, namespace, cache.lock_kv(tokens[:known], namespace), known)
        if stateful:
            arrival.slot = cache.allocate_slot()
        has_slot = not stateful or arrival.slot is not None
        rows = cache.allocate_kv(len(tokens) - known) if has_slot else None
        if rows is None:
            arrival.abort()
            return None
        arrival.rows = rows
        return arrival

    @property
    def end(self) -> int:
        """Length of the prefix, and position of its state."""
        return len(self._tokens)

    @property
    def held_tokens(self) -> int:
        """Number of KV rows held, neither free nor cached."""
        return len(self.rows)

    @property
    def held_slots(self) -> int:
        return int(self.slot is not None)

    def rows_moved(self, move: Move) -> int:
        """Rename rows after a slab of the arena was emptied, and return their number in that slab;
        see ``RowHolder``. O(rows)."""
        return len(move.rename(self.rows))

    def publish(self) -> None:
        """Move the written rows and state into the cache, and free those that another request has
        published meanwhile. O(n)."""
        cache = self._cache
        rows = np.concatenate([np.zeros(self.start, np.int32), self.rows])
        saved = () if self.slot is None else ((self.end, self.slot),)
        done = cache.insert(
            self._tokens,
            rows,
            saved,
            self._namespace,
            self.start,
            (LABEL,) * len(saved),
            self._receipt.node,
        )
        if len(done.duplicates):
            cache.free_kv(done.duplicates)
        for slot in done.rejected_slots:
            cache.free_slot(slot)
        self._close()

    def abort(self) -> None:
        """Free all rows and the slot."""
        if len(self.rows):
            self._cache.free_kv(self.rows)
        if self.slot is not None:
            self._cache.free_slot(self.slot)
        self._close()

    def _close(self) -> None:
        if self._cache.arena is not None:
            del self._cache.arena.holders[self]
        self._cache.unlock(self._receipt)
        self.slot = None
        self.rows = EMPTY


class PeerLoad(PrefixLoad):
    """Load of one prefix from another engine."""

    def __init__(
        self,
        loader: PeerLoader,
        request: Request,
        address: tuple[str, int],
        connection: wire.Connection,
        arrival: ReceivedPrefix,
    ) -> None:
        super().__init__(arrival.end)
        self._loader, self._unit = loader, loader.unit
        self.request, self.arrival = request, arrival
        self.address, self.connection, self.start = address, connection, arrival.start
        state_bytes = 0 if arrival.slot is None else self._unit.state_bytes
        self.needed_bytes = (self.end - self.start) * self._unit.row_bytes + state_bytes
        """Bytes of the KV and the state to receive."""
        self._num_bytes = 0
        self._next = self.start
        """First position that has not arrived."""

    @property
    def is_whole(self) -> bool:
        """True if all of the prefix has arrived."""
        return self._num_bytes == self.needed_bytes

    def receive(self, max_bytes: int) -> int:
        """Copy arrived rows and the state until they have ``max_bytes`` or more, and return the
        number of bytes. Raises TransferError if the rest will not arrive, and RequestError with the
        reason of the prefill engine."""
        before, connection = self._num_bytes, self.connection
        while not self.is_whole and self._num_bytes < before + max_bytes:
            received = connection.receive()
            if received is None:
                break
            message, data = received
            if isinstance(message, wire.Failed):
                raise RequestError.from_wire(message.error)
            if isinstance(message, wire.Data):
                self._write(data)
                self._num_bytes += len(data)
                connection.send(wire.Taken(self._num_bytes))
        return self._num_bytes - before

    def _write(self, data: memoryview) -> None:
        """Copy ``data``, which must be whole rows or the state, to their current place. Raises
        TransferError for anything else."""
        unit, slot = self._unit, self.arrival.slot
        num_rows, rest = divmod(len(data), unit.row_bytes)
        if num_rows and not rest and self._next + num_rows <= self.end:
            first = self._next - self.start
            unit.write_rows(self.arrival.rows[first : first + num_rows], _tensor(data))
            self._next += num_rows
        elif slot is not None and self._next == self.end and len(data) == unit.state_bytes:
            unit.write_rows(unit.slot_rows(slot), _tensor(data))
        else:
            raise wire.TransferError(f"{counted(len(data), 'byte')} of data were not requested")

    def cancel(self) -> None:
        if not self.has_ended:
            self._loader.end(self)


class PeerLoader(Loader[Request]):
    """Loader of prefixes from prefill engines."""

    max_loads = 8

    def __init__(
        self,
        manager: CacheManager,
        runner: ModelRunner,
        config: EngineConfig,
        counts: wire.TransferCounts,
    ) -> None:
        super().__init__(manager)
        self.unit, self.counts = PrefixBuffer(runner), counts
        self._own = identity(runner)
        self._rests_until = dict.fromkeys(config.addresses, 0.0)
        """Time by ``time.monotonic`` before which each prefill engine is not used."""
        self._fetch_above, self._timeout_s = config.fetch_above, config.transfer_timeout_s
        self._max_bytes = max(PIECE_BYTES, self.unit.state_bytes, self.unit.row_bytes)
        self._active: list[PeerLoad] = []
        # That of the process: closed connections end in the background.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance(wire.IO_THREADS)

    def wants(self, request: Request, match: PrefixMatch) -> bool:
        """See ``Loader``. A namespace that is not text cannot be sent."""
        is_worth_it = self._end(request) - match.cached_len >= self._fetch_above
        can_be_sent = isinstance(request.namespace, str | None)
        return is_worth_it and can_be_sent and self._choose() is not None

    def begin(self, request: Request, match: PrefixMatch) -> PeerLoad | None:
        address, end, namespace = self._choose(), self._end(request), request.namespace
        if address is None:
            return None
        try:
            connection = wire.Connection(
                self._context, address, timeout_s=self._timeout_s, max_bytes=self._max_bytes
            )
        except wire.TransferError as error:
            self._report(address, end, error)
            return None
        cache, stateful = self.manager.cache, self.manager.stateful
        tokens = request.tokens[:end].copy()
        arrival = ReceivedPrefix.begin(cache, tokens, namespace, stateful=stateful)
        if arrival is None:
            connection.close()
            return None
        self.manager.other_holders[arrival] = None
        load = PeerLoad(self, request, address, connection, arrival)
        self._active.append(load)
        assert isinstance(namespace, str | None)
        spec = RequestSpec(
            request.tokens[: end + 1].copy(),
            SamplingParams(max_tokens=1, temperature=0),
            namespace=namespace,
            boundaries=request.spec.boundaries._replace(answer_survives=False),
            save_at=(end,),
        )
        connection.send(wire.PrefixRequest(self._own, arrival.start, spec))
        return load

    def _end(self, request: Request) -> int:
        """Return the last grid position below the end of ``request``."""
        grid = self.manager.cache.checkpoint_grid
        return (request.num_tokens - 1) // grid * grid

    def _choose(self) -> tuple[str, int] | None:
        """Return the available prefill engine with the fewest loads in progress, or None."""
        now = time.monotonic()
        awake = [address for address, until in self._rests_until.items() if until <= now]
        busy = [load.address for load in self._active]
        return min(awake, key=busy.count, default=None)

    def _report(self, address: tuple[str, int], end: int, error: Exception) -> None:
        """Log ``error``, which is being handled, and do not use this prefill engine for a while."""
        # If the other engine cannot serve this prompt, later prompts may still work.
        if not isinstance(error, InvalidRequest):
            self._rests_until[address] = time.monotonic() + REST_S
        if not isinstance(error, wire.TransferError | RequestError):
            logger.exception("A transfer failed.")
        logger.warning(
            "A prefix of %s did not come from %s:%d, and is computed here: %s.",
            counted(end, "token"),
            *address,
            str(error).rstrip("."),
        )

    def advance(self) -> None:
        left = MAX_COPIED_BYTES
        for load in tuple(self._active):
            try:
                left -= load.receive(left)
            except Exception as error:
                self._report(load.address, load.end, error)
                self.end(load)
            else:
                if load.is_whole:
                    self.end(load)

    def end(self, load: PeerLoad) -> None:
        """Publish a complete prefix, or release its memory."""
        if load in self._active:
            self._active.remove(load)
        self.manager.other_holders.pop(load.arrival, None)
        load.connection.close()
        wire_bytes, needed_bytes = load.connection.num_bytes, 0
        self.counts.wire_bytes += wire_bytes
        load.has_ended = True
        if load.is_whole:
            load.arrival.publish()
            load.num_loaded, needed_bytes = load.end - load.start, load.needed_bytes
            self.counts.prefixes += 1
            self.counts.tokens += load.num_loaded
            self.counts.needed_bytes += needed_bytes
        else:
            load.arrival.abort()
            self.counts.failed += 1
        load.request.transferred = Transferred(load.num_loaded, needed_bytes, wire_bytes)

    def end_all(self) -> None:
        """See ``Loader``. Also ends loads whose beginning or end was cut by an exception: nothing
        may be copied into their rows any more."""
        super().end_all()
        while self._active:
            self._active[-1].connection.close()
            del self._active[-1]

    def wait_for_data(self) -> None:
        if self._active:
            self._active[0].connection.wait(IDLE_S)


class DecodePlugin(Plugin):
    """Has prompts computed by prefill engines (setting ``role`` decode)."""

    def open_manager(self, manager: CacheManager, runner: ModelRunner) -> PeerLoader:
        self.counts = wire.TransferCounts()
        return PeerLoader(manager, runner, self.config, self.counts)

    def completed(self, report: CacheReport) -> CacheReport:
        return replace(report, transfers=asdict(self.counts))

    def start_screen(self) -> Sequence[tuple[str, str]]:
        addresses = ", ".join(self.config.prefill)
        return [("role", f"decode, with prefill at {addresses}")]


def _tensor(data: memoryview) -> torch.Tensor:
    """Return ``data`` as uint8, in the same memory, which it keeps alive, unless a small message
    begins at an odd address."""
    tensor = torch.frombuffer(data, dtype=torch.uint8)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
