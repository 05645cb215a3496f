"""Record store: a folder with one file per record and a fingerprint, used by one process at a time.

Layout of ``<id in 16 hex digits>.record``, little-endian:

    head:     u64 meta bytes  u64 payload bytes  u32 CRC of the payload  u32 CRC of the rest
    meta:     bytes
    payload:  bytes

All CRCs are CRC-32 (zlib). That of the rest begins with the digest of the fingerprint and the id,
so a file from another folder or of another name is as bad as a damaged one. A file is written under
another name (``.part``) and renamed when it is complete, so a killed process leaves complete
records. Nothing is synced per record, so opening checks sizes and heads, and reading all bytes.

Ids are never reused, also by later processes. So a file that an unfinished unlink restores cannot
be mistaken for the parent of another record.

``fingerprint.json`` is ``{"digest": hex, "fields": {...}, "files": [[path, bytes, mtime, ctime,
inode], ...]}``: all properties that the bytes of the records depend on, and the files of the
weights. While these are the same, the field ``weights`` need not be computed again.

All paths are relative to a descriptor of the folder: a folder that was deleted or replaced at run
time gives errors, and its successor is not written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.weights.model_files import weight_files

NAME, MEMORY_NAME = "fingerprint.json", "memory"
"""Files of the fingerprint, and of the learned state of policies."""
FORMAT = "engine state 5"
"""Changes with the layout of records and of their meta, and with the names in a fingerprint."""
SIZES, CRC = struct.Struct("<QQI"), struct.Struct("<I")
HEAD_BYTES = SIZES.size + CRC.size
PART, LOCK_NAME = ".part", "lock"
FILE = re.compile(r"([0-9a-f]{16})\.record(\.part)?")
BLOCK_BYTES = 1 << 12
"""Allocation unit of a file."""
MAX_FILE_BYTES = 1 << 30
"""Maximum size of a file that is read whole: far above that of any learned state."""

Bytes = bytes | bytearray | memoryview

logger = logging.getLogger(__name__)


class StoreError(ValueError):
    """The store cannot be used; the message is one sentence with the reason and the remedy."""


def digest_of(fields: Mapping[str, str]) -> bytes:
    """Return the digest of a fingerprint."""
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


class OddFile(OSError):
    """A file of the folder is not regular or too large, so it was not written by an engine."""


class StoredRecord(NamedTuple):
    """One record, without its payload."""

    id: int
    meta: bytes
    payload_bytes: int
    payload_crc: int


class RecordStore:
    """The records of one folder. Call ``open`` and then ``scan``, once each."""

    def __init__(self, folder: Path, weights_dir: Path | None = None) -> None:
        """Make and lock the folder. Raises StoreError if another process uses it, or if it cannot
        be made or written.

        ``weights_dir`` has the files of the model's weights, which are not loaded yet; see
        ``weights_digest``."""
        self.folder = folder
        self._files: list[list[str | int]] = []
        for path in weight_files(weights_dir.resolve()) if weights_dir else ():
            info = path.stat()
            times = info.st_mtime_ns, info.st_ctime_ns
            self._files.append([str(path), info.st_size, *times, info.st_ino])
        self._digest = b""
        self.next_id = time.time_ns()
        """Larger than every id used so far by an earlier process."""
        self.num_damaged = 0
        """Number of damaged record files that ``scan`` found."""
        self._claims: list[int] = []
        """Descriptors of the folder and its lock."""
        self._made = [each for each in (folder, *folder.parents) if not each.exists()]
        """Folders that are made here. ``close`` removes them again if no file is in them."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            self._claims.append(self._folder_fd)
            self._claims.append(self._open_fd(LOCK_NAME, os.O_RDWR | os.O_CREAT))
            fcntl.flock(self._claims[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:  # The file may have been deleted since another engine locked it.
                fcntl.flock(self._folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise  # Others: some file systems do not lock folders.
        except BlockingIOError:
            self.close()
            raise StoreError(
                f"Another engine uses {folder}: stop it, or give this one another --state-dir."
            ) from None
        except OSError as error:
            self.close()
            raise _unusable(folder, error) from error

    @property
    def weights_digest(self) -> str | None:
        """Field ``weights`` of the folder's fingerprint, or None if the files differ."""
        with suppress(OSError):  # ``open`` reports it.
            stored = self._fingerprint()
            if stored is not None and self._files and stored[1] == self._files:
                return stored[0].get("weights")
        return None

    def open(self, fields: Mapping[str, str], *, empties: bool = False) -> RecordStore:
        """Check the fingerprint of the folder, or write that of a new one. Returns the store.

        Raises StoreError, with nothing changed, if the folder belongs to other ``fields`` or
        another format, or cannot be read or written. With ``empties`` the entries of other fields
        are removed, which the log says.
        """
        ours = {"format": FORMAT, **fields}
        self._digest = digest_of(ours)
        try:
            stored = self._fingerprint()
            problem, remedy = "", "restore it from a copy of the folder"
            if stored is None and any(map(FILE.fullmatch, os.listdir(self._folder_fd))):
                problem = f"{self.folder / NAME} is missing or damaged"
            theirs = ours if stored is None else stored[0]
            if names := [one for one in {**ours, **theirs} if ours.get(one) != theirs.get(one)]:
                differ, remedy = ", ".join(names), "configure both the same"
                problem = f"{self.folder} contains the state of an engine that differs in {differ}"
            if problem and not empties:
                raise StoreError(
                    f"{problem}: {remedy}, use another state_dir, or set "
                    "state_dir_mismatch='empty', which deletes the entries in this one."
                )
            if problem:
                logger.warning("%s: its entries are deleted (state_dir_mismatch).", problem)
                for name in os.listdir(self._folder_fd):
                    if FILE.fullmatch(name) or name in (NAME, MEMORY_NAME):
                        self.remove_file(name)
            if stored != (ours, self._files):
                wanted = {"digest": self._digest.hex(), "fields": ours, "files": self._files}
                self.write_file(NAME, json.dumps(wanted, indent=1).encode())
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return self

    def scan(self) -> Iterator[StoredRecord]:
        """Yield all complete records, by ascending id, and remove the others. O(records); no
        payload is read. Raises StoreError if a file cannot be read or removed."""
        try:
            for name in sorted(os.listdir(self._folder_fd)):
                match = FILE.fullmatch(name)
                if match is None:
                    continue
                record_id, record = int(match[1], 16), None
                if not match[2]:
                    with suppress(OddFile), self._open(name, "rb") as file:
                        record = self._parse(record_id, file)
                    self.num_damaged += record is None
                if record is None:
                    self.remove_file(name)
                    continue
                self.next_id = max(self.next_id, record_id + 1)
                yield record
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be read: {error}.") from error
        if self.num_damaged:
            logger.warning(
                "Damaged records ignored in %s: %d. Their contents are computed again.",
                self.folder,
                self.num_damaged,
            )

    def write(self, record_id: int, meta: bytes, payload: Bytes) -> None:
        """Write one record with a new id, ``next_id`` or larger. Raises OSError; nothing is left
        then."""
        view = memoryview(payload).cast("B")
        sizes = SIZES.pack(len(meta), len(view), zlib.crc32(view))
        head = sizes + CRC.pack(self._crc(record_id, sizes + meta))
        self._replace(record_name(record_id), (head + meta, view), is_synced=False)

    def read(self, record_id: int, out: memoryview) -> bool:
        """Read the payload of a record into ``out``, which has its length.

        Returns False if the file does not contain the bytes that were written, or is gone. Raises
        OSError if it cannot be read.
        """
        with suppress(FileNotFoundError), self._open(record_name(record_id), "rb") as file:
            record = self._parse(record_id, file)
            return (
                record is not None
                and record.payload_bytes == len(out) == file.readinto(out)  # type: ignore[attr-defined]
                and record.payload_crc == zlib.crc32(out)
            )
        return False

    def remove_file(self, name: str) -> None:
        """Remove a file from the folder, if it exists. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder_fd)

    def read_file(self, name: str) -> bytes:
        """Return the content of file ``name``. Raises OSError."""
        with self._open(name, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise OddFile(errno.EFBIG, os.strerror(errno.EFBIG))
            return file.read()

    def write_file(self, name: str, data: bytes) -> None:
        """Replace the content of file ``name``, so that after a kill or a power loss it has the old
        or the new one. Raises OSError; the file is then unchanged."""
        self._replace(name, (data,), is_synced=True)

    def close(self) -> None:
        """Release the folder. No record needs it to be complete."""
        with suppress(OSError):
            if self._made and self._claims and os.listdir(self._folder_fd) == [LOCK_NAME]:
                self.remove_file(LOCK_NAME)
                for folder in self._made:
                    folder.rmdir()
        while self._claims:
            with suppress(OSError):  # A fork would hold the lock until its end.
                fcntl.flock(self._claims[-1], fcntl.LOCK_UN)
            os.close(self._claims.pop())

    def _fingerprint(self) -> tuple[dict[str, str], object] | None:
        """Return fields and files of ``fingerprint.json``, or None if it is missing or damaged.
        Raises OSError if it cannot be read."""
        try:
            content = json.loads(self.read_file(NAME))
            is_sound = content["digest"] == digest_of(content["fields"]).hex()
            return (content["fields"], content.get("files")) if is_sound else None
        except (FileNotFoundError, OddFile, ValueError, TypeError, LookupError, RecursionError):
            return None

    def _crc(self, record_id: int, rest: bytes) -> int:
        """Return the CRC of a record without its payload."""
        return zlib.crc32(
            rest, zlib.crc32(record_id.to_bytes(8, "little"), zlib.crc32(self._digest))
        )

    def _parse(self, record_id: int, file: BinaryIO) -> StoredRecord | None:
        """Read a record up to its payload. None if it is damaged. Raises OSError."""
        head = file.read(HEAD_BYTES)
        if len(head) < HEAD_BYTES:
            return None
        meta_bytes, payload_bytes, payload_crc = SIZES.unpack_from(head)
        if HEAD_BYTES + meta_bytes + payload_bytes != os.fstat(file.fileno()).st_size:
            return None
        meta = file.read(meta_bytes)
        if CRC.pack(self._crc(record_id, head[: SIZES.size] + meta)) != head[SIZES.size :]:
            return None
        return StoredRecord(record_id, meta, payload_bytes, payload_crc)

    def _replace(self, name: str, parts: Iterable[Bytes], *, is_synced: bool) -> None:
        """Write a file under another name, and rename it; with ``is_synced``, in this order also on
        the disk. Raises OSError; the file is then unchanged."""
        part, folder = name + PART, self._folder_fd
        try:
            with self._open(part, "wb") as file:
                for each in parts:
                    file.write(each)
                if is_synced:
                    file.flush()
                    os.fsync(file.fileno())
            os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(part, dir_fd=folder)
            raise
        if is_synced:
            with suppress(OSError):  # Some file systems do not sync folders.
                os.fsync(folder)

    def _open(self, name: str, mode: str) -> BinaryIO:
        """Open a file of the folder."""
        return open(name, mode, opener=self._open_fd)  # type: ignore[return-value]

    def _open_fd(self, name: str, flags: int) -> int:
        # A named pipe would wait for its other end, and a link may lead out of the folder.
        flags |= os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self._folder_fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # A link, or a socket.
                raise OddFile(error.errno, "a file is not regular") from error
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OddFile(errno.EINVAL, "a file is not regular")
        return fd


def _unusable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"The folder {folder} cannot be made or written ({error.strerror}): give another "
        "--state-dir, or make it writable."
    )


def record_bytes(meta_bytes: int, payload_bytes: int) -> int:
    """Return the disk space that a record counts."""
    return -(-(HEAD_BYTES + meta_bytes + payload_bytes) // BLOCK_BYTES) * BLOCK_BYTES


def record_name(record_id: int) -> str:
    """Return the file name of a record."""
    return f"{record_id:016x}.record"
