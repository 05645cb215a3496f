"""Saved digest of a model's weight files, valid as long as no file changes.

The file ``weights.json`` of a folder: ``{"digest": text, "files": [[path, bytes, mtime, ctime,
inode], ...]}``, with times in nanoseconds.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from engine.plugins.tiers.atomic_file import open_folder, write_atomically

NAME, PATTERN = "weights.json", "*.safetensors"
STARTED_NS = time.time_ns()
CLOCK_NS = 2_000_000_000
"""Maximum delay of a file system's clock."""

Files = list[list[str | int]]

logger = logging.getLogger(__name__)


def load_digest(folder: Path, files_dir: Path) -> str | None:
    """Load the digest that was saved for the files in ``files_dir``.

    None if there is none, or if a file may have changed since then. O(files).
    """
    try:
        known = json.loads((folder / NAME).read_text(encoding="utf-8"))
        digest = known["digest"] if known["files"] == _files(files_dir) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def save_digest(folder: Path, files_dir: Path, digest: str) -> None:
    """Save ``digest``, which this process computed from the files in ``files_dir``.

    Does nothing if it is saved already, or if a file changed while this process ran. Logs a warning
    if it cannot be written; the next start then computes it again.
    """
    try:
        files = _files(files_dir)
        is_old = all(int(when) < STARTED_NS - CLOCK_NS for file in files for when in file[2:4])
        if is_old and load_digest(folder, files_dir) != digest:
            content = json.dumps({"digest": digest, "files": files}).encode()
            with open_folder(folder) as folder_fd:
                write_atomically(folder_fd, NAME, content)
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
