"""Fingerprint of a store: all properties that the bytes of its records depend on, field by field.

``fingerprint.json`` is written before the first record: ``{"digest": hex, "fields": {...}}``. If
any field differs, opening fails and the folder is left unchanged. Each record contains the digest
too.

Files are replaced atomically: after a kill or a power loss a file has the old or the new content.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

NAME = "fingerprint.json"
FORMAT = "engine state 2"
"""Changes with the layout of records and of their meta."""
DIGEST_BYTES = 32

logger = logging.getLogger(__name__)


class StoreError(ValueError):
    """The store cannot be used; the message is one sentence with the reason and the remedy."""


def digest_of(fields: Mapping[str, str]) -> bytes:
    """Return the digest of a fingerprint, 32 bytes."""
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def check_fingerprint(
    folder: Path, folder_fd: int, fields: Mapping[str, str], *, has_records: bool
) -> bytes:
    """Check that ``folder`` belongs to ``fields``, and write its fingerprint if it has none.

    Args:
        folder_fd: descriptor of the folder.
        has_records: True if there are records in the folder, so that it has a fingerprint.

    Returns:
        The digest of the fingerprint, for the records.

    Raises:
        StoreError: the folder belongs to another fingerprint; it is unchanged.
        OSError: ``fingerprint.json`` cannot be read or written.
    """
    ours = {"format": FORMAT, **fields}
    path = folder / NAME
    stored = _read(path)
    if stored is None:
        if has_records:
            raise StoreError(
                f"{path} is missing or damaged, so the records next to it cannot be used: use "
                f"another folder, or delete {folder} with its contents."
            )
        content = {"digest": digest_of(ours).hex(), "fields": ours}
        write_atomically(folder_fd, NAME, json.dumps(content, indent=1).encode())
    elif stored != ours:
        names = dict.fromkeys((*ours, *stored))
        differing = ", ".join(name for name in names if ours.get(name) != stored.get(name))
        raise StoreError(
            f"{folder} contains the state of an engine that differs in {differing}: configure both "
            "the same, or use another folder."
        )
    return digest_of(ours)


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


WEIGHTS_NAME, PATTERN = "weights.json", "*.safetensors"
"""File with the saved digest of the weights, valid as long as no file changes: ``{"digest": text,
"files": [[path, bytes, mtime, ctime, inode], ...]}``, with times in nanoseconds."""
STARTED_NS = time.time_ns()
CLOCK_NS = 2_000_000_000
"""Maximum delay of a file system's clock."""

Files = list[list[str | int]]


def load_digest(folder: Path, files_dir: Path) -> str | None:
    """Load the digest that was saved for the files in ``files_dir``.

    None if there is none, or if a file may have changed since then. O(files).
    """
    try:
        known = json.loads((folder / WEIGHTS_NAME).read_text(encoding="utf-8"))
        digest = known["digest"] if known["files"] == _files(files_dir) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def save_digest(folder: Path, folder_fd: int, files_dir: Path, digest: str) -> None:
    """Save ``digest``, which this process computed from the files in ``files_dir``.

    Does nothing if it is saved already, or if a file changed while this process ran. Logs a warning
    if it cannot be written; the next start then computes it again.
    """
    try:
        files = _files(files_dir)
        is_old = all(int(when) < STARTED_NS - CLOCK_NS for file in files for when in file[2:4])
        if is_old and load_digest(folder, files_dir) != digest:
            content = json.dumps({"digest": digest, "files": files}).encode()
            write_atomically(folder_fd, WEIGHTS_NAME, content)
    except OSError as error:
        logger.warning(
            "The digest of the weights is not saved in %s (%s): the next start reads the weights "
            "twice.",
            folder,
            error.strerror,
        )


def _files(files_dir: Path) -> Files:
    found: Files = []
    for path in sorted(files_dir.resolve().glob(PATTERN)):
        stat = path.stat()
        times = stat.st_mtime_ns, stat.st_ctime_ns
        found.append([str(path), stat.st_size, *times, stat.st_ino])
    return found


PART = ".part"


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
