"""The disk below a cache: what is published is kept there, and the tree's lowest tier is rows of
what is kept.

Two rules make restarts and the tier one thing. Everything that a request publishes is written
behind its back (``keep``), so that a kill loses what was not written yet and nothing else. And what
the tree moves to its disk tier (``put``) is the very same record, which has mostly been written
long before: its rows are then numbers that point into it, and the record stays as long as one does.
Records that no row points into are dropped when there is no room, the least recently used first.

All methods are for the engine's thread; the store is the disk thread's.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from threading import Condition
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.store.disk_thread import DiskThread
from engine.store.pointers import Pointers
from engine.store.prefixes import Piece, Prefixes, Run, State, covering
from engine.store.segment import record_bytes
from engine.store.store import SegmentStore, StoreFull
from hybridcache.namespaces import read_namespace, write_namespace
from hybridcache.tokens import Indices, Tokens

Kind = Literal["kv", "checkpoint"]
Rows = npt.NDArray[np.uint8]
"""``[n, row_bytes]``."""
Coming = Callable[[], Rows]
"""Bytes that may be on their way yet: it waits for them."""
ReadRows = Callable[[int, int], Coming]
"""The bytes of rows [first, end) of what is to be written, as they are now."""

KV, STATE = 1, 2
KV_HEAD, STATE_HEAD = struct.Struct("<QQI"), struct.Struct("<QQ")
MAX_RECORD_BYTES = 1 << 22
"""Of KV: a hit reads no more than one record that it needs a part of."""
MAX_META_BYTES, TOKEN_BYTES = 1 << 10, 4
"""Of a record of KV beside its tokens, but for namespaces that are longer; of a token's id."""
MAX_PENDING_BYTES = 1 << 28
"""What waits to be written; beyond it nothing is kept that need not be."""

FADING = 0.95
"""What one read says of the disk's speed counts for so much less after the next."""

logger = logging.getLogger(__name__)


def largest_record(row_bytes: int, state_rows: int) -> int:
    """``record_bytes`` of a state; KV is cut into what fits."""
    return record_bytes(STATE_HEAD.size, state_rows * row_bytes)


