"""Atomic replacement of files: after a kill or a power loss a file has the old or the new
content."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Open ``folder`` and yield its descriptor. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield file
    finally:
        os.close(file)


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
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some do not sync folders
            raise
