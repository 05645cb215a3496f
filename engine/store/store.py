"""A bounded store of records in a folder: written in order, kept in segments, read by id.

One process writes; others on the machine may read what was there when they opened it. A segment
that holds nothing living is deleted; where room is short, the one with the fewest living bytes is
copied to the end first. A crash at any moment loses nothing that was whole: a record is copied
before its segment goes, and of two with one id the later counts. What was dropped may come back
with the next start, as long as its segment is there: a record must say by itself what it is.

Not for two threads at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.store.segment import (
    ALIGNMENT,
    DIGEST_BYTES,
    SUFFIX,
    Bytes,
    Place,
    Record,
    Segment,
    record_bytes,
)

SEGMENTS = 32
"""So many fill a store: of its bytes at most two parts in so many are in reserve."""
MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 1 << 12, 1 << 28
USABLE = 0.875
"""Of a store's bytes: with more living ones, room is made by copying most of a segment for the
little that is dead in it."""
LOCK_NAME = "lock"


class StoreError(ValueError):
    """What is in the folder can not be used, in one sentence that says what to do."""


class StoreFull(StoreError):
    """There is no room for a record, or the disk has none."""


class SegmentStore:
    """The records of one folder; made by ``open``."""

    def __init__(
        self, folder: Path, digest: bytes, max_bytes: int, lock: int | None, max_record: int = 0
    ) -> None:
        self._folder = folder
        self._digest = digest
        self.max_bytes = max_bytes
        self._lock = lock
        self._max_record = max_record
        self._segment_bytes = _segment_bytes(max_bytes, max_record)
        self._segments: dict[int, Segment] = {}
        self._current: Segment | None = None
        self._places: dict[int, tuple[Segment, Place]] = {}
        self._kinds: dict[int, tuple[int, bytes]] = {}
        self._next_id = self._next_number = 1

    @classmethod
    def open(cls, folder: Path, digest: bytes, max_bytes: int, max_record: int = 0) -> SegmentStore:
        """The store in ``folder``, which is made if there is none, with what was whole in it.
        Where another process writes to it, it is read only. O(records).

        ``digest``, 32 bytes: whose it is. ``max_record``: ``record_bytes`` of the largest record to
        come; a segment is never smaller. StoreError: it is somebody else's, or not to be opened;
        nothing in it was changed.
        """
        assert len(digest) == DIGEST_BYTES
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            store = cls(folder, digest, max_bytes, lock, max_record)
            try:
                store._find()
            except BaseException:
                store.close()
                raise
        except OSError as error:
            raise StoreError(f"{folder} can not be used as a store: {error.strerror}.") from error
        return store

    @property
    def is_read_only(self) -> bool:
        return self._lock is None

    @property
    def num_bytes(self) -> int:
        """Of all segments, dead records and heads included; at most ``max_bytes`` after every
        ``append``."""
        return sum(segment.end for segment in self._segments.values())

    @property
    def live_bytes(self) -> int:
        """Of the records that were not dropped."""
        return sum(segment.live_bytes for segment in self._segments.values())

    @property
    def usable_bytes(self) -> int:
        """Living bytes, ``record_bytes`` each, up to which no ``append`` of a record below a
        segment's size is refused but by the disk itself."""
        return self.usable_bytes_of(self.max_bytes, self._max_record)

    @classmethod
    def usable_bytes_of(cls, max_bytes: int, max_record: int = 0) -> int:
        """Of a store of ``max_bytes`` with records up to ``max_record``."""
        return int((max_bytes - 2 * _segment_bytes(max_bytes, max_record)) * USABLE)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def records(self) -> Iterator[Record]:
        """All that is living, in the order in which it was first written."""
        for number in sorted(self._places):
            kind, meta = self._kinds[number]
            yield Record(number, kind, meta, self._places[number][1].payload_bytes)

    @property
    def next_id(self) -> int:
        """Larger than the id of every record that there is."""
        return self._next_id

    def append(self, number: int, kind: int, meta: bytes, payload: Sequence[Bytes]) -> None:
        """Write a record with the id ``number``, ``next_id`` or larger. StoreFull: there is no
        room, and nothing changed but that segments may have been cleaned."""
        assert not self.is_read_only, "another process writes to this store"
        assert number >= self._next_id, "an id that was given"
        size = record_bytes(len(meta), sum(memoryview(part).nbytes for part in payload))
        self._make_room(size)
        self._write(number, kind, meta, payload, size)
        self._next_id = number + 1

    def read(self, number: int, out: memoryview) -> bool:
        """The payload of record ``number`` into ``out``. False: it is not what was written; it is
        dropped. KeyError: there is none; ValueError: ``out`` has another length."""
        segment, place = self._places[number]
        if segment.read(place, number, out):
            return True
        self.drop(number)
        return False

    def drop(self, number: int) -> None:
        """Record ``number`` is wanted no more. KeyError: there is none."""
        segment, place = self._places.pop(number)
        del self._kinds[number]
        segment.live_bytes -= place.num_bytes
        if not segment.live_bytes and segment is not self._current and not self.is_read_only:
            self._delete(segment)

    def sync(self) -> None:
        """Have the disk keep all that was written, whatever becomes of the machine. OSError."""
        if self._current is not None:
            self._current.sync()

    def close(self) -> None:
        """Let go of the folder. Nothing is lost without it."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._places.clear()
        self._current = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _find(self) -> None:
        """Open all segments, oldest first; those of another owner are refused before any file is
        changed."""
        opened: list[Segment] = []
        torn: list[Path] = []
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                found = Segment.open(path, read_only=self.is_read_only)
            except FileNotFoundError:  # by the process that writes, meanwhile
                continue
            if found is None:
                torn.append(path)
                continue
            segment, digest = found
            opened.append(segment)
            if digest != self._digest:
                for one in opened:
                    one.close()
                raise StoreError(
                    f"{path} was written by another model or setting: give a folder of its own."
                )
        for segment in sorted(opened, key=lambda segment: segment.number):
            self._segments[segment.number] = segment
            self._next_number = segment.number + 1
            for record, place in segment.scan():
                self._keep(segment, record, place)
        if not self.is_read_only:
            for path in torn:
                path.unlink()
            for segment in tuple(self._segments.values()):
                segment.truncate()
                if not segment.live_bytes:
                    self._delete(segment)

    def _keep(self, segment: Segment, record: Record, place: Place) -> None:
        before = self._places.get(record.id)
        if before is not None:
            before[0].live_bytes -= before[1].num_bytes
        self._places[record.id] = segment, place
        self._kinds[record.id] = record.kind, record.meta
        segment.live_bytes += place.num_bytes
        self._next_id = max(self._next_id, record.id + 1)

    def _write(
        self, number: int, kind: int, meta: bytes, payload: Sequence[Bytes], size: int
    ) -> None:
        try:
            segment = self._segment_for(size)
            place = segment.append(number, kind, meta, payload)
        except OSError as error:
            raise StoreFull(f"{self._folder} takes no more: {error.strerror}.") from error
        self._places[number] = segment, place
        self._kinds[number] = kind, meta

    def _segment_for(self, size: int) -> Segment:
        """The last one where ``size`` bytes fit, or a new one."""
        current = self._current
        if current is not None and current.end + size <= self._segment_bytes:
            return current
        if current is not None:
            current.sync()
            self._current = None
            if not current.live_bytes:
                self._delete(current)
        self._current = Segment.create(self._folder, self._next_number, self._digest)
        self._segments[self._next_number] = self._current
        self._next_number += 1
        return self._current

    @property
    def segment_bytes(self) -> int:
        """Of a whole one."""
        return self._segment_bytes

    def shrink(self) -> None:
        """Take no more than ``max_bytes``, where it was opened with more before and what is too
        much was dropped since. O(bytes copied)."""
        if not self.is_read_only:
            self._make_room(0)

    def _make_room(self, size: int) -> None:
        """Clean segments until ``size`` bytes, and a segment in reserve to copy to, are free: first
        the one with the fewest living bytes of those that have dead ones."""
        need = size + 2 * ALIGNMENT + self._segment_bytes
        while self.num_bytes + need > self.max_bytes:
            victims = [
                one
                for one in self._segments.values()
                if one is not self._current and one.live_bytes + ALIGNMENT < one.end
            ]
            victim = min(victims, key=lambda one: one.live_bytes, default=None)
            if victim is None:
                raise StoreFull(
                    f"{self._folder} has {self.max_bytes:,} bytes and no room for {size:,} more."
                )
            self._clean(victim)

    def _clean(self, victim: Segment) -> None:
        """Copy what lives in ``victim`` to the end and delete it."""
        living = [number for number, (one, _) in self._places.items() if one is victim]
        for number in living:
            _, place = self._places[number]
            payload = bytearray(place.payload_bytes)
            if self.read(number, memoryview(payload)):
                kind, meta = self._kinds[number]
                self._write(number, kind, meta, [payload], place.num_bytes)
                victim.live_bytes -= place.num_bytes
        if victim.number in self._segments:
            self._delete(victim)

    def _delete(self, segment: Segment) -> None:
        segment.path.unlink(missing_ok=True)
        segment.close()
        del self._segments[segment.number]


def _segment_bytes(max_bytes: int, max_record: int) -> int:
    usual = min(max(max_bytes // SEGMENTS, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)
    return max(usual, max_record + ALIGNMENT if max_record else 0)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder for this process until it ends; None: another has it, or
    nothing may be written there."""
    try:
        file = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return None
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