class Disk:
    """The records of one ``SegmentStore`` as prefixes, and the rows that point into them."""

    def __init__(
        self, store: SegmentStore, *, row_bytes: int, state_rows: int, num_rows: int
    ) -> None:
        """``state_rows``: that hold a state; ``num_rows``: of the tree's tier. O(records): of all
        that is in the store the meta is read, and no payload."""
        self.row_bytes, self.state_rows = row_bytes, state_rows
        self._store = store
        self._thread = DiskThread()
        self.prefixes = Prefixes()
        self._bytes: dict[int, int] = {}
        self._live_bytes = 0
        self._pointers = Pointers(num_rows)
        self._pending: dict[int, Coming] = {}
        self._pending_bytes = 0
        self._written = Condition()
        self._failed: deque[int] = deque()
        self._staged: dict[int, Future[Rows | None]] = {}
        self.is_broken = store.is_read_only
        """Nothing more can be written: what is moved here is lost."""
        self._read_bytes = self._read_s = 0.0
        self.num_skipped = 0
        """What was not kept for want of room or time."""
        self._next_id = store.next_id
        run_bytes = min(MAX_RECORD_BYTES, store.segment_bytes - MAX_META_BYTES)
        self._run_tokens = max(1, run_bytes // (row_bytes + TOKEN_BYTES))
        for record in tuple(store.records()):
            what = self._parse(record.kind, record.meta, record.payload_bytes)
            if what is None or not self.prefixes.add(record.id, what):
                store.drop(record.id)
                continue
            self._count(record.id, record_bytes(len(record.meta), record.payload_bytes))
        if not self.is_broken and store.num_bytes + store.segment_bytes > store.max_bytes:
            self._make_room(0, 0)  # it had more before
            self._thread.do(self._shrink)

    @property
    def bytes_per_s(self) -> float | None:
        """How fast payloads were read, the latest most of all; None: none was."""
        return self._read_bytes / self._read_s if self._read_s else None

    @property
    def max_bytes(self) -> int:
        """The most that all files together take."""
        return self._store.max_bytes

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return self._live_bytes

    def keep(
        self, kind: Kind, path: tuple[Hashable, Tokens], num_rows: int, read: ReadRows
    ) -> list[Piece]:
        """Write what is not kept yet of the last ``num_rows`` tokens of ``path``, or the state at
        its end. Its records, as far as there are any; fewer where there is no room."""
        return self._keep(kind, path, num_rows, read, must=False)

    def put(
        self,
        kind: Kind,
        path: tuple[Hashable, Tokens],
        rows: Indices,
        read: ReadRows,
    ) -> None:
        """``rows`` of the tier are what ``keep`` wrote, or writes now. O(len(path) + bytes that
        are not kept yet)."""
        pieces = self._keep(kind, path, len(rows), read, must=True)
        self.bind(rows, pieces)

    def bind(self, rows: Indices, pieces: list[Piece]) -> None:
        """Let ``rows`` point into ``pieces``; those past their end, nowhere."""
        self._pointers.bind(rows, pieces)

    def forget(self, rows: Indices) -> None:
        """``rows`` point nowhere any more: what they pointed into goes first."""
        for number in self._pointers.unbind(rows):
            if number not in self._pointers and self.prefixes.is_leaf(number):
                self.prefixes.used.move_to_end(number, last=False)

    def take(self, rows: Indices) -> list[tuple[int, Rows]] | None:
        """The bytes of ``rows``, which point nowhere after, in views of what was read: (place of
        the first in ``rows``, bytes from there on). Waits for the disk where they were not staged.
        None: something was damaged, or could not be written."""
        parts = self._pointers.parts(rows)
        self._pointers.unbind(rows)
        payloads = {number: self._payload(number) for number in {part.record for part in parts}}
        pieces = []
        for part in parts:
            payload = payloads[part.record]
            if payload is None:
                return None
            pieces.append((part.first, payload[part.offset : part.offset + part.num_rows]))
        return pieces

    def stage(self, rows: Indices) -> tuple[int, ...]:
        """Begin to read the records of ``rows``; ``is_staged`` tells when ``take`` need not
        wait."""
        found = {part.record: None for part in self._pointers.parts(rows) if part.record}
        for number in found:
            if number not in self._staged and number not in self._pending:
                self._staged[number] = self._thread.do(self._reader(number), urgent=True)
        return tuple(found)

    def is_staged(self, numbers: Iterable[int]) -> bool:
        """Whether all of those have been read."""
        return all(n not in self._staged or self._staged[n].done() for n in numbers)

    def wait(self, numbers: Iterable[int], timeout_s: float) -> None:
        """Sleep until all of those have been read, or time is up."""
        wait([done for n in numbers if (done := self._staged.get(n)) is not None], timeout_s)

    def unstage(self, numbers: Iterable[int]) -> None:
        """Nobody waits for those any more."""
        for number in numbers:
            self._staged.pop(number, None)

    def touch(self, namespace: Hashable, tokens: Tokens) -> None:
        """A request resumed at the end of ``tokens``. O(len(tokens))."""
        self.prefixes.touch(self.prefixes.find(namespace, tokens), len(tokens))

    def clear(self) -> None:
        """Forget everything: no row points anywhere, and nothing is kept."""
        self._pointers.clear()
        for number in sorted(self.prefixes.used, reverse=True):
            self._drop(number)

    def unbind_all(self) -> None:
        """No row points anywhere; what is kept stays."""
        self._pointers.clear()

    def settle(self) -> None:
        """Take in what the disk thread could not write. O(what failed)."""
        while self._failed:
            number = self._failed.popleft()
            if number in self.prefixes:
                self._lose(number)

    def aside(self, work: Callable[[], None]) -> None:
        """Have the disk thread do ``work`` when it comes to it."""
        self._thread.do(work)

    def when_idle(self, work: Callable[[], object]) -> None:
        """Have the disk thread do ``work`` if it has nothing else to do before the end."""
        self._thread.when_idle(work)

    def flush(self) -> None:
        """Wait until all is written and the disk has it."""
        self._thread.do(self._store.sync).result()
        self.settle()

    def close(self) -> None:
        """Write what is left and let go of the folder."""
        self.flush()
        self._thread.close()
        self._store.close()

    def _keep(
        self, kind: Kind, path: tuple[Hashable, Tokens], num_rows: int, read: ReadRows, must: bool
    ) -> list[Piece]:
        namespace, tokens = path
        pieces = self.prefixes.find(namespace, tokens)
        known = sum(piece.num_tokens for piece in pieces)
        if kind == "checkpoint":
            found = self.prefixes.state(pieces, len(tokens)) if known == len(tokens) else None
            if found is None and known == len(tokens):
                found = self._write_state(pieces, len(tokens), read, must)
            return [] if found is None else [Piece(found, 0, self.state_rows)]
        first = len(tokens) - num_rows
        if first <= known < len(tokens):
            self._write_run(pieces, namespace, tokens, known, (first, read), must)
            pieces = self.prefixes.find(namespace, tokens)
        return covering(pieces, first, len(tokens))

    def _write_state(
        self, pieces: list[Piece], position: int, read: ReadRows, must: bool
    ) -> int | None:
        state = State(self._owner(pieces, position), position)
        meta = STATE_HEAD.pack(*state)
        return self._write(state, STATE, meta, partial(read, 0, self.state_rows), must)

    def _owner(self, pieces: list[Piece], position: int) -> int:
        """The run on which a state at ``position``, or a run that begins there, hangs."""
        at = 0
        for piece in pieces:
            at += piece.num_tokens
            if at >= position:
                return piece.id
        raise AssertionError("the path is not known so far")

    def _write_run(
        self,
        pieces: list[Piece],
        namespace: Hashable,
        tokens: Tokens,
        start: int,
        source: tuple[int, ReadRows],
        must: bool,
    ) -> None:
        """Write the KV of ``tokens`` from ``start`` on, in records of a bounded size."""
        try:
            text = write_namespace(namespace).encode()
        except ValueError:
            return
        first, read = source
        parent = self._owner(pieces, start) if start else 0
        while start < len(tokens):
            end = min(start + self._run_tokens, len(tokens))
            run = Run(parent, start, tokens[start:end].copy(), namespace)
            name = b"" if parent else text
            meta = KV_HEAD.pack(parent, start, len(name)) + name
            meta += run.tokens.astype("<i4").tobytes()
            number = self._write(run, KV, meta, partial(read, start - first, end - first), must)
            if number is None:
                return
            parent, start = number, end

    def _write(
        self, what: Run | State, kind: int, meta: bytes, read: Callable[[], Coming], must: bool
    ) -> int | None:
        """Its id; None: there is no room."""
        num_rows = len(what.tokens) if isinstance(what, Run) else self.state_rows
        num_bytes = num_rows * self.row_bytes
        size = record_bytes(len(meta), num_bytes)
        if self.is_broken or not self._has_time(num_bytes, must):
            self.num_skipped += 1
            return None
        number = self._next_id
        if not self.prefixes.add(number, what):
            return None
        # It is the last used now, with all that it hangs on, so that none of it goes for its room.
        if not self._make_room(size, number):
            self.prefixes.remove(number)
            self.num_skipped += 1
            return None
        self._next_id = number + 1
        self._count(number, size)
        payload = read()
        self._pending[number] = payload
        with self._written:
            self._pending_bytes += num_bytes
        self._thread.do(lambda: self._append(number, kind, meta, payload, num_bytes))
        return number

    def _append(self, number: int, kind: int, meta: bytes, payload: Coming, num_bytes: int) -> None:
        """On the disk thread."""
        try:
            self._store.append(number, kind, meta, [payload().data.cast("B")])
        except StoreFull as error:
            logger.warning("Nothing more is kept on disk: %s", error)
            self.is_broken = True
            self._failed.append(number)
        finally:
            del self._pending[number]
            with self._written:
                self._pending_bytes -= num_bytes
                self._written.notify_all()

    def _has_time(self, num_bytes: int, must: bool) -> bool:
        """Whether what waits to be written leaves room for so much more; with ``must`` it waits
        for that."""
        with self._written:
            if must:
                self._written.wait_for(lambda: self._pending_bytes < MAX_PENDING_BYTES)
            return not self._pending_bytes or self._pending_bytes + num_bytes < MAX_PENDING_BYTES

    def _make_room(self, size: int, new: int) -> bool:
        """Drop what no row points into, the least recently used first, until ``size`` bytes fit."""
        for _ in range(2 * len(self.prefixes)):
            if self._live_bytes + size <= self._store.usable_bytes:
                return True
            oldest = next(iter(self.prefixes.used))
            if oldest in self._pointers or oldest == new or not self.prefixes.is_leaf(oldest):
                self.prefixes.refresh(oldest)
            else:
                self._drop(oldest)
        return self._live_bytes + size <= self._store.usable_bytes

    def _drop(self, number: int) -> None:
        self.prefixes.remove(number)
        self._live_bytes -= self._bytes.pop(number)
        self._staged.pop(number, None)
        self._thread.do(lambda: self._drop_record(number))

    def _shrink(self) -> None:
        """On the disk thread."""
        with suppress(StoreFull):
            self._store.shrink()

    def _drop_record(self, number: int) -> None:
        """On the disk thread; what could not be written, or was damaged, is not there."""
        if number in self._store:
            self._store.drop(number)

    def _lose(self, number: int) -> None:
        """Record ``number`` is not what it should be: it goes, with all that hangs on it."""
        for one in reversed(self.prefixes.below(number)):
            self._pointers.lose(one)
            self._drop(one)

    def _payload(self, number: int) -> Rows | None:
        """The rows of record ``number``; None: there is none, or it is damaged, and goes."""
        if number not in self.prefixes:
            return None
        pending = self._pending.get(number)
        if pending is not None:
            return pending()
        staged = self._staged.get(number)
        if staged is None:
            staged = self._thread.do(self._reader(number), urgent=True)
        payload = staged.result()
        if payload is None:
            logger.warning("Record %d on disk is damaged; what it held is computed again.", number)
            self._lose(number)
        return payload

    def _reader(self, number: int) -> Callable[[], Rows | None]:
        what = self.prefixes.used[number]
        num_rows = len(what.tokens) if isinstance(what, Run) else self.state_rows

        def read() -> Rows | None:
            out = np.empty((num_rows, self.row_bytes), np.uint8)
            start = time.perf_counter()
            is_whole = number in self._store and self._store.read(number, out.data.cast("B"))
            self._read_s = FADING * self._read_s + time.perf_counter() - start
            self._read_bytes = FADING * self._read_bytes + out.nbytes
            return out if is_whole else None

        return read

    def _count(self, number: int, size: int) -> None:
        self._bytes[number] = size
        self._live_bytes += size

    def _parse(self, kind: int, meta: bytes, payload_bytes: int) -> Run | State | None:
        """What a record of the store says that it is; None: nothing that this version writes."""
        try:
            if kind == STATE:
                is_whole = payload_bytes == self.state_rows * self.row_bytes
                return State(*STATE_HEAD.unpack(meta)) if is_whole else None
            parent, start, length = KV_HEAD.unpack_from(meta)
            first = KV_HEAD.size + length
            tokens = np.frombuffer(meta[first:], "<i4").astype(np.int32)
            if kind != KV or payload_bytes != len(tokens) * self.row_bytes:
                return None
            if parent:
                above = self.prefixes.used.get(parent)
                namespace = above.namespace if isinstance(above, Run) else None
            else:
                namespace = read_namespace(meta[KV_HEAD.size : first].decode())
            return Run(parent, start, tokens, namespace)
        except (ValueError, struct.error):
            return None
