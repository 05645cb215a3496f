"""Files that are replaced as a whole: after a kill or a power loss the old or the new content is
there, never a mixture."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Open ``folder``; yields its descriptor. OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield file
    finally:
        os.close(file)


def write_atomically(folder_fd: int, name: str, data: bytes) -> None:
    """Make ``data`` the content of file ``name``.

    File and folder are synced, in this order. OSError: the file is as it was before, or may be so
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders
            raise
