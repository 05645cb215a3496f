"""One segment of a store: a file that only grows, record after record.

Layout, little-endian, every part a multiple of 64 bytes:

    segment   head | record | record | ...
    head      8s "HCSTORE1"  32s whose (a digest)  u64 number  u32 crc of these  zeros
    record    head | meta | payload | tail          (meta and payload are filled up with zeros)
    head      4s "HCrc"  u32 kind  u64 id  u64 meta bytes  u64 payload bytes  u32 crc of the meta
              u32 crc of these  zeros
    tail      4s "HCok"  u32 crc of the payload  u64 id  u32 crc of these  zeros

All crcs are CRC-32 (zlib's). A record is whole where its head, its meta and its tail are, which is
seen without a look at the payload; the payload's own crc is compared when it is read. The tail is
written last: a process that is killed at any byte leaves whole records and at most one that is not,
at the end, and no record is looked for behind one whose head or length is wrong.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ALIGNMENT = 64
SEGMENT_HEAD = struct.Struct("<8s32sQ")
RECORD_HEAD = struct.Struct("<4sIQQQI")
RECORD_TAIL = struct.Struct("<4sIQ")
CRC = struct.Struct("<I")
SEGMENT_MAGIC, RECORD_MAGIC, TAIL_MAGIC = b"HCSTORE1", b"HCrc", b"HCok"
MAX_META_BYTES = 1 << 26
DIGEST_BYTES = 32
SUFFIX = ".segment"

Bytes = bytes | bytearray | memoryview


class Place(NamedTuple):
    """Where a record is in its segment, in bytes."""

    first: int
    meta_bytes: int
    payload_bytes: int

    @property
    def payload_first(self) -> int:
        return self.first + ALIGNMENT + aligned(self.meta_bytes)

    @property
    def tail_first(self) -> int:
        return self.payload_first + aligned(self.payload_bytes)

    @property
    def end(self) -> int:
        return self.tail_first + ALIGNMENT

    @property
    def num_bytes(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a record without its payload."""

    id: int
    kind: int
    meta: bytes
    payload_bytes: int


@dataclass(slots=True)
class Segment:
    """An open file and how much of it is whole records."""

    path: Path
    number: int
    file: int
    """Descriptor."""
    end: int = ALIGNMENT
    """Bytes up to the end of the last whole record."""
    live_bytes: int = 0
    """Of records that nobody dropped."""

    @classmethod
    def create(cls, folder: Path, number: int, digest: bytes) -> Segment:
        """A new, empty one. OSError."""
        path = folder / f"{number:016x}{SUFFIX}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        head = _sealed(SEGMENT_HEAD.pack(SEGMENT_MAGIC, digest, number))
        _write(file, [head], 0)
        return cls(path, number, file)

    @classmethod
    def open(cls, path: Path, *, read_only: bool) -> tuple[Segment, bytes] | None:
        """The one at ``path``, and whose it is; None: its head was never whole. OSError."""
        file = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        head = os.pread(file, ALIGNMENT, 0)
        if not _is_sealed(head, SEGMENT_HEAD) or not head.startswith(SEGMENT_MAGIC):
            os.close(file)
            return None
        _, digest, number = SEGMENT_HEAD.unpack_from(head)
        return cls(path, number, file), digest

    def scan(self) -> Iterator[tuple[Record, Place]]:
        """All whole records, in order; ``end`` grows with them. O(records): payloads are passed
        over."""
        size = os.fstat(self.file).st_size
        while (found := self._whole_record(self.end, size)) is not None:
            record, place = found
            self.end = place.end
            if record is not None:
                yield record, place

    def _whole_record(self, first: int, size: int) -> tuple[Record | None, Place] | None:
        """What begins at ``first``; None: nothing whole; no record: its meta was damaged."""
        head = os.pread(self.file, ALIGNMENT, first)
        if not _is_sealed(head, RECORD_HEAD) or not head.startswith(RECORD_MAGIC):
            return None
        _, kind, number, meta_bytes, payload_bytes, crc = RECORD_HEAD.unpack_from(head)
        place = Place(first, meta_bytes, payload_bytes)
        if meta_bytes > MAX_META_BYTES or place.end > size or self._tail(place, number) is None:
            return None
        meta = os.pread(self.file, meta_bytes, first + ALIGNMENT)
        if len(meta) != meta_bytes or zlib.crc32(meta) != crc:
            return None, place
        return Record(number, kind, meta, payload_bytes), place

    def _tail(self, place: Place, number: int) -> int | None:
        """The crc of the payload at ``place``; None: the tail is not record ``number``'s."""
        tail = os.pread(self.file, ALIGNMENT, place.tail_first)
        if not _is_sealed(tail, RECORD_TAIL):
            return None
        magic, crc, found = RECORD_TAIL.unpack_from(tail)
        return int(crc) if magic == TAIL_MAGIC and found == number else None

    def append(self, number: int, kind: int, meta: bytes, payload: Sequence[Bytes]) -> Place:
        """Write a record; on an OSError nothing of it is kept."""
        parts = [memoryview(part).cast("B") for part in payload]
        payload_bytes = sum(map(len, parts))
        place = Place(self.end, len(meta), payload_bytes)
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        head = RECORD_HEAD.pack(
            RECORD_MAGIC, kind, number, len(meta), payload_bytes, zlib.crc32(meta)
        )
        tail = RECORD_TAIL.pack(TAIL_MAGIC, crc, number)
        whole: list[Bytes] = [
            _sealed(head),
            meta,
            _filling(len(meta)),
            *parts,
            _filling(payload_bytes),
            _sealed(tail),
        ]
        try:
            _write(self.file, whole, place.first)
        except OSError:
            os.ftruncate(self.file, place.first)
            raise
        self.end = place.end
        self.live_bytes += place.num_bytes
        return place

    def read(self, place: Place, number: int, out: memoryview) -> bool:
        """The payload into ``out``, as long as it is. False: the disk holds something else than
        what was written."""
        if len(out) != place.payload_bytes:
            raise ValueError(f"the payload has {place.payload_bytes} bytes, not {len(out)}")
        try:
            done = 0
            while done < len(out):
                count = os.preadv(self.file, [out[done:]], place.payload_first + done)
                if not count:
                    return False
                done += count
            return self._tail(place, number) == zlib.crc32(out)
        except OSError:
            return False

    def truncate(self) -> None:
        """Cut off what is behind the last whole record. OSError."""
        os.ftruncate(self.file, self.end)

    def sync(self) -> None:
        """Have the disk keep all that was written. OSError."""
        os.fdatasync(self.file)

    def close(self) -> None:
        os.close(self.file)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def record_bytes(meta_bytes: int, payload_bytes: int) -> int:
    """What a record takes of a segment."""
    return Place(0, meta_bytes, payload_bytes).num_bytes


def _filling(num_bytes: int) -> bytes:
    return bytes(aligned(num_bytes) - num_bytes)


def _sealed(head: bytes) -> bytes:
    """``head``, its crc, and zeros."""
    return (head + CRC.pack(zlib.crc32(head))).ljust(ALIGNMENT, b"\0")


def _is_sealed(head: bytes, form: struct.Struct) -> bool:
    return len(head) == ALIGNMENT and _sealed(head[: form.size]) == head


def _write(file: int, parts: Sequence[Bytes], first: int) -> None:
    """``parts`` one after the other, in one call where the system takes all of them: between two, a
    thread that holds the interpreter's lock may keep this one waiting. OSError."""
    left = [view for part in parts if len(view := memoryview(part))]
    while left:
        count = os.pwritev(file, left, first)
        first += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
