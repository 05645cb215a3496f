"""Record store: a folder with one file per record and a fingerprint, used by one process at a time.

Layout of ``<id in 16 hex digits>.record``, little-endian:

    head:     8s "HCRECRD2"  32s digest of the fingerprint  u64 id  u32 kind  u64 meta bytes
              u64 payload bytes  u32 CRCs of the meta, of the payload and of the head
    meta:     bytes
    payload:  bytes

All CRCs are CRC-32 (zlib). A record is written to ``<id>.part`` and renamed when it is complete. So
a killed process leaves complete records, and at most one ``.part`` file that the next start
removes. Nothing is synced per record. After a power loss a file may be shorter than its head says,
or contain other bytes. Therefore opening checks the size of each file and the CRCs of its head and
meta, and reading checks the CRC of the payload.

Ids are never reused, also by later processes. So a file that an unfinished unlink restores cannot
be mistaken for the parent of another record.

The fingerprint has all properties that the bytes of the records depend on, field by field.
``fingerprint.json`` is written before the first record: ``{"digest": hex, "fields": {...}}``. If
any field differs, opening fails and the folder is left unchanged. Each record contains the digest
too. All files but records are replaced atomically: after a kill or a power loss a file has the old
or the new content.

The store holds two descriptors, of the folder and of its lock. All paths are relative to the first:
a folder that was deleted or replaced at run time gives errors, and its successor is not written.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

NAME = "fingerprint.json"
FORMAT = "engine state 3"
"""Changes with the layout of records and of their meta, and with the names in a fingerprint."""
DIGEST_BYTES = 32
WEIGHTS_NAME, PATTERN = "weights.json", "*.safetensors"
"""File with the saved digest of the weights, valid as long as no file changes: ``{"digest": text,
"files": [[path, bytes, mtime, ctime, inode], ...]}``, with times in nanoseconds."""
STARTED_NS = time.time_ns()
CLOCK_NS = 2_000_000_000
"""Maximum delay of a file system's clock."""
MAGIC = b"HCRECRD2"
HEAD = struct.Struct(f"<8s{DIGEST_BYTES}sQIQQII")
CRC = struct.Struct("<I")
HEAD_BYTES = HEAD.size + CRC.size
SUFFIX, PART, LOCK_NAME = ".record", ".part", "lock"
BLOCK_BYTES, ENTRY_BYTES = 1 << 12, 1 << 6
"""Allocation unit of a file, and size of its entry in the folder."""

Files = list[list[str | int]]
Bytes = bytes | bytearray | memoryview

logger = logging.getLogger(__name__)


class StoreError(ValueError):
    """The store cannot be used; the message is one sentence with the reason and the remedy."""


