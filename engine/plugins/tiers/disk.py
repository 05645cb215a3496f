"""Disk tier: the records of one store as prefixes, and the rows of the cache's disk tier.

Restart and disk tier share their records:

- Everything that a request publishes is written in the background (``write_through``), so a killed
  process loses only entries that were not written yet.
- The rows that the cache offloads to its disk tier (``offload``) point into these records, which
  mostly exist by then. A record stays as long as a row points into it.
- If there is no room, records without such rows are removed, the least recently used first.

All methods are for the engine's thread. ``RecordStore`` is used by the disk thread alone, after the
constructor. An ``OSError`` there is counted, and the first of each number logged. A record that was
not written or cannot be read is forgotten by ``settle``, with its file. A file that cannot be
removed counts, and is removed when its room is needed. After a refused write or removal nothing is
written for ``RETRY_S``, and the disk has a ``problem`` as long. If a job of the disk thread takes
longer than ``DEADLINE_S``, the disk is off until the engine starts again.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, wait
from functools import partial
from queue import PriorityQueue
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from engine.plugins.tiers.prefixes import Pointers, Prefixes, RecordPart, Run, State, covering
from engine.plugins.tiers.records import RecordStore, record_bytes, write_atomically
from hybridcache.tokens import Indices, Tokens, read_namespace, write_namespace

Result = TypeVar("Result")
URGENT, NORMAL = range(2)
POLL_S = 0.05

Work = tuple[int, int, Callable[[], Any] | None, "Future[Any]"]


class DiskThread:
    """Runs one job at a time: urgent ones first, others in order of submission.

    A job that hangs in the system cannot be interrupted. ``busy_s`` is the duration of the current
    job, so that callers can stop waiting.
    """

    def __init__(self) -> None:
        self._queue: PriorityQueue[Work] = PriorityQueue()
        self._numbers = itertools.count()
        self._started: float | None = None
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds since the current job began, or 0 if there is none."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def submit(self, work: Callable[[], Result], priority: int = NORMAL) -> Future[Result]:
        """Queue ``work``. The future has its result, or its exception, which is also logged."""
        done: Future[Result] = Future()
        self._queue.put((priority, next(self._numbers), work, done))
        return done

    def end(self, deadline_s: float) -> bool:
        """Do the queued work, and end. Returns False if that takes longer than ``deadline_s``; the
        thread then continues alone."""
        self._queue.put((NORMAL, next(self._numbers), None, Future()))
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            _, _, work, done = self._queue.get()
            if work is None:
                return
            self._started = time.monotonic()
            try:
                done.set_result(work())
            except BaseException as error:
                logger.exception("A job of the disk thread failed.")
                done.set_exception(error)
            self._started = None


Kind = Literal["kv", "checkpoint"]
Rows = npt.NDArray[np.uint8]
"""``[n, row_bytes]``."""
FutureRows = Callable[[], Rows]
"""Waits for rows that may still be on their way from the device, and returns them."""
ReadRows = Callable[[int, int], FutureRows]
"""Returns the rows [first, end) of a write, with their current bytes."""

KV, STATE = 1, 2
KV_HEAD, STATE_HEAD = struct.Struct("<QQI"), struct.Struct("<QQ")
MAX_RECORD_BYTES = 1 << 22
"""Limit of a KV record. A hit reads at most one record of which it needs only a part."""
MIN_RECORDS = 32
"""Minimum number of KV records for which a small folder has room."""
TOKEN_BYTES = 4
MAX_PENDING_BYTES = 1 << 28
"""Limit of the bytes waiting to be written. Above it, entries are skipped: no step waits for the
disk."""
DEADLINE_S, CLOSE_DEADLINE_S = 20.0, 60.0
"""Duration of one job after which the file system is considered hung, at run time and at the
end."""
RETRY_S = 60.0
"""Pause in writing after the file system refused a change."""
FADING = 0.95
"""Weight of the previous reads in the measured read speed, per read."""

logger = logging.getLogger(__name__)


class Disk:
    """The records of one ``RecordStore`` as prefixes, and the rows that point into them."""

    def __init__(
        self,
        store: RecordStore,
        *,
        max_bytes: int,
        row_bytes: int,
        state_rows: int,
        num_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the index of ``store``. O(records); no payload is read. Raises StoreError as
        ``scan``.

        Args:
          max_bytes: limit of the disk space of all records.
          row_bytes: size of one row of the tier.
          state_rows: number of rows of one state.
          num_rows: number of rows of the cache's disk tier.
        """
        self.max_bytes, self.row_bytes, self.state_rows = max_bytes, row_bytes, state_rows
        self._store = store
        self._clock = clock
        self.prefixes = Prefixes()
        self._sizes: dict[int, int] = {}
        """Disk space of all records, once the queued jobs are done."""
        self.num_bytes = 0
        """Disk space of all records together."""
        self._pointers = Pointers(num_rows)
        self._pending: dict[int, FutureRows] = {}
        self._queued_bytes = self._done_bytes = 0
        """Bytes of all payloads that were queued, and of those that wait no more. Each is changed
        by one thread."""
        self._failed: deque[int] = deque()
        """Records that were not written, or cannot be read."""
        self._undeleted: deque[tuple[int, int]] = deque()
        """Record and disk space of each file that could not be removed."""
        self._unwanted: deque[int] = deque()
        """Records with a file that is still to be removed."""
        self._staged: dict[int, Future[Rows | None]] = {}
        self._is_packed = False
        """True if no record could be removed for a new one, and none was freed since then."""
        self._retry_at = 0.0
        self._failure = ""
        """Latest refused change, for ``problem``."""
        self._reported: set[int | None] = set()
        self._is_off = False
        self.has_lost_rows = False
        """True if rows that the cache uses may point nowhere; see ``is_lost``."""
        self._read_bytes = self._read_s = 0.0
        self.num_errors = 0
        """Number of file system errors and damaged records."""
        self.num_skipped = 0
        """Number of runs and states not written for lack of room or time, or after an error."""
        record_bytes_limit = min(MAX_RECORD_BYTES, max_bytes // MIN_RECORDS)
        self._run_tokens = max(1, record_bytes_limit // (row_bytes + TOKEN_BYTES))
        orphans: list[int] = []
        for record in store.scan():
            self._count(record.id, record_bytes(len(record.meta), record.payload_bytes))
            if not self.prefixes.add(record.id, self._parse(record.kind, record.meta)):
                orphans.append(record.id)
        self.num_errors += store.num_unusable
        self._thread = DiskThread()
        self._next_id = store.next_id
        for number in orphans:
            self._remove(number)
        self._shrink()

    @property
    def is_writable(self) -> bool:
        """True if records can be written now."""
        return not (self.is_off or self._clock() < self._retry_at)

    @property
    def is_off(self) -> bool:
        """True after the file system did not respond for ``DEADLINE_S``. Nothing is read or written
        any more. Reported once."""
        if not self._is_off and self._thread.busy_s > DEADLINE_S:
            self._is_off = self.has_lost_rows = True
            logger.warning(
                "The file system of %s has not responded for %.0f s: the disk tier is off until "
                "the engine starts again.",
                self._store.folder,
                DEADLINE_S,
            )
        return self._is_off

    @property
    def problem(self) -> str | None:
        """Reason why the folder currently cannot be used, or None if it can."""
        if self.is_off:
            return (
                f"its file system has not responded for {DEADLINE_S:.0f} s; start again to use it"
            )
        return None if self.is_writable else self._failure

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
            state = State(parent, len(tokens))
            found = self.prefixes.states.get(state)
            if found is None:
                read_all = partial(read, 0, self.state_rows)
                found = self._write(state, STATE, STATE_HEAD.pack(*state), read_all)
            return [] if found is None else [RecordPart(found, 0, self.state_rows)]
        first = len(tokens) - num_rows
        if first <= known < len(tokens):
            self._write_run(parent, namespace, tokens, known, (first, read))
            pieces = self.prefixes.find(namespace, tokens)
        return covering(pieces, first, len(tokens))

    def offload(
        self, kind: Kind, path: tuple[Hashable, Tokens], rows: Indices, read: ReadRows
    ) -> None:
        """Bind ``rows`` of the tier to the records of ``write_through``, or write these now.

        O(len(path) + bytes that are not on disk yet).
        """
        self.bind(rows, self.write_through(kind, path, len(rows), read))

    def bind(self, rows: Indices, pieces: list[RecordPart]) -> None:
        """Bind ``rows`` to ``pieces``. Rows after the end of the pieces point nowhere."""
        self._pointers.bind(rows, pieces)
        self.has_lost_rows |= sum(piece.num_rows for piece in pieces) < len(rows)

    def drop(self, rows: Indices) -> None:
        """Unbind ``rows``. The records they pointed into are the first to be removed."""
        for record_id in self._pointers.unbind(rows):
            if self._is_unused(record_id):
                self.prefixes.used.move_to_end(record_id, last=False)
                self._is_packed = False

    def is_lost(self, rows: Indices) -> bool:
        """Return True if some of ``rows`` point nowhere, or if the disk is currently not read."""
        return self.is_off or any(not part.id for part in self._pointers.parts(rows))

    def load(self, rows: Indices) -> list[tuple[int, Rows]] | None:
        """Read ``rows``, which then point nowhere.

        Waits for the disk if they were not staged. Returns views of the records that were read, as
        (index of the first in ``rows``, bytes from there on), or None if some cannot be read.
        """
        parts = self._pointers.parts(rows)
        self._pointers.unbind(rows)
        self._is_packed = False
        payloads = {number: self._payload(number) for number in {part.id for part in parts}}
        pieces, first = [], 0
        for part in parts:
            payload = payloads[part.id]
            if payload is None:
                return None
            pieces.append((first, payload[part.offset : part.offset + part.num_rows]))
            first += part.num_rows
        return pieces

    def stage(self, rows: Indices) -> tuple[int, ...]:
        """Start reading the records of ``rows``. Returns their ids, for ``is_staged``."""
        found = {part.id: None for part in self._pointers.parts(rows) if part.id}
        for number in found:
            if number not in self._staged and number not in self._pending:
                self._staged[number] = self._read(number)
        return tuple(found)

    def is_staged(self, record_ids: Iterable[int]) -> bool:
        """Return True if ``load`` does not have to wait for these records, or cannot read them.

        Losses are handled first, by ``settle`` and ``has_lost_rows``.
        """
        if self._failed or self.has_lost_rows:
            return False
        return self.is_off or all(
            number not in self._staged or self._staged[number].done() for number in record_ids
        )

    def wait(self, record_ids: Iterable[int], timeout_s: float) -> None:
        """Sleep until all of these records have been read, at most ``timeout_s``."""
        wait([done for n in record_ids if (done := self._staged.get(n)) is not None], timeout_s)

    def unstage(self, record_ids: Iterable[int]) -> None:
        """Release the staged contents of these records."""
        for number in record_ids:
            self._staged.pop(number, None)

    def clear(self) -> None:
        """Remove all records, also from the state after a power loss."""
        self.unbind_all()
        for number in sorted(self.prefixes.used, reverse=True):
            self._forget(number)
        while self._unwanted:
            self._remove(self._unwanted.popleft())
        self._run("sync the folder", self._store.sync, pauses=False)

    def unbind_all(self) -> None:
        """Unbind all rows; records stay."""
        self._pointers.clear()
        self.has_lost_rows = self._is_packed = False

    def settle(self) -> None:
        """Forget the records that failed in the disk thread, with their descendants. O(1) if there
        are none, else O(records + rows of the tier)."""
        while self._undeleted:
            number, size = self._undeleted.popleft()
            self._count(number, size)
            self._unwanted.append(number)
        if self._failed:
            failed = {self._failed.popleft() for _ in range(len(self._failed))}
            gone = self.prefixes.descendants(failed)
            self.has_lost_rows |= self._pointers.lose(gone)
            for number in reversed(gone):
                self._forget(number)

    def write_file(self, name: str, content: Callable[[], bytes | None]) -> None:
        """Replace a file in the folder, in the background.

        ``content`` is called in the disk thread; if it returns None, the file is not written.
        """

        def write() -> None:
            if (data := content()) is not None:
                write_atomically(self._store.folder_fd, name, data)

        self._run(f"write the file {name}", write)

    def remove_file(self, name: str) -> None:
        """Remove a file from the folder, in the background."""
        self._run(f"remove {name}", lambda: self._store.remove_file(name), pauses=False)

    def flush(self, deadline_s: float | None = None) -> bool:
        """Wait until all queued work is done. Returns False if the file system hangs."""
        is_done = self._result(self._thread.submit(lambda: True), deadline_s) or False
        self.settle()
        return is_done

    def close(self) -> None:
        """Write pending records, so that they survive a power loss too, and release the folder."""
        self._run("sync the folder", self._store.sync, pauses=False)
        if self.flush(CLOSE_DEADLINE_S) and self._thread.end(CLOSE_DEADLINE_S):
            self._store.close()
        else:
            logger.warning(
                "The file system of %s does not respond: pending writes are lost.",
                self._store.folder,
            )

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds. O(records + rows of the tier)."""
        self._pointers.check()
        assert self.num_bytes == sum(self._sizes.values())
        assert set(self._sizes) == set(self.prefixes.used) | set(self._unwanted)
        assert not (self._is_packed and any(map(self._is_unused, self.prefixes.used)))

    def _run(
        self,
        what: str,
        work: Callable[[], Any],
        on_failure: Callable[[], object] | None = None,
        *,
        pauses: bool = True,
        priority: int = NORMAL,
    ) -> Future[Any]:
        """Run ``work`` in the disk thread. If it fails, ``on_failure`` is called there.

        ``what`` names the work in the report of an OSError, after which, with ``pauses``, nothing
        is written for a while; the result is None then.
        """

        def attempt() -> Any:
            is_done = False
            try:
                result = work()
                is_done = True
                return result
            except OSError as error:
                reason = error.strerror or str(error)
                if pauses:
                    self._failure = f"it was not possible to {what} ({reason})"
                    self._retry_at = self._clock() + RETRY_S
                self.num_errors += 1
                if error.errno not in self._reported:
                    self._reported.add(error.errno)
                    logger.warning(
                        "It was not possible to %s in %s: %s. Later errors with this reason are "
                        "only counted.",
                        what,
                        self._store.folder,
                        reason,
                    )
            finally:
                if on_failure is not None and not is_done:
                    on_failure()

        return self._thread.submit(attempt, priority)

    def _write_run(
        self,
        parent: int,
        namespace: Hashable,
        tokens: Tokens,
        start: int,
        source: tuple[int, ReadRows],
    ) -> None:
        """Write the KV of ``tokens`` from ``start`` on, in records of a bounded size."""
        text = write_namespace(namespace).encode()
        first, read = source
        while start < len(tokens):
            end = min(start + self._run_tokens, len(tokens))
            run = Run(parent, start, tokens[start:end].copy(), namespace)
            name = b"" if parent else text
            meta = KV_HEAD.pack(parent, start, len(name)) + name
            meta += run.tokens.astype("<i4").tobytes()
            number = self._write(run, KV, meta, partial(read, start - first, end - first))
            if number is None:
                return
            parent, start = number, end

    def _write(
        self, item: Run | State, kind: int, meta: bytes, read: Callable[[], FutureRows]
    ) -> int | None:
        """Queue a record. Returns its id, or None if there is no room or time."""
        num_rows = len(item.tokens) if isinstance(item, Run) else self.state_rows
        num_bytes = num_rows * self.row_bytes
        size = record_bytes(len(meta), num_bytes)
        waiting_bytes = self._queued_bytes - self._done_bytes
        is_late = waiting_bytes and waiting_bytes + num_bytes > MAX_PENDING_BYTES
        if is_late or not self.is_writable:
            self.num_skipped += 1
            return None
        number = self._next_id
        if not self.prefixes.add(number, item):
            return None
        # The new item and its ancestors are now the most recently used, so they are not removed for
        # it.
        if not self._make_room(size, number):
            self.prefixes.remove(number)
            if item.parent and self._is_unused(item.parent):
                self._is_packed = False  # It was kept for the new item only.
            self.num_skipped += 1
            return None
        self._next_id = number + 1
        self._count(number, size)
        payload = read()
        self._pending[number] = payload
        self._queued_bytes += num_bytes

        def write() -> None:
            try:
                self._store.write(number, kind, meta, payload().data.cast("B"))
            finally:
                del self._pending[number]
                self._done_bytes += num_bytes

        self._run("write a record", write, partial(self._failed.append, number))
        return number

    def _shrink(self) -> None:
        """Remove records until the others fit, because the limit may have been higher in an earlier
        process.

        KV without a state behind it cannot be used after a start, so it is removed first, then the
        least recently used states, each with the KV that only it needs. O(records).
        """
        for kinds in (Run, (Run, State)):
            for number in list(self.prefixes.used):
                while (
                    self.num_bytes > self.max_bytes
                    and isinstance(item := self.prefixes.used.get(number), kinds)
                    and self.prefixes.is_leaf(number)
                ):
                    self._forget(number)
                    number = item.parent

    def _make_room(self, size: int, new: int) -> bool:
        """Remove records without rows, the least recently used first, until ``size`` bytes fit.
        Returns False if they do not. O(records) at most once until a record is freed."""
        while self._unwanted and self.num_bytes + size > self.max_bytes:
            self._remove(self._unwanted.popleft())
        for _ in range(0 if self._is_packed else 2 * len(self.prefixes)):
            if self.num_bytes + size <= self.max_bytes:
                return True
            oldest = next(iter(self.prefixes.used))
            if oldest != new and self._is_unused(oldest):
                self._forget(oldest)
            else:
                self.prefixes.refresh(oldest)
        fits = self.num_bytes + size <= self.max_bytes
        self._is_packed = not fits
        return fits

    def _is_unused(self, number: int) -> bool:
        """Return True if no row points into a record, and no other record depends on it."""
        return number not in self._pointers and self.prefixes.is_leaf(number)

    def _forget(self, number: int) -> None:
        """Remove a record without descendants."""
        self.prefixes.remove(number)
        self._staged.pop(number, None)
        self._is_packed = False
        self._remove(number)

    def _remove(self, number: int) -> None:
        """Queue the removal of a record's file, which may never have been written."""
        size = self._sizes.pop(number)
        self.num_bytes -= size
        on_failure = partial(self._undeleted.append, (number, size))
        self._run("remove a record", partial(self._store.remove, number), on_failure)

    def _payload(self, number: int) -> Rows | None:
        """Return the rows of a record, or None if it cannot be read."""
        if number not in self.prefixes or self.is_off:
            return None
        pending = self._pending.get(number)
        if pending is not None:
            return pending()
        staged = self._staged.get(number)
        if staged is None:
            staged = self._read(number)
        payload: Rows | None = self._result(staged)
        self.settle()
        return payload

    def _result(self, done: Future[Any], deadline_s: float | None = None) -> Any:
        """Wait for a job. Returns None if it hangs, or a job before it."""
        limit = DEADLINE_S if deadline_s is None else deadline_s
        while not done.done():
            if self._thread.busy_s > limit:
                return None
            wait([done], POLL_S)
        return done.result()

    def _read(self, number: int) -> Future[Rows | None]:
        """Read a record in the disk thread. The result is None if it cannot be read."""
        item = self.prefixes.used[number]
        num_rows = len(item.tokens) if isinstance(item, Run) else self.state_rows

        def read() -> Rows | None:
            out = np.empty((num_rows, self.row_bytes), np.uint8)
            start = time.perf_counter()
            if not self._store.read(number, out.data.cast("B")):
                logger.warning(
                    "Record %x on disk is damaged: it is computed again, with its continuations.",
                    number,
                )
                self.num_errors += 1
                self._failed.append(number)
                return None
            self._read_s = FADING * self._read_s + time.perf_counter() - start
            self._read_bytes = FADING * self._read_bytes + out.nbytes
            return out

        lose = partial(self._failed.append, number)
        return self._run("read a record", read, lose, pauses=False, priority=URGENT)

    def _count(self, number: int, size: int) -> None:
        self._sizes[number] = size
        self.num_bytes += size

    def _parse(self, kind: int, meta: bytes) -> Run | State:
        """Return the run or state of a record. Its checksum and fingerprint were compared, so what
        it says is trusted."""
        if kind == STATE:
            return State(*STATE_HEAD.unpack(meta))
        parent, start, length = KV_HEAD.unpack_from(meta)
        first = KV_HEAD.size + length
        tokens = np.frombuffer(meta[first:], "<i4").astype(np.int32)
        if parent:
            above = self.prefixes.used.get(parent)
            namespace = above.namespace if isinstance(above, Run) else None
        else:
            namespace = read_namespace(meta[KV_HEAD.size : first].decode())
        return Run(parent, start, tokens, namespace)
