"""Disk tier: the records of one store as prefixes, and the rows of the cache's disk tier.

Everything that a request publishes is written in the background (``write_through``). The rows that
the cache offloads to its disk tier (``offload``) point into these records, which mostly exist by
then. A record stays as long as a row points into it; others are removed when there is no room, the
least recently used first.

All methods are for the engine's thread. ``RecordStore`` is used by the disk thread alone, after the
constructor. A damaged record is forgotten by ``settle``, with its continuations. If a job fails, or
takes longer than ``DEADLINE_S``, the disk is off until the engine starts again, and all rows are
lost.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from functools import partial
from queue import PriorityQueue
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from engine.plugins.tiers.prefixes import Prefixes, PrefixPart, RecordPart, covering
from engine.plugins.tiers.records import RecordStore, record_bytes, record_name
from hybridcache.allocators.moves import Indices
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import Kind

Rows = npt.NDArray[np.uint8]
"""``[n, row_bytes]``."""
FutureRows = Callable[[], Rows]
"""Waits for rows that may still be on their way from the device, and returns them."""
ReadRows = Callable[[int, int], FutureRows]
"""Returns the rows [first, end) of a write, with their current bytes."""
Result = TypeVar("Result")
Read = Future[Rows | None]
"""The rows of a record, or None if it cannot be read."""

URGENT, NORMAL = range(2)
MAX_RECORD_BYTES = 1 << 22
"""Limit of a KV record. A hit reads at most one record of which it needs only a part."""
MIN_RECORDS = 32
"""Minimum number of KV records for which a small folder has room."""
TOKEN_BYTES = 4
MAX_PENDING_BYTES = 1 << 28
"""Limit of the bytes waiting to be written. Above it, entries are skipped: no step waits for the
disk."""
DEADLINE_S, POLL_S = 20.0, 0.5
"""Duration of one job after which the file system is considered hung, and interval in which callers
that wait for it look."""
FADING = 0.95
"""Weight of the previous reads in the measured read speed, per read."""

logger = logging.getLogger(__name__)


class Disk:
    """The records of one ``RecordStore`` as prefixes, and the rows that point into them."""

    def __init__(
        self, store: RecordStore, *, max_bytes: int, row_bytes: int, state_rows: int, num_rows: int
    ) -> None:
        """Load the index of ``store``. Raises StoreError as ``scan``. O(records).

        All records take at most ``max_bytes``. The tier has ``num_rows`` rows, and a state takes
        ``state_rows`` of them.
        """
        self.max_bytes, self.row_bytes, self.state_rows = max_bytes, row_bytes, state_rows
        self._store = store
        self.prefixes = Prefixes(num_rows)
        self.num_bytes = 0
        """Disk space of all records together, once the queued jobs are done."""
        self._pending: dict[int, FutureRows] = {}
        """Rows of records that are not written yet."""
        self._queued_bytes = self._done_bytes = 0
        """Bytes of all payloads that were queued, and of those that wait no more. Each is changed
        by one thread."""
        self._reads: WeakValueDictionary[int, Read] = WeakValueDictionary()
        """Reads in progress, and those of which somebody still has the result."""
        self._damaged: deque[int] = deque()
        """Records that were found damaged since ``settle``."""
        self._failure = ""
        """Reason why the disk is off, or empty."""
        self.has_lost_rows = False
        """True if rows that the cache uses may point nowhere; see ``is_lost``."""
        self._read_bytes = self._read_s = 0.0
        self.num_errors = 0
        """Number of file system errors and damaged records."""
        self.num_skipped = 0
        """Number of runs and states not written for lack of room or time, or while it is off."""
        record_bytes_limit = min(MAX_RECORD_BYTES, max_bytes // MIN_RECORDS)
        self._run_tokens = max(1, record_bytes_limit // (row_bytes + TOKEN_BYTES))
        self._jobs: PriorityQueue[tuple[int, int, str, Callable[[], object] | None, Future[Any]]]
        self._jobs, self._numbers = PriorityQueue(), itertools.count()
        self._has_ended = False
        """True if the disk thread has no more work, or has ended."""
        self._started_s: float | None = None
        """Time by ``time.monotonic`` at which the current job began, or None if there is none."""
        # A job that hangs in the system cannot be interrupted: it must not keep the process alive.
        threading.Thread(target=self._run, name="disk", daemon=True).start()
        for record in store.scan():
            item = PrefixPart.decode(record.meta)
            if self.prefixes.add(record.id, item):
                self.num_bytes += self._size(item)
            else:
                self.remove_file(record_name(record.id))
        self.num_errors += store.num_damaged
        self._next_id = store.next_id
        # The limit may have been higher in an earlier process. KV without a state behind it cannot
        # be used after a start, so it is removed first.
        for number in tuple(self.prefixes.unused):
            if self.prefixes.items[number].is_state:
                self.prefixes.unused.move_to_end(number)
        self._make_room()

    @property
    def is_off(self) -> bool:
        """True after a job failed, or the file system did not respond for ``DEADLINE_S``."""
        started_s = self._started_s
        if started_s is not None and time.monotonic() - started_s > DEADLINE_S:
            self._turn_off(f"its file system has not responded for {DEADLINE_S:.0f} s")
        return bool(self._failure)

    @property
    def problem(self) -> str | None:
        """Reason why the folder is not used, or None if it is."""
        return f"{self._failure}; start again to use it" if self.is_off else None

    def _turn_off(self, failure: str) -> None:
        """Stop to use the folder. Called by both threads."""
        if not self._failure:
            self._failure, self.has_lost_rows = failure, True
            self.num_errors += 1
            logger.warning(
                "The disk tier in %s is off until the engine starts again: %s.",
                self._store.folder,
                failure,
            )

    @property
    def bytes_per_s(self) -> float | None:
        """Measured speed of reads, recent ones weighted most. None before the first."""
        return self._read_bytes / self._read_s if self._read_s else None

    def write_through(
        self, kind: Kind, path: tuple[Hashable, Tokens], num_rows: int, read: ReadRows
    ) -> list[RecordPart]:
        """Write the KV of the last ``num_rows`` tokens of ``path``, or the state at its end.

        Parts that are on disk already are not written again. Returns the parts of records that hold
        it, fewer than requested if there is no room, or too much waits to be written already.
        """
        namespace, tokens = path
        pieces = self.prefixes.find(namespace, tokens)
        known = sum(piece.num_rows for piece in pieces)
        parent = pieces[-1].id if pieces else 0
        if kind == "checkpoint":
            if known < len(tokens):
                return []
            state = PrefixPart(parent, len(tokens), tokens[:0], namespace)
            found = self.prefixes.ids.get(state.key)
            if found is None:
                found = self._write(state, partial(read, 0, self.state_rows))
            return [] if found is None else [RecordPart(found, 0, self.state_rows)]
        start = first = len(tokens) - num_rows
        if start <= known:
            start = known
            while start < len(tokens):  # In records of a bounded size.
                end = min(start + self._run_tokens, len(tokens))
                run = PrefixPart(parent, start, tokens[start:end].copy(), namespace)
                number = self._write(run, partial(read, start - first, end - first))
                if number is None:
                    break
                pieces.append(RecordPart(number, 0, end - start))
                parent, start = number, end
        return covering(pieces, first, len(tokens))

    def offload(
        self, kind: Kind, path: tuple[Hashable, Tokens], rows: Indices, read: ReadRows
    ) -> None:
        """Bind ``rows`` of the tier to the records of ``write_through``, or write these now.

        O(len(path) + bytes that are not on disk yet).
        """
        pieces = self.write_through(kind, path, len(rows), read)
        self.prefixes.bind(rows, pieces)
        # Rows after the end of the pieces point nowhere.
        self.has_lost_rows |= sum(piece.num_rows for piece in pieces) < len(rows)

    def is_lost(self, rows: Indices) -> bool:
        """Return True if some of ``rows`` point nowhere, or if the disk is off."""
        return self.is_off or any(not part.id for part in self.prefixes.parts(rows))

    def stage(self, rows: Indices) -> list[Read]:
        """Start to read the records of ``rows``. ``load`` does not wait for them while the reads
        are kept and done."""
        ids = {part.id for part in self.prefixes.parts(rows) if part.id}
        return [self._read(number) for number in ids]

    def load(self, rows: Indices) -> list[tuple[int, Rows]] | None:
        """Read ``rows``, which then point nowhere, as pairs of the index of the first in ``rows``
        and the bytes from there on. None if some cannot be read. Waits for the disk if they were
        not staged."""
        parts, is_lost = self.prefixes.parts(rows), self.is_lost(rows)
        self.prefixes.unbind(rows, is_use=True)
        if is_lost:
            return None
        reads = {number: self._read(number) for number in {part.id for part in parts}}
        while wait(reads.values(), POLL_S).not_done:
            if self.is_off:
                return None
        pieces, first = [], 0
        for part in parts:
            payload = reads[part.id].result()
            if payload is None:
                return None
            pieces.append((first, payload[part.offset : part.offset + part.num_rows]))
            first += part.num_rows
        return pieces

    def clear(self) -> None:
        """Remove all records."""
        self.prefixes.unbind_all()
        while self.prefixes.unused:
            self._forget(next(iter(self.prefixes.unused)))

    def recover(self) -> None:
        """Unbind all rows after they were lost, or after an exception in the middle of a call.
        O(records + rows of the tier)."""
        self.prefixes.unbind_all()
        self.num_bytes = sum(map(self._size, self.prefixes.items.values()))
        self._next_id = max([self._next_id, *(number + 1 for number in self.prefixes.items)])
        self.settle()

    def settle(self) -> None:
        """Forget the records that were found damaged, with their descendants. O(1) if there are
        none, else O(records + rows of the tier)."""
        if self._damaged:
            damaged = [self._damaged.popleft() for _ in range(len(self._damaged))]
            self.has_lost_rows = True
            for number in self.prefixes.lose(damaged):
                self._forget(number)

    def write_file(self, name: str, content: Callable[[], bytes]) -> None:
        """Replace a file in the folder. ``content`` is called in the disk thread."""
        self._submit(lambda: self._store.write_file(name, content()), f"write the file {name}")

    def remove_file(self, name: str) -> None:
        """Queue the removal of a file from the folder."""
        self._submit(partial(self._store.remove_file, name), f"remove the file {name}")

    def flush(self) -> bool:
        """Wait until all queued work is done. Returns False if the file system hangs."""
        done = self._submit(lambda: None)
        while wait([done], POLL_S).not_done and not self.is_off:
            pass
        self.settle()
        return done.done()

    def close(self) -> None:
        """Write pending records, and release the folder. After an exception, repeat the call."""
        if self._has_ended or self.flush():
            self._has_ended = True
            self._submit(None)
            self._store.close()
        else:
            logger.warning(
                "The file system of %s does not respond: pending writes are lost.",
                self._store.folder,
            )

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds. O(records + rows of the tier)."""
        self.prefixes.check()
        sizes = map(self._size, self.prefixes.items.values())
        assert self.num_bytes == sum(sizes) <= self.max_bytes

    def _submit(
        self, work: Callable[[], Result | None] | None, what: str = "", priority: int = NORMAL
    ) -> Future[Result | None]:
        """Run ``work`` in the disk thread, or end that if it is None. Urgent jobs are first, others
        in order of submission. An error, "not possible to ``what``", turns the disk off; the result
        is then None."""
        done: Future[Result | None] = Future()
        self._jobs.put((priority, next(self._numbers), what, work, done))
        return done

    def _run(self) -> None:
        """Run jobs one at a time: the function of the disk thread."""
        while True:
            _, _, what, work, done = self._jobs.get()
            if work is None:
                return
            self._started_s = time.monotonic()
            try:
                done.set_result(None if self._failure else work())
            except BaseException as error:
                reason = getattr(error, "strerror", None) or repr(error)
                self._turn_off(f"it was not possible to {what} ({reason})")
                done.set_result(None)
            self._started_s = None
            del work, done  # Contents of a record are released when nothing else has them.

    def _write(self, item: PrefixPart, read: Callable[[], FutureRows]) -> int | None:
        """Queue a record. Returns its id, or None if there is no room or time."""
        number, num_bytes = self._next_id, self._num_rows(item) * self.row_bytes
        waiting_bytes = self._queued_bytes - self._done_bytes
        is_late = waiting_bytes and waiting_bytes + num_bytes > MAX_PENDING_BYTES
        if is_late or self.is_off:
            self.num_skipped += 1
            return None
        if not self.prefixes.add(number, item):
            return None
        self.num_bytes += self._size(item)
        self._make_room()
        if number not in self.prefixes.items:  # It was the last one to be removed.
            self.num_skipped += 1
            return None
        self._next_id = number + 1
        payload = self._pending[number] = read()
        self._queued_bytes += num_bytes

        def write() -> None:
            self._store.write(number, item.encode(), payload().data.cast("B"))

        def written(_: object) -> None:
            del self._pending[number]
            self._done_bytes += num_bytes

        self._submit(write, "write a record").add_done_callback(written)
        return number

    def _make_room(self) -> None:
        """Remove records that are not in use until the others fit, or until there are none."""
        while self.num_bytes > self.max_bytes and self.prefixes.unused:
            self._forget(next(iter(self.prefixes.unused)))

    def _forget(self, number: int) -> None:
        """Remove a record that is not in use."""
        self.num_bytes -= self._size(self.prefixes.remove(number))
        self.remove_file(record_name(number))

    def _read(self, number: int) -> Read:
        """Read a record, unless it was read or is being read already."""
        read = self._reads.get(number)
        if read is None:
            payload = partial(self._payload, number, self._num_rows(self.prefixes.items[number]))
            read = self._reads[number] = self._submit(payload, "read a record", URGENT)
        return read

    def _payload(self, number: int, num_rows: int) -> Rows | None:
        """Return the rows of a record, in the disk thread, or None if it is damaged."""
        pending = self._pending.get(number)
        if pending is not None:
            return pending()
        out = np.empty((num_rows, self.row_bytes), np.uint8)
        start = time.perf_counter()
        if not self._store.read(number, out.data.cast("B")):
            logger.warning(
                "Record %x on disk is damaged: it is computed again, with its continuations.",
                number,
            )
            self.num_errors += 1
            self._damaged.append(number)
            return None
        self._read_s = FADING * self._read_s + time.perf_counter() - start
        self._read_bytes = FADING * self._read_bytes + out.nbytes
        return out

    def _num_rows(self, item: PrefixPart) -> int:
        return self.state_rows if item.is_state else len(item.tokens)

    def _size(self, item: PrefixPart) -> int:
        """Return the disk space of a record."""
        return record_bytes(len(item.encode()), self._num_rows(item) * self.row_bytes)