def digest_of(fields: Mapping[str, str]) -> bytes:
    """Return the digest of a fingerprint, 32 bytes."""
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def _read(path: Path) -> dict[str, str] | None:
    """Return the fields in ``fingerprint.json``, or None if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
        fields = content["fields"]
        is_sound = content["digest"] == digest_of(fields).hex()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EIO):
            return None
        raise
    except (ValueError, TypeError, LookupError):
        return None
    return fields if is_sound else None


def _files(files_dir: Path) -> Files:
    found: Files = []
    for path in sorted(files_dir.resolve().glob(PATTERN)):
        stat = path.stat()
        times = stat.st_mtime_ns, stat.st_ctime_ns
        found.append([str(path), stat.st_size, *times, stat.st_ino])
    return found


def write_atomically(folder_fd: int, name: str, data: bytes) -> None:
    """Replace the content of file ``name`` by ``data``.

    File and folder are synced, in this order. Raises OSError; the file is then unchanged, or may be
    after a power loss.
    """
    part = name + PART
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(os.open(part, flags, 0o600, dir_fd=folder_fd), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(part, dir_fd=folder_fd)
        raise
    try:
        os.fsync(folder_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some do not sync folders
            raise


class Record(NamedTuple):
    """Head of a record, and its meta if that was read."""

    magic: bytes
    digest: bytes
    id: int
    kind: int
    meta_bytes: int
    payload_bytes: int
    meta_crc: int
    payload_crc: int
    meta: bytes = b""

    @classmethod
    def parse(cls, data: bytes) -> Record | None:
        """Return the head at the start of ``data``, or None if it is damaged."""
        raw = data[: HEAD.size]
        if len(data) < HEAD_BYTES or CRC.pack(zlib.crc32(raw)) != data[HEAD.size : HEAD_BYTES]:
            return None
        head = cls(*HEAD.unpack(raw))
        return head if head.magic == MAGIC else None


class RecordStore:
    """The records of one folder. Call ``open`` and then ``scan``, once each."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder if there is one. A new one is made by ``open``, so that a start that is
        refused before leaves none. Raises StoreError if another process uses it, or if it cannot be
        made or written."""
        self.folder = folder
        self._claims: list[int] = []
        """Descriptors of the folder and its lock."""
        self._digest = b""
        self.next_id = time.time_ns()
        """Larger than every id used so far by an earlier process."""
        self.num_unusable = 0
        """Number of damaged or unreadable record files that ``scan`` found."""
        try:
            if folder.is_file():
                raise StoreError(f"{folder} is a file: use a folder, or the name of a new one.")
            existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
            if not os.access(existing, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if existing == folder:
                self._claim()
        except OSError as error:
            raise _unusable(folder, error) from error

    def open(self, fields: Mapping[str, str]) -> RecordStore:
        """Check the fingerprint of the folder, or write that of a new one. Returns the store.

        ``fields`` is the fingerprint: everything that the bytes of a record depend on. Raises
        StoreError if the folder belongs to another fingerprint or format, or cannot be written.
        Nothing in it was changed then.
        """
        ours, path = {"format": FORMAT, **fields}, self.folder / NAME
        try:
            if not self._claims:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._claim()
            stored = _read(path)
            if stored is None and not any(name.endswith(SUFFIX) for name in self._names()):
                content = {"digest": digest_of(ours).hex(), "fields": ours}
                write_atomically(self.folder_fd, NAME, json.dumps(content, indent=1).encode())
                stored = ours
        except OSError as error:
            raise _unusable(self.folder, error) from error
        if stored is None:
            raise StoreError(
                f"{path} is missing or damaged, so the records next to it cannot be used: use "
                f"another folder, or delete {self.folder} with its contents."
            )
        if stored != ours:
            names = dict.fromkeys((*ours, *stored))
            differing = ", ".join(name for name in names if ours.get(name) != stored.get(name))
            raise StoreError(
                f"{self.folder} contains the state of an engine that differs in {differing}: "
                "configure both the same, or use another folder."
            )
        self._digest = digest_of(ours)
        return self

    def scan(self) -> Iterator[Record]:
        """Yield all complete records, by ascending id.

        All other ``.record`` and ``.part`` files are removed. O(records); no payload is
        read. Raises StoreError if the folder cannot be listed.
        """
        try:
            names = self._names()
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be read: {error.strerror}.") from error
        num_damaged = 0
        for name in names:
            try:
                record = self._check_file(name)
                if record is None:
                    num_damaged += name.endswith(SUFFIX)
                    self.remove_file(name)
            except OSError as error:
                path = self.folder / name
                logger.warning("%s cannot be read or removed: %s.", path, error.strerror)
                self.num_unusable += 1
                continue
            if record is not None:
                self.next_id = max(self.next_id, record.id + 1)
                yield record
        self.num_unusable += num_damaged
        if num_damaged:
            logger.warning(
                "Damaged records ignored in %s: %d. Their contents are computed again.",
                self.folder,
                num_damaged,
            )

    def load_digest(self, files_dir: Path) -> str | None:
        """Load the digest that was saved for the files in ``files_dir``.

        None if there is none, or if a file may have changed since then. O(files).
        """
        try:
            known = json.loads((self.folder / WEIGHTS_NAME).read_text(encoding="utf-8"))
            digest = known["digest"] if known["files"] == _files(files_dir) else None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return digest if isinstance(digest, str) else None

    def save_digest(self, files_dir: Path, digest: str) -> None:
        """Save ``digest``, which this process computed from the files in ``files_dir``.

        Does nothing if it is saved already, or if a file changed while this process ran. Logs a
        warning if it cannot be written; the next start then computes it again.
        """
        try:
            files = _files(files_dir)
            is_old = all(int(when) < STARTED_NS - CLOCK_NS for file in files for when in file[2:4])
            if is_old and self.load_digest(files_dir) != digest:
                content = json.dumps({"digest": digest, "files": files}).encode()
                write_atomically(self.folder_fd, WEIGHTS_NAME, content)
        except OSError as error:
            logger.warning(
                "The digest of the weights is not saved in %s (%s): the next start reads the "
                "weights twice.",
                self.folder,
                error.strerror,
            )

    def write(self, record_id: int, kind: int, meta: bytes, payload: Bytes) -> None:
        """Write one record with a new id, ``next_id`` or larger. Raises OSError; no part of the
        record is left then."""
        view = memoryview(payload).cast("B")
        crcs = zlib.crc32(meta), zlib.crc32(view)
        head = HEAD.pack(MAGIC, self._digest, record_id, kind, len(meta), len(view), *crcs)
        part = f"{record_id:016x}{PART}"
        try:
            self._write_file(part, [head + CRC.pack(zlib.crc32(head)) + meta, view])
            os.rename(part, _name(record_id), src_dir_fd=self.folder_fd, dst_dir_fd=self.folder_fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(part, dir_fd=self.folder_fd)
            raise

    def read(self, record_id: int, out: memoryview) -> bool:
        """Read the payload of a record into ``out``, which has its length.

        Returns False if the file does not contain the bytes that were written.

        Raises:
          OSError: the file could not be read; FileNotFoundError if it is gone.
        """
        file = os.open(_name(record_id), os.O_RDONLY, dir_fd=self.folder_fd)
        try:
            head = Record.parse(os.pread(file, HEAD_BYTES, 0))
            if (
                head is None
                or (head.digest, head.id) != (self._digest, record_id)
                or head.payload_bytes != len(out)
            ):
                return False
            done, first = 0, HEAD_BYTES + head.meta_bytes
            while done < len(out):
                count = os.preadv(file, [out[done:]], first + done)
                if not count:
                    return False
                done += count
            return zlib.crc32(out) == head.payload_crc
        finally:
            os.close(file)

    def remove(self, record_id: int) -> None:
        """Remove a record, if it was written. Raises OSError."""
        self.remove_file(_name(record_id))

    def remove_file(self, name: str) -> None:
        """Remove a file from the folder, if it exists. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.folder_fd)

    def sync(self) -> None:
        """Wait until everything written or removed so far survives a power loss. Raises OSError.

        Syncs the whole file system, which for many files costs much less than a sync of each.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "syncfs"):  # systems other than Linux
            os.sync()
        elif libc.syncfs(self.folder_fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Release the folder. No record needs it to be complete."""
        while self._claims:
            os.close(self._claims.pop())

    def _claim(self) -> None:
        """Open and lock the folder. Raises StoreError if another process has it, else OSError."""
        self.folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        self._claims = [self.folder_fd]
        try:
            flags = os.O_RDWR | os.O_CREAT
            self._claims.append(os.open(LOCK_NAME, flags, 0o600, dir_fd=self.folder_fd))
            fcntl.flock(self._claims[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise StoreError(
                f"Another engine uses {self.folder}: stop it, or give this one another --state-dir."
            ) from None
        except BaseException:
            self.close()
            raise

    def _names(self) -> list[str]:
        names = (entry.name for entry in os.scandir(self.folder_fd))
        return sorted(name for name in names if _id_of(name) is not None)

    def _check_file(self, name: str) -> Record | None:
        """Return the record in ``name``, or None if incomplete or foreign. Raises OSError."""
        if not name.endswith(SUFFIX):
            return None
        file = os.open(name, os.O_RDONLY, dir_fd=self.folder_fd)
        try:
            head = Record.parse(os.pread(file, HEAD_BYTES, 0))
            if head is None or head.digest != self._digest or head.id != _id_of(name):
                return None
            if os.fstat(file).st_size != HEAD_BYTES + head.meta_bytes + head.payload_bytes:
                return None
            meta = os.pread(file, head.meta_bytes, HEAD_BYTES)
        finally:
            os.close(file)
        if len(meta) != head.meta_bytes or zlib.crc32(meta) != head.meta_crc:
            return None
        return head._replace(meta=meta)

    def _write_file(self, name: str, parts: list[Bytes]) -> None:
        """Write ``parts``, in one call if the system takes all of them. Between two calls a thread
        that holds the interpreter lock may delay this one. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        file = os.open(name, flags, 0o600, dir_fd=self.folder_fd)
        try:
            left = [view for part in parts if len(view := memoryview(part))]
            while left:
                count = os.writev(file, left)
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]
        finally:
            os.close(file)


def _unusable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"The folder {folder} cannot be made or written ({error.strerror}): give another "
        "--state-dir, or make it writable."
    )


def record_bytes(meta_bytes: int, payload_bytes: int) -> int:
    """Return the disk space that a record counts."""
    num_blocks = -(-(HEAD_BYTES + meta_bytes + payload_bytes) // BLOCK_BYTES)
    return num_blocks * BLOCK_BYTES + ENTRY_BYTES


def _name(record_id: int) -> str:
    return f"{record_id:016x}{SUFFIX}"


def _id_of(name: str) -> int | None:
    """Return the id in the name of a ``.record`` or ``.part`` file, or None for any other file."""
    stem, dot, suffix = name.partition(".")
    if dot + suffix not in (SUFFIX, PART) or len(stem) != 16:
        return None
    try:
        return int(stem, 16)
    except ValueError:
        return None
